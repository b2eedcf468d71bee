"""Which library an array belongs to, borrowing its memory without a copy, and making results of the same kind.

NumPy and CuPy arrays and torch tensors lend their address; arrays of any other library come in, and go out, by DLPack.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import re
import sys
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np

from .cpu import pages
from .plan import ArraySpec, Shape, check_dense


def is_torch(array: Any) -> bool:
    """Whether ``array`` is a torch tensor; torch is never imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_cupy(array: Any) -> bool:
    """Whether ``array`` is a CuPy array; CuPy is never imported to find out."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def describe(array: Any) -> ArraySpec:
    """What a plan needs to know of a NumPy or CuPy array or torch tensor."""
    if is_torch(array):
        if array.is_nested:  # has no shape
            return _describe_tensor((), (), array.dtype, array.device, "nested")
        strided = array.layout is sys.modules["torch"].strided
        strides, layout = (array.stride(), "strided") if strided else ((), array.layout)
        return _describe_tensor(array.shape, strides, array.dtype, array.device, layout)
    if is_cupy(array):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return ArraySpec("cupy", array.shape, strides, array.dtype.name, f"cuda:{array.device.id}")
    strides = tuple(stride // max(array.itemsize, 1) for stride in array.strides)
    layout = "masked" if isinstance(array, np.ma.MaskedArray) else "strided"
    return ArraySpec("numpy", array.shape, strides, array.dtype.name, "cpu", layout)


def describe_traced(tensor: Any) -> ArraySpec:
    """`describe` in code that torch traces, where nothing can be looked up."""
    return _describe_tensor.__wrapped__(tensor.shape, tensor.stride(), tensor.dtype, tensor.device, "strided")


@functools.lru_cache(maxsize=1024)
def _describe_tensor(shape: Shape, strides: Shape, dtype: Any, device: Any, layout: Any) -> ArraySpec:
    """From what torch calls them; looked up, as each step of training asks of the same layouts."""
    dtype, device, layout = (str(attribute).removeprefix("torch.") for attribute in (dtype, device, layout))
    return ArraySpec("torch", tuple(shape), strides, dtype, device, layout)


def accept(name: str, array: Any) -> Any:
    """``array`` as a NumPy array or torch tensor, without a copy wherever its memory layout allows.

    Copied are only NumPy arrays whose numbers are byte-swapped, unaligned, or strided by a fraction of an item.
    """
    if isinstance(array, np.ndarray):
        if not isinstance(array, np.ma.MaskedArray):
            array = np.asarray(array)  # np.matrix and others give their own meaning to functions of NumPy
        whole = all(stride % max(array.itemsize, 1) == 0 for stride in array.strides)
        if array.dtype.isnative and array.flags.aligned and whole:
            return array
        return array.astype(array.dtype.newbyteorder("="), order="C")  # still masked if it was
    if is_torch(array) or is_cupy(array):
        return array
    if not all(hasattr(array, attribute) for attribute in ("__dlpack__", "__dlpack_device__", "shape", "dtype")):
        kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
        advice = (
            "; inside jax.jit, jax.grad or jax.vmap call it through jax.pure_callback"
            if _is_traced_by_jax(array)
            else ""
        )
        raise TypeError(
            f"{name} must be a NumPy or CuPy array, a torch tensor or another array that speaks DLPack, "
            f"got {kind}{advice}"
        )
    return _accept_dlpack(name, array)


def _is_traced_by_jax(array: Any) -> bool:
    """Whether ``array`` is what JAX puts in place of an array while it traces a function: there are no numbers yet."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(array, jax.core.Tracer)


