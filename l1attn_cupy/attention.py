"""The public functions of fused attention."""

from __future__ import annotations

from typing import Any

from . import arrays, plan_attention, plan_quantized, run_attention


def l1_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float = 1.0,
    enable_gqa: bool = False,
    *,
    score: str = "inverse",
    eps: float = 1e-3,
    window: tuple[int, int] | None = None,
    quant_scale: Any | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    variant: str | None = None,
) -> Any:
    """L1 attention in memory linear in L and S: the scores of `l1_scores` exist one tile at a time::

        out[..., i, :] = sum_j softmax_j( F(scale * sum_k |query[..., i, k] - key[..., j, k]|) + mask ) value[..., j, :]

    The positional arguments are those of `torch.nn.functional.scaled_dot_product_attention`.

    Parameters
    ----------
    query : array, shape (..., Hq, L, E)
        float16, bfloat16, float32 or float64; any strides; a NumPy array, a torch tensor (gradients flow), or an array
        of another library that speaks DLPack. Or int8 or uint8, as `quantize_for_l1` makes it.
    key : array, shape (..., Hk, S, E)
    value : array, shape (..., Hk, S, Ev)
        Of the library, dtype and device of ``query``. Leading dimensions broadcast as in `torch.matmul`. Beside 8-bit
        query and key, value is float16, bfloat16 or float32.
    attn_mask : array, broadcastable to (..., Hq, L, S), optional
        bool, True where a query may attend to a key; or of value's dtype, added to the scores. Any strides.
    dropout_p : float
        Must be 0.0: dropout of the weights is not built.
    is_causal : bool
        Query i attends to keys j <= i: aligned at the upper left, as in PyTorch, also where L differs from S.
    scale, score, eps, backend, variant
        As in `l1_scores`.
    enable_gqa : bool
        Heads of query may be a multiple of those of key and value; Hq / Hk neighbours share one. Nothing is copied.
    window : (int, int), optional
        Query i attends to keys from i - left to i + right; -1 is no limit. Combines with the masks above.
    quant_scale : array, broadcastable to (..., Hk, 1, 1), optional
        float32; for int8 and uint8 only: what distances are multiplied by before ``scale``, a number for each matrix of
        keys. It is to be positive; no one looks.
    return_lse : bool
        Also return the log-sum-exp of each query's masked scores.

    Returns
    -------
    out : array, shape (..., Hq, L, Ev)
        In the library, dtype and device of ``value``.
    lse : array, shape (..., Hq, L)
        If ``return_lse``: natural logarithm, float32 (float64 for float64); differentiable.

    Raises
    ------
    TypeError, ValueError
        As `l1_scores`. Every message names the argument, what is required and what came.
    NotImplementedError
        ``dropout_p`` is not 0.

    Notes
    -----
    Accumulation as in `l1_scores`. Scores that causality or the window rule out are not computed, but for those in
    tiles that are in part within. A key that is ruled out has no influence, whatever it holds. Where all are, out is 0,
    lse is -inf and gradients are 0. Where all others are infinitely far away, results are NaN, as those of softmax.
    Kept for the backward pass are query, key, value, mask, out before it was rounded, and two numbers for each query.
    The result is the same bit for bit in every run and with any number of threads.

    Of 8-bit query and key the distances are exact integers, and there are no gradients, not of value either. On "cuda"
    and "emulator" value, and a mask that is added, are first converted to float32.

    With torch, second derivatives (where gradients are differentiated) and forward mode are composed of operations on
    the scores: they make arrays of size L * S. Under autocast, torch tensors are cast as those of
    torch's own attention.

    Examples
    --------
    >>> import numpy as np
    >>> query, key = np.zeros((1, 2)), np.array([[0.0, 0.0], [3.0, 4.0]])
    >>> l1_attention(query, key, np.eye(2), score="distance", scale=0.0 + np.log(3) / 7)
    array([[0.25, 0.75]])

    References
    ----------
    Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning", 2023.
    """
    plan_attention.check_dropout(dropout_p)
    plan_attention.check_flag("return_lse", return_lse)
    options = plan_attention.option_types(enable_gqa, is_causal, window, score, scale, eps, backend, variant)
    if plan_quantized.is_quantized(query, key, quant_scale):
        return _quantized(query, key, value, attn_mask, quant_scale, options, return_lse)
    if any(map(arrays.is_torch, (query, key, value))):
        from . import autograd_attention

        out, lse = autograd_attention.attention(query, key, value, attn_mask, options, return_lse)
        return (out, lse) if return_lse else out
    given = _accept(query=query, key=key, value=value, attn_mask=attn_mask)
    call = _plan(given, options)
    out, softmax, _ = run_attention.attention(call, *given.values())
    return _give_back(out, softmax, query, return_lse)


