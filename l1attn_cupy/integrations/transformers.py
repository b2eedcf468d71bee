"""L1 attention for the models of Hugging Face transformers: ``attn_implementation="l1"`` after `register`.

    >>> from l1attn_cupy.integrations import transformers as l1_transformers
    >>> l1_transformers.register()  # doctest: +SKIP
    'l1'

transformers is imported when a function here is called.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .. import plan
from ..attention import l1_attention

if TYPE_CHECKING:
    import torch

#: The oldest release that was tested; 5.2 records attention weights in a way that cannot be noticed here.
OLDEST = (5, 12)

#: Arguments that models hand down and that do not change attention; what position_ids mean is in the mask.
_WITHOUT_EFFECT = frozenset(
    "cache_position deterministic logits_to_keep num_items_in_batch output_hidden_states output_router_logits "
    "position_ids return_dict use_cache".split()
)

#: What to do about arguments that would change it.
_ADVICE = {
    "softcap": "set the soft cap in the model's config to None, if the model can do without",
    "s_aux": "attention sinks are not built",
    "sinks": "attention sinks are not built",
    "position_bias": "use a model with rotary or learned positions",
    "head_mask": "heads cannot be masked",
    "output_attentions": "the weights are never made: leave it out, or use attn_implementation='eager'",
    "cu_seq_lens_q": "for packed sequences give position_ids, with attention_mask=None and use_cache=False",
}

#: Called with the attention module at each call of an attention function that `register` made.
_observers: list[Callable[[Any], None]] = []

#: Names under which `register` has put a function of ours.
_registered: set[str] = set()


def register(*, score: str = "inverse", eps: float = 1e-3, scale: float | None = None, name: str = "l1") -> str:
    """Make ``attn_implementation=name`` mean L1 attention, for every model that uses transformers' attention interface.

    Call it once in each process, before models are made or loaded. Again, with the same name, it changes the options of
    all models that have this name. Several names with different options may live side by side, also in one model.

    Parameters
    ----------
    score, eps
        As in `l1attn_cupy.l1_attention`.
    scale : float, optional
        Factor of the distances in all layers. By default each layer's own, which transformers passes as ``scaling``:
        the factor of its dot product, ``head_dim ** -0.5`` in nearly all models.
    name : str
        What to give as ``attn_implementation``.

    Returns
    -------
    name : str

    Raises
    ------
    ImportError
        transformers or torch is missing, or transformers is older than 5.12.
    TypeError, ValueError
        An option is not one of `l1_attention`, or ``name`` has a meaning of its own in transformers.

    Notes
    -----
    The function raises an error for all that would make it another attention than was asked for: dropout of the weights
    in training, soft caps, sinks, position biases, head masks, ``output_attentions``, packed sequences by
    ``cu_seq_lens_q``, and every argument that it does not know. A model that never calls it cannot be noticed from
    within: `check` tells. Masks are those of transformers' "sdpa": bool, of shape (batch, 1, L, S), shared by all heads
    and layers, and none where there is neither padding nor a window.
    """
    library = _library()
    given = plan.option_types(score, 1.0 if scale is None else scale, eps, None, None)
    plan.check_options(*given, "cpu")
    _check_name(library, name)
    library.AttentionInterface.register(name, _attention_function(score, eps, scale))
    masks = library.AttentionMaskInterface
    masks.register(name, masks()["sdpa"])
    _registered.add(name)
    return name


def check(model: Any, *args: Any, **inputs: Any) -> dict[str, int]:
    """Run ``model(*args, **inputs)`` without gradients, and raise unless all of its attention is L1 attention.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    *args, **inputs
        What the model takes: a batch of a few tokens is enough.

    Returns
    -------
    calls : dict
        As of `count_calls`; none is 0.

    Raises
    ------
    TypeError
        ``model`` is no such model.
    ValueError
        No module called L1 attention, or one that has "Attention" in the name of its class ran and did not. Models such
        as Bloom and XLNet take any ``attn_implementation`` and go on with their own. Or ``model`` is compiled.
    """
    import torch

    with torch.no_grad(), count_calls(model) as calls:
        model(*args, **inputs)
    other = [module for module, n in calls.items() if n == 0]
    if not calls and not hasattr(model, "config"):
        raise TypeError(
            "model must be a transformers model, or a torch.nn.Module that holds one, "
            f"got {type(model).__name__}, without a config and without attention"
        )
    if other or not calls:
        implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
        kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        shown = [f"{module} ({kinds[module]})" for module in other[:3]] + ["..."] * (len(other) > 3)
        raise ValueError(
            f"model must use L1 attention in every attention module, got {type(model).__name__} with "
            f"attn_implementation={implementation!r}, in which {sum(map(bool, calls.values()))} "
            f"modules called it and {len(other)} ran without: {', '.join(shown) or 'no attention module was found'}"
        )
    return calls


@contextlib.contextmanager
def count_calls(model: torch.nn.Module) -> Iterator[dict[str, int]]:
    """Count calls of L1 attention while the context is open.

    Parameters
    ----------
    model : torch.nn.Module
        As it was before `torch.compile`, which leaves no call to be seen.

    Yields
    ------
    calls : dict
        Calls of each module of ``model``, by its name. With 0 are modules whose class has "Attention" in its name and
        that ran without a call, neither by themselves nor by a module in or around them. They are known once the
        context is closed.

    Raises
    ------
    TypeError
        ``model`` is not a module.
    ValueError
        ``model`` is compiled.
    """
    if not isinstance(model, importlib.import_module("torch").nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__} {model!r}")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(f"model must not be compiled, got {type(model).__name__}: count calls before torch.compile")
    names = {module: name for name, module in model.named_modules()}
    calls: dict[str, int] = {}
    ran: dict[str, None] = {}

    def observe(module: Any) -> None:
        if module in names:
            calls[names[module]] = calls.get(names[module], 0) + 1

    def hook(module: Any, *_: Any) -> None:
        ran[names[module]] = None

    suspects = [module for module, name in names.items() if name and "attention" in type(module).__name__.lower()]
    handles = [module.register_forward_pre_hook(hook) for module in suspects]
    _observers.append(observe)
    try:
        yield calls
    finally:
        _observers.remove(observe)
        for handle in handles:
            handle.remove()
        callers = list(calls)
        calls.update({name: 0 for name in ran if not any(_related(name, caller) for caller in callers)})


def _related(name: str, caller: str) -> bool:
    """Whether one module is the other, or is within it."""
    return name == caller or name.startswith(f"{caller}.") or caller.startswith(f"{name}.")


def _library() -> Any:
    """transformers, if it is here and not too old."""
    try:
        importlib.import_module("torch")
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"this needs torch and transformers ({error}): pip install 'l1attn_cupy[transformers]'"
        ) from error
    version = tuple(int(number) for number in re.findall(r"\d+", library.__version__)[:2])
    if version < OLDEST:
        raise ImportError(
            f"this needs transformers {'.'.join(map(str, OLDEST))} or newer, got {library.__version__}: "
            "pip install 'l1attn_cupy[transformers]'"
        )
    return library


def _check_name(library: Any, name: Any) -> None:
    """Raise where transformers would not look ``name`` up, or where it is taken."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be a string of letters, digits and underscores, got {name!r}")
    for word in ("flash", "flex", "sdpa", "eager"):
        if word in name:
            raise ValueError(f"name must be without {word!r}, which transformers goes by, got {name!r}")
    if name in library.AttentionInterface() and name not in _registered:
        raise ValueError(f"name must be new to transformers, got {name!r}, which another library has registered")