def _accept_dlpack(name: str, array: Any) -> Any:
    """An array of another library: as a NumPy array, or as a torch tensor where NumPy lacks its dtype."""
    dtype = getattr(array.dtype, "name", str(array.dtype)).rpartition(".")[2]
    try:
        device_type = int(array.__dlpack_device__()[0])
        if device_type == 1 and dtype == "bfloat16":
            return importlib.import_module("torch").from_dlpack(array)
        if device_type == 1:
            return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ImportError) as error:
        raise TypeError(
            f"{name} must be an array whose memory DLPack can lend, got {type(array).__module__} "
            f"{type(array).__qualname__} of dtype {dtype}: {error}"
        ) from error
    raise ValueError(
        f"{name} must be on the CPU, or a CuPy array or torch tensor on a CUDA device, got an array of "
        f"{type(array).__module__} with DLPack device type {device_type}; cupy.from_dlpack takes those of CUDA, type 2"
    )


def give_back(result: Any, like: Any) -> Any:
    """``result`` as the kind of array that ``like`` is, by DLPack, where its library offers ``from_dlpack``."""
    if isinstance(like, np.ndarray) or is_torch(like) or is_cupy(like):
        return result
    if hasattr(like, "__array_namespace__"):
        library = like.__array_namespace__()
    else:
        library = sys.modules.get(type(like).__module__.partition(".")[0])
    return library.from_dlpack(result) if hasattr(library, "from_dlpack") else result


def address(array: Any) -> int:
    """Address of the first element: what a DLPack capsule would carry, without making one for each call.

    A tensor with the negative bit holds numbers of the wrong sign; callers resolve that first.
    """
    if hasattr(array, "data_ptr"):  # a tensor
        return array.data_ptr()
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr


def empty(shape: Shape, like: Any, dtype: str | None = None) -> Any:
    """A new array of the library and device of ``like``, and of its dtype or the one named.

    Large ones on the CPU lie in memory of earlier ones, see `cpu.pages`.
    """
    if is_torch(like):
        torch = sys.modules["torch"]
        number = like.dtype if dtype is None else getattr(torch, dtype)
        memory = pages.borrow(math.prod(shape) * number.itemsize) if like.is_cpu else None
        if memory is None:
            return torch.empty_strided(shape, _contiguous_strides(shape), dtype=number, device=like.device)
        return like.new_empty(0, dtype=number).set_(torch.from_numpy(memory).untyped_storage(), 0, shape)
    if isinstance(like, np.ndarray):
        number = np.dtype(dtype or like.dtype)
        memory = pages.borrow(math.prod(shape) * number.itemsize)
        return np.empty(shape, number) if memory is None else memory.view(number).reshape(shape)
    with _device_of(like):
        return _namespace(like).empty(shape, dtype or like.dtype)


@functools.lru_cache(maxsize=1024)
def _contiguous_strides(shape: Shape) -> Shape:
    """Strides of a new array: torch makes it in two thirds of the time if it need not find them."""
    return tuple(math.prod(max(n, 1) for n in shape[dim + 1 :]) for dim in range(len(shape)))


def zeros(shape: Shape, like: Any) -> Any:
    """A new array of zeros of the library, dtype and device of ``like``."""
    out = empty(shape, like)
    out[...] = 0
    return out


def zeros_to_add_to(like: Any) -> Any:
    """Zeros of the shape of ``like``, in the dtype in which its numbers are accumulated."""
    dtype = "float64" if describe(like).dtype == "float64" else "float32"
    if is_torch(like):
        torch = sys.modules["torch"]
        return torch.zeros(like.shape, dtype=getattr(torch, dtype), device=like.device)
    with _device_of(like):
        return _namespace(like).zeros(like.shape, dtype)


def assign(target: Any, source: Any) -> None:
    """``target[...] = source``, rounded to the dtype of ``target``."""
    target[...] = source if is_torch(target) else source.astype(target.dtype)


def sum_of_products(a: Any, b: Any, dtype: str) -> Any:
    """``sum_c a[..., c] * b[..., c]``, computed and returned in ``dtype``; the same bits from any memory layout."""
    if is_torch(a):
        number = getattr(sys.modules["torch"], dtype)
        return (a.to(number) * b.to(number)).contiguous().sum(-1)
    with _device_of(a):
        return _namespace(a).ascontiguousarray(a.astype(dtype) * b.astype(dtype)).sum(-1)