def _quantized(
    query: Any,
    key: Any,
    value: Any,
    mask: Any | None,
    quant_scale: Any | None,
    options: plan_attention.AttentionOptions,
    return_lse: bool,
) -> Any:
    """`l1_attention` of 8-bit query and key."""
    if any(map(arrays.is_torch, (query, key, value))):
        from . import operators_quantized

        out, lse = operators_quantized.l1_attention(query, key, value, mask, quant_scale, options, return_lse)
        return (out, lse) if return_lse else out
    given = _accept(query=query, key=key, value=value, attn_mask=mask, quant_scale=quant_scale)
    out, softmax = run_attention.attention_quantized(tuple(given.values()), options)
    return _give_back(out, softmax, query, return_lse)


def l1_attention_backward(
    grad_out: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    lse: Any,
    attn_mask: Any | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float = 1.0,
    enable_gqa: bool = False,
    *,
    score: str = "inverse",
    eps: float = 1e-3,
    window: tuple[int, int] | None = None,
    grad_lse: Any | None = None,
    return_dmask: bool = False,
    backend: str | None = None,
    variant: str | None = None,
) -> tuple[Any, ...]:
    """Gradients of `l1_attention`. The scores are computed again, from query, key and lse.

    Parameters
    ----------
    grad_out : array, shape (..., Hq, L, Ev)
        Gradient of the loss with respect to ``out``; library, dtype and device of ``query``, any strides.
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, score, eps, window, backend, variant
        As in the call of `l1_attention`.
    out : array, shape (..., Hq, L, Ev)
        What that call returned; for 16-bit arrays better as it was before it was rounded, in float32.
    lse : array, shape (..., Hq, L)
        What that call returned with ``return_lse``; float32 (float64 for float64) or float64.
    grad_lse : array, shape (..., Hq, L), optional
        Gradient of the loss with respect to ``lse``, in float32 (float64 for float64) or float64.
    return_dmask : bool
        Also return the gradient of an ``attn_mask`` that is not bool.

    Returns
    -------
    dquery, dkey, dvalue : array
        In the shapes of ``query``, ``key`` and ``value``, summed over the dimensions in which they were broadcast.
    dmask : array, shape of ``attn_mask``
        If ``return_dmask``.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `l1_attention`; also when ``grad_out``, ``out``, ``lse`` or ``grad_lse`` does not fit.

    Notes
    -----
    Weights are computed again as ``exp(score - lse)``, so they are as accurate as both: in float32 off by 6e-8 times
    their size, which after a mask of -1e9 was added to all keys leaves nothing. In the same way sums go by ``out`` as
    it is. Ties count zero, as in `l1_scores_backward`. The result is the same bit for bit in every run. Torch tensors
    need not call this: `l1_attention` is differentiable, and keeps for it what is exact.
    """
    plan_attention.check_dropout(dropout_p)
    plan_attention.check_flag("return_dmask", return_dmask)
    options = plan_attention.option_types(enable_gqa, is_causal, window, score, scale, eps, backend, variant)
    arguments = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
    saved = {"grad_out": grad_out, "out": out, "lse": lse, "grad_lse": grad_lse}
    if any(map(arrays.is_torch, (query, key, value))):
        from . import autograd_attention

        all_four = autograd_attention.attention_backward(arguments, saved, return_dmask, options)
        return all_four if return_dmask else all_four[:3]
    given, rest = _accept(**arguments), _accept(**saved)
    call = _plan(given, options)
    plan_attention.check_dmask(call.mask, return_dmask)
    run_attention.check_backward(call, **rest)
    softmax = arrays.softmax_of(rest["lse"], call.lse_dtype)
    needed = (True, True, True, return_dmask)
    q, k, v, mask = given.values()
    gradients = run_attention.attention_backward(
        call, rest["grad_out"], q, k, v, mask, rest["out"], softmax, rest["grad_lse"], needed
    )
    likes = (query, key, value, attn_mask)
    return tuple(
        arrays.give_back(gradient, like) for gradient, like, need in zip(gradients, likes, needed, strict=True) if need
    )


