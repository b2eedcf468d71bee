"""The public functions."""

from __future__ import annotations

from typing import Any

from . import arrays, plan, plan_quantized, run


def l1_scores(
    query: Any,
    key: Any,
    *,
    score: str = "inverse",
    scale: float = 1.0,
    eps: float = 1e-3,
    quant_scale: Any | None = None,
    backend: str | None = None,
    variant: str | None = None,
) -> Any:
    """Scores of L1 attention, a function F of the Manhattan distance between each query and each key::

        scores[..., i, j] = F(scale * sum_k | query[..., i, k] - key[..., j, k] |)

    Parameters
    ----------
    query : array, shape (..., L, E)
        float16, bfloat16, float32 or float64; any strides. A NumPy array, a torch tensor (gradients flow), or an array
        of another library that speaks DLPack. Or int8 or uint8, as `quantize_for_l1` makes it.
    key : array, shape (..., S, E)
        Of the library, dtype and device of ``query``. The leading dimensions of both broadcast as in `torch.matmul`.
    score : str
        F: "inverse" ``1 / (eps + x)``, "negative" ``-x``, "laplacian" ``exp(-x)`` or "distance" ``x``.
    scale : float
        What the distance is multiplied by before F; positive.
    eps : float
        The epsilon of "inverse", in units of the scaled distance; positive.
    quant_scale : array, broadcastable to (..., 1, 1), optional
        float32; for int8 and uint8 only: what the distance is multiplied by before ``scale``, a number for each matrix.
        It is to be positive; no one looks.
    backend : str, optional
        "cpu", "cuda" or "emulator"; by default what the arrays' device calls for.
    variant : str, optional
        Name of a kernel variant; on the CPU there is one only, None. The gradient takes the variant of this name, or
        the default if it has none.

    Returns
    -------
    array, shape (..., L, S)
        In the library, dtype and device of ``query``; float32 for int8 and uint8.

    Raises
    ------
    TypeError
        An argument is not an array, or its dtype or library is not supported or not that of ``query``.
    ValueError
        A shape, a device or the value of an option does not fit. Every message names the argument, what is required
        and what came.

    Notes
    -----
    Sums are accumulated in float32 for 16-bit and float32 arrays, in float64 for float64, in one fixed order, so that
    the result does not depend on the batch, the number of threads or the run. (The variant "half2" rounds differences,
    and sums of up to 16 of them, to float16.) NaN and infinities propagate as in the formula. Nothing of size L * S * E
    is made.

    Distances of int8 and uint8 are exact integers, rounded once to float32, which holds all up to 2**24: those of up to
    65,793 channels. They have no gradient.

    In the gradient, a channel in which query and key are equal counts zero, as in PyTorch. The derivative of F is
    computed from the result, which is all that is kept for the backward pass. With torch there are
    derivatives of every order, forwards and backwards; in 16 bits those of "inverse" leave the range of float16 where
    rows are nearly equal. Under autocast, torch tensors are cast as those of torch's own attention.

    Examples
    --------
    >>> import numpy as np
    >>> query = np.array([[0.0, 0.0], [1.0, 1.0]])
    >>> l1_scores(query, query, score="distance")
    array([[0., 2.],
           [2., 0.]])
    """
    if plan_quantized.is_quantized(query, key, quant_scale):
        return _quantized(query, key, quant_scale, score, scale, eps, backend, variant)
    if arrays.is_torch(query) or arrays.is_torch(key):
        from . import autograd

        return autograd.l1_scores(query, key, score, scale, eps, backend, variant)
    q, k = arrays.accept("query", query), arrays.accept("key", key)
    call = plan.scores(arrays.describe(q), arrays.describe(k), score, scale, eps, backend, variant)
    return arrays.give_back(run.scores(call, q, k), query)


def _quantized(query: Any, key: Any, quant_scale: Any | None, *options: Any) -> Any:
    """`l1_scores` of 8-bit arrays."""
    if arrays.is_torch(query) or arrays.is_torch(key):
        from . import operators_quantized

        return operators_quantized.l1_scores(query, key, quant_scale, *options)
    q, k = arrays.accept("query", query), arrays.accept("key", key)
    scales = None if quant_scale is None else arrays.accept("quant_scale", quant_scale)
    specs = arrays.describe(q), arrays.describe(k), None if scales is None else arrays.describe(scales)
    return arrays.give_back(run.scores_quantized(plan_quantized.scores(specs, *options), q, k, scales), query)