def _attention_function(score: str, eps: float, scale: float | None) -> Callable[..., tuple[torch.Tensor, None]]:
    """The function that attention modules call, with the options bound."""

    def l1_attention_forward(
        module: torch.nn.Module,
        query: torch.Tensor,  # (batch, Hq, L, E)
        key: torch.Tensor,  # (batch, Hk, S, E)
        value: torch.Tensor,  # (batch, Hk, S, Ev)
        attention_mask: torch.Tensor | None,  # (batch, 1 or Hq, L, S)
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, None]:
        for observe in _observers:
            observe(module)
        _check_call(module, dropout, others)
        length_q, length_k = query.shape[2], key.shape[2]
        if attention_mask is None:
            _check_window(module, sliding_window, length_k)
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        own = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = l1_attention(
            query,
            key,
            value,
            attention_mask,
            # A single query is the newest: it may see all keys, while causality counts from the first key.
            is_causal=bool(causal) and attention_mask is None and length_q > 1,
            scale=own if scale is None else scale,
            enable_gqa=query.shape[1] != key.shape[1],
            score=score,
            eps=eps,
        )
        return out.transpose(1, 2).contiguous(), None  # (batch, L, Hq, Ev)

    return l1_attention_forward


def _check_call(module: Any, dropout: float, others: dict[str, Any]) -> None:
    """Raise for what would be left out silently."""
    kind = type(module).__name__
    if dropout:
        raise NotImplementedError(
            f"dropout of attention weights must be 0, as it is not built, got {dropout} from {kind}: set it to 0 in "
            "the model's config (attention_dropout, attn_pdrop, attention_probs_dropout_prob, ...), or use model.eval()"
        )
    for argument, given in others.items():
        if given is None or given is False or argument in _WITHOUT_EFFECT:
            continue
        advice = _ADVICE.get(argument, "it is not known to leave attention as it is")
        raise NotImplementedError(f"L1 attention must not get {argument!r}, got it from {kind}: {advice}")
    if _weights_are_recorded():
        raise NotImplementedError(f"L1 attention must not get 'output_attentions': {_ADVICE['output_attentions']}")


def _weights_are_recorded() -> bool:
    """Whether the model records attention weights; its modules need not be told."""
    from transformers.utils import output_capturing

    recorded = output_capturing._active_collector.get() or ()
    return any(key.endswith("attentions") for key in recorded)


def _check_window(module: Any, sliding_window: int | None, length_k: int) -> None:
    """Raise where the mask that would hold the window is missing."""
    if sliding_window is not None and length_k > sliding_window:
        raise ValueError(
            f"attention_mask must hold the sliding window of {sliding_window} for {length_k} keys, got None from "
            f"{type(module).__name__}"
        )
