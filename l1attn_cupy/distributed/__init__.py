"""L1 attention of several processes, on torch.distributed: NCCL between GPUs, Gloo between CPUs.

`ring_l1_attention` shares out one long sequence, `register_dtensor` the batch or the heads.
"""

import torch.distributed

if not torch.distributed.is_available():
    raise ImportError("this needs a torch that was built with torch.distributed")

from .dtensor import register_dtensor
from .ring import ring_l1_attention
from .shards import zigzag_shard, zigzag_unshard

__all__ = ["register_dtensor", "ring_l1_attention", "zigzag_shard", "zigzag_unshard"]