def l1_scores_backward(
    grad_scores: Any,
    query: Any,
    key: Any,
    *,
    score: str = "inverse",
    scale: float = 1.0,
    eps: float = 1e-3,
    scores: Any | None = None,
    backend: str | None = None,
    variant: str | None = None,
) -> tuple[Any, Any]:
    """Gradients of `l1_scores` with respect to query and key. With ``h = grad_scores * F'(x) * scale``::

        dquery[..., i, k] =  sum_j h[..., i, j] * sign(query[..., i, k] - key[..., j, k])
        dkey[..., j, k]   = -sum_i h[..., i, j] * sign(query[..., i, k] - key[..., j, k])        sign(0) = 0

    Parameters
    ----------
    grad_scores : array, shape (..., L, S)
        Gradient of the loss with respect to the scores; library, dtype and device of ``query``, any strides.
    query, key, score, scale, eps, backend
        As in `l1_scores`.
    variant : str, optional
        Name of a variant of this op; scores that are computed again are computed by the default variant.
    scores : array, shape (..., L, S), optional
        What `l1_scores` returned. F' is a function of it, so nothing is computed twice; without it the scores are
        computed again.

    Returns
    -------
    dquery : array, shape of ``query``
    dkey : array, shape of ``key``
        Summed over the dimensions in which ``query`` or ``key`` was broadcast.

    Raises
    ------
    TypeError, ValueError
        As `l1_scores`; also when ``grad_scores`` or ``scores`` does not have the shape of the scores.

    Notes
    -----
    Accumulation as in `l1_scores`. The result is the same bit for bit in every run, except with the variant "scatter".
    On the CPU no temporary of size L * S is made; on CUDA and the emulator one is, for the scores, if they are needed
    and not given. Torch tensors need not call this: `l1_scores` is differentiable. The
    gradients that it returns are not themselves differentiable.

    Examples
    --------
    >>> import numpy as np
    >>> query, key = np.array([[2.0, 1.0]]), np.array([[0.0, 1.0]])
    >>> l1_scores_backward(np.ones((1, 1)), query, key, score="distance")
    (array([[1., 0.]]), array([[-1.,  0.]]))
    """
    if arrays.is_torch(query) or arrays.is_torch(key):
        from . import autograd

        return autograd.l1_scores_backward(grad_scores, query, key, scores, score, scale, eps, backend, variant)
    grad, q, k = (
        arrays.accept(name, array) for name, array in (("grad_scores", grad_scores), ("query", query), ("key", key))
    )
    saved = None if scores is None else arrays.accept("scores", scores)
    call = plan.scores(arrays.describe(q), arrays.describe(k), score, scale, eps, backend, variant)
    dquery, dkey = run.scores_backward(call, grad, q, k, saved)
    return arrays.give_back(dquery, query), arrays.give_back(dkey, key)


def variants(op: str | None = None) -> list[Any]:
    """Kernel variants for the backends "cuda" and "emulator", those that are preferred first.

    Parameters
    ----------
    op : str, optional
        "scores_forward", "scores_quantized", "scores_backward", "scores_jvp", "attention_forward", "attention_merge",
        "attention_backward" or "attention_mask_gradient"; by default all.

    Returns
    -------
    list
        One record for each ``@variant`` line, with the attributes ``op``, ``name`` (what ``variant=`` takes), ``path``
        and ``line`` (where it comes from), ``dtypes``, ``parameters``, ``choices``, ``rank`` and ``limits``.

    Raises
    ------
    ValueError
        ``op`` is not an op.
    KernelError
        A kernel file has a header that cannot be read; file and line are named.

    Examples
    --------
    >>> [variant.name for variant in variants("scores_backward")]
    ['tiled', 'tiled', 'gather', 'scatter']
    """
    from .cuda import registry

    return registry.variants(op)


def show_config() -> None:
    """Print versions, which backends were found and why not, threads, threading layer, and cache folders.

    What to paste into a bug report.
    """
    from . import config

    print(config.report())