def l1_attention_varlen(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float = 1.0,
    enable_gqa: bool = False,
    *,
    score: str = "inverse",
    eps: float = 1e-3,
    window: tuple[int, int] | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    variant: str | None = None,
) -> Any:
    """`l1_attention` on sequences of any lengths, packed one after another without padding.

    Parameters
    ----------
    query : array, shape (total_q, Hq, E)
    key : array, shape (total_k, Hk, E)
    value : array, shape (total_k, Hk, Ev)
        Sequence n of query is ``query[cu_seqlens_q[n] : cu_seqlens_q[n + 1]]``, and likewise key and value.
    cu_seqlens_q, cu_seqlens_k : integers, shape (sequences + 1,)
        0 and the running sums of the lengths; a tensor, an array or a sequence of integers. A length may be 0.
    dropout_p, is_causal, scale, enable_gqa, score, eps, window, return_lse, backend, variant
        As in `l1_attention`; causality and window count from the start of each sequence.

    Returns
    -------
    out : array, shape (total_q, Hq, Ev)
    lse : array, shape (Hq, total_q)
        If ``return_lse``.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `l1_attention`; also when the lengths do not rise from 0 to the rows of query and of key.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(5.0).reshape(5, 1, 1)
    >>> l1_attention_varlen(x, x, x, [0, 1, 5], [0, 1, 5]).shape
    (5, 1, 1)
    """
    plan_attention.check_dropout(dropout_p)
    plan_attention.check_flag("return_lse", return_lse)
    options = plan_attention.option_types(enable_gqa, is_causal, window, score, scale, eps, backend, variant)
    if any(map(arrays.is_torch, (query, key, value))):
        from . import autograd_attention

        ends = cu_seqlens_q, cu_seqlens_k
        out, lse = autograd_attention.attention_varlen(query, key, value, *ends, options, return_lse)
        return (out, lse) if return_lse else out
    given = _accept(query=query, key=key, value=value)
    for name, array in given.items():
        plan_attention.check_packed(name, arrays.describe(array))
    ends = arrays.integers("cu_seqlens_q", cu_seqlens_q), arrays.integers("cu_seqlens_k", cu_seqlens_k)
    segments = plan_attention.segments(*ends, len(given["query"]), len(given["key"]))
    given = {name: array.swapaxes(0, 1) for name, array in given.items()} | {"attn_mask": None}
    out, softmax, _ = run_attention.attention(_plan(given, options, segments), *given.values())
    return _give_back(out.swapaxes(0, 1), softmax, query, return_lse)


def _give_back(out: Any, softmax: Any, query: Any, return_lse: bool) -> Any:
    """The results as arrays of query's library."""
    out = arrays.give_back(out, query)
    return (out, arrays.give_back(arrays.log_sum_exp(softmax), query)) if return_lse else out


def _accept(**given: Any) -> dict[str, Any]:
    """Arrays of any library as NumPy arrays or tensors; None stays."""
    optional = plan_attention.OPTIONAL
    return {n: None if array is None and n in optional else arrays.accept(n, array) for n, array in given.items()}


def _plan(
    given: dict[str, Any], options: plan_attention.AttentionOptions, segments: plan_attention.Segments | None = None
) -> plan_attention.AttentionPlan:
    specs = [None if array is None else arrays.describe(array) for array in given.values()]
    return plan_attention.attention(specs, options, segments)