def log_sum_exp(softmax: Any) -> Any:
    """``largest + log(total)`` of its two parts, (..., 2)."""
    if is_torch(softmax):
        return softmax[..., 0] + softmax[..., 1].log()
    with _device_of(softmax), np.errstate(divide="ignore"):  # rows without a key have no sum
        return softmax[..., 0] + _namespace(softmax).log(softmax[..., 1])


def softmax_of(lse: Any, dtype: str) -> Any:
    """Two parts in ``dtype``, (..., 2), whose `log_sum_exp` is lse: what ``dtype`` holds of it, and exp of the rest."""
    if is_torch(lse):
        torch = sys.modules["torch"]
        largest = lse.to(getattr(torch, dtype))
        rest = torch.where(largest.isfinite(), lse - largest, 0)
        return torch.stack([largest, rest.exp().to(largest.dtype)], -1)
    with _device_of(lse), np.errstate(invalid="ignore"):  # infinity less itself
        library = _namespace(lse)
        largest = lse.astype(dtype)
        rest = library.where(library.isfinite(largest), lse - largest, 0)
        return library.stack([largest, library.exp(rest).astype(dtype)], -1)


def with_contiguous_rows(array: Any, spec: ArraySpec | None = None) -> Any:
    """``array``, or a copy of it if its last stride is not 1; ``spec`` is its description, if at hand."""
    spec = spec or describe(array)
    if spec.strides[-1] == 1 or spec.shape[-1] <= 1:
        return array
    return array.contiguous() if is_torch(array) else _namespace(array).ascontiguousarray(array)


def converted(array: Any, dtype: str) -> Any:
    """``array`` in ``dtype``; itself if it is so already."""
    if is_torch(array):
        return array.to(getattr(sys.modules["torch"], dtype))
    with _device_of(array):
        return array.astype(dtype, copy=False)


def integers(name: str, numbers: Any) -> np.ndarray:
    """A tensor, array or sequence of integers, as int64 on the CPU."""
    if is_torch(numbers):
        spec = describe(numbers)
        check_dense(name, spec)
        if sys.modules["torch"]._C._functorch.is_batchedtensor(numbers):
            raise TypeError(f"{name} must be the same for all that torch.func.vmap maps over, got one for each")
        if not re.fullmatch("u?int(8|16|32|64)", spec.dtype):  # others NumPy may not have
            raise TypeError(f"{name} must be one-dimensional and of integers, got a tensor of {spec.dtype}")
        with sys.modules["torch"]._C._DisableFuncTorch():  # whose transforms would wrap what has numbers
            given = numbers.detach().cpu().numpy()
    elif is_cupy(numbers):
        given = numbers.get()
    elif isinstance(numbers, Sequence) and not isinstance(numbers, str):
        whole = all(type(n) is int or isinstance(n, Integral) for n in numbers)
        try:
            given = np.array(numbers, np.int64 if whole and bool not in map(type, numbers) else object)
        except OverflowError:
            raise _beyond_int64(name, max(numbers, key=abs)) from None
    else:
        given = np.asarray(numbers)
    if given.ndim != 1 or given.dtype.kind not in "iu":
        raise TypeError(f"{name} must be one-dimensional and of integers, got {numbers!r}")
    if given.dtype == np.uint64 and given.size and int(given.max()) >= 2**63:
        raise _beyond_int64(name, given.max())
    return given.astype(np.int64)


def _beyond_int64(name: str, number: Any) -> ValueError:
    return ValueError(f"{name} must have numbers that int64 holds, got {number}")


def _device_of(array: Any) -> contextlib.AbstractContextManager:
    """Makes the device of a CuPy array the current one, where CuPy allocates."""
    return array.device if is_cupy(array) else contextlib.nullcontext()


def _namespace(array: Any) -> Any:
    return sys.modules["cupy"] if is_cupy(array) else np
