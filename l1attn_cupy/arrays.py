"""Which library an array belongs to, borrowing it without a copy by DLPack, and making results of the same kind."""

from __future__ import annotations

import importlib
import math
import sys
from typing import Any

import numpy as np

from .plan import ArraySpec, Shape


def is_torch(array: Any) -> bool:
    """Whether ``array`` is a torch tensor; torch is never imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def describe(array: Any) -> ArraySpec:
    """What a plan needs to know of a NumPy array or torch tensor."""
    if isinstance(array, np.ndarray):
        strides = tuple(stride // max(array.itemsize, 1) for stride in array.strides)
        layout = "masked" if isinstance(array, np.ma.MaskedArray) else "strided"
        return ArraySpec("numpy", array.shape, strides, array.dtype.name, "cpu", layout)
    layout = str(array.layout).removeprefix("torch.")
    strides = tuple(array.stride()) if layout == "strided" else ()
    dtype = str(array.dtype).removeprefix("torch.")
    return ArraySpec("torch", tuple(array.shape), strides, dtype, str(array.device), layout)


def accept(name: str, array: Any) -> Any:
    """``array`` as a NumPy array or torch tensor, without a copy wherever its memory layout allows.

    Copied are only NumPy arrays whose numbers are byte-swapped, unaligned, or strided by a fraction of an item.
    """
    if isinstance(array, np.ndarray):
        whole = all(stride % max(array.itemsize, 1) == 0 for stride in array.strides)
        if array.dtype.isnative and array.flags.aligned and whole:
            return array
        return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    if is_torch(array):
        return array
    if not all(hasattr(array, attribute) for attribute in ("__dlpack__", "__dlpack_device__", "shape", "dtype")):
        kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
        raise TypeError(
            f"{name} must be a NumPy array, a torch tensor or another array that speaks DLPack, got {kind}"
        )
    return _accept_dlpack(name, array)


def _accept_dlpack(name: str, array: Any) -> Any:
    """An array of another library: as a NumPy array, or as a torch tensor where NumPy lacks its dtype."""
    device_type = int(array.__dlpack_device__()[0])
    if device_type != 1:
        raise ValueError(
            f"{name} must be on the CPU or on a CUDA device, got an array of {type(array).__module__} "
            f"with DLPack device type {device_type}"
        )
    dtype = getattr(array.dtype, "name", str(array.dtype)).rpartition(".")[2]
    try:
        if dtype == "bfloat16":
            return importlib.import_module("torch").from_dlpack(array)
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ImportError) as error:
        raise TypeError(
            f"{name} must be an array whose memory DLPack can lend, got {type(array).__module__} "
            f"{type(array).__qualname__} of dtype {dtype}: {error}"
        ) from error


def give_back(result: Any, like: Any) -> Any:
    """``result`` as the kind of array that ``like`` is, by DLPack, where its library offers ``from_dlpack``."""
    if isinstance(like, np.ndarray) or is_torch(like):
        return result
    if hasattr(like, "__array_namespace__"):
        library = like.__array_namespace__()
    else:
        library = sys.modules.get(type(like).__module__.partition(".")[0])
    return library.from_dlpack(result) if hasattr(library, "from_dlpack") else result


def borrow(array: Any) -> np.ndarray:
    """The memory of a CPU array as a NumPy array, through DLPack for torch; bfloat16 as int16. Only to be read."""
    if isinstance(array, np.ndarray):
        return array
    torch = sys.modules["torch"]
    tensor = array.detach().resolve_neg()  # a tensor with the negative bit would be exported with the wrong sign
    return np.from_dlpack(tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor)


def address(array: Any) -> int:
    """Address of the first element of a NumPy array or CPU tensor that this process owns."""
    return array.data_ptr() if is_torch(array) else array.__array_interface__["data"][0]


def empty(shape: Shape, like: Any) -> Any:
    """A new array of the library, dtype and device of ``like``."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, like.dtype)
    return sys.modules["torch"].empty(shape, dtype=like.dtype, device=like.device)


def contiguous_strides(shape: Shape) -> Shape:
    """Strides, in elements, of a C-contiguous array."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
