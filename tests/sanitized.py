"""Runs every kernel once or twice through CuPy: a short program for compute-sanitizer, which makes everything slow."""

from __future__ import annotations

import numpy as np

import l1attn_cupy as l1
from l1attn_cupy import arrays, plan, run
from l1attn_cupy.cuda import registry

SHAPES = [(2, 33, 65, 33), (1, 129, 33, 31)]  # (B, L, S, E)


def main() -> None:
    import cupy

    cupy.cuda.set_allocator(None)  # each array is an allocation of its own, so that its end is known
    generator = np.random.default_rng(0)
    names = {(variant.op, variant.name) for variant in l1.variants()}
    launches = 0
    for variant in l1.variants():
        for batch, length_q, length_k, channels in SHAPES:
            query, key, grad = (
                cupy.asarray(generator.standard_normal((batch, *shape)).astype(variant.dtypes[0]))
                for shape in ((length_q, channels), (length_k, channels), (length_q, length_k))
            )
            if variant.op == "scores_forward":
                l1.l1_scores(query, key, variant=variant.name)
            elif variant.op == "scores_backward":
                l1.l1_scores_backward(grad, query, key, variant=variant.name)
            elif variant.op == "scores_quantized":
                l1.l1_scores(query, key, quant_scale=cupy.ones((1, 1), "float32"), variant=variant.name)
            elif variant.op == "scores_jvp":
                call = plan.scores(
                    arrays.describe(query), arrays.describe(key), "inverse", 1.0, 1e-3, None, variant.name
                )
                run.scores_jvp(call, query, key, query, key, None)
            elif variant.dtypes[0] in registry.BYTES.values():
                l1.l1_attention(query, key, key.astype("float32"), grad.astype("float32"), variant=variant.name)
            else:
                mask = grad
                forward, backward = (
                    {"variant": variant.name} if (op, variant.name) in names else {}
                    for op in ("attention_forward", "attention_backward")
                )
                out, lse = l1.l1_attention(query, key, key, mask, return_lse=True, **forward)
                l1.l1_attention_backward(query, query, key, key, out, lse, mask, return_dmask=True, **backward)
            launches += 1
    cupy.cuda.Device().synchronize()
    print(f"{launches} calls")


if __name__ == "__main__":
    main()
