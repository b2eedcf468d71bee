"""What the server imports that children are forked from: all that a child would otherwise import again each time.

Nothing here may use a GPU or start a thread, neither of which survives a fork.
"""

import contextlib

import torch

from .. import autograd
from ..emulator import backend
from . import checking

with contextlib.suppress(ImportError):
    import cupy  # noqa: F401

torch.broadcast_shapes((1,), (1,))  # imports sympy

__all__ = ["autograd", "backend", "checking"]
