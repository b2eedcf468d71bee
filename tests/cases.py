"""Sizes, layouts and comparisons that several test files share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from l1attn_cupy import testing
from l1attn_cupy.functions import SCORES as SCORE_CODES

SCORES = list(SCORE_CODES)
DTYPES = list(testing.DTYPES)

#: Around every block size that a kernel may have.
SIZES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 96, 97, 127, 128, 129, 257]

#: (L, S, E): every size in every place, twice, each time beside two others.
LENGTHS = [
    (SIZES[i], SIZES[(i + a) % len(SIZES)], SIZES[(i + b) % len(SIZES)])
    for a, b in ((4, 9), (7, 2))
    for i in range(len(SIZES))
]

#: Shapes of query and key whose batch dimensions broadcast: one way, the other, both, with missing dimensions.
BROADCAST = [
    ((3, 1, 33, 17), (3, 2, 31, 17)),
    ((3, 2, 33, 17), (1, 2, 31, 17)),
    ((3, 1, 33, 17), (1, 2, 31, 17)),
    ((33, 17), (3, 2, 31, 17)),
    ((3, 2, 33, 17), (31, 17)),
    ((2, 1, 33, 17), (3, 1, 2, 31, 17)),
    ((1, 1, 33, 17), (31, 17)),
]


def options(score: str, channels: int) -> dict[str, Any]:
    """Options under which no score of normally distributed numbers leaves the range of float16."""
    return {"score": score, "scale": max(channels, 1) ** -0.5}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor as NumPy sees it; bfloat16 through ml_dtypes."""
    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_identical(a: Any, b: Any) -> None:
    """Equal bit for bit, shape and dtype included."""
    a, b = (testing.as_tensor(array) for array in (a, b))
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    assert torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def _sliced(array: np.ndarray) -> np.ndarray:
    """Every second element of a larger array, in each dimension."""
    between = 99 if array.dtype.kind in "iu" else np.nan
    buffer = np.full([2 * n + 1 for n in array.shape], between, array.dtype)
    view = buffer[tuple(slice(1, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def _field(array: np.ndarray) -> np.ndarray:
    """A field of packed records: strides that are no multiple of the item size."""
    records = np.zeros(array.shape, [("number", array.dtype), ("flag", np.int8)])
    records["number"] = array
    return records["number"]


def _backwards(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.flip(array))[tuple(slice(None, None, -1) for _ in array.shape)]


def _read_only(array: np.ndarray) -> np.ndarray:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


#: Name of a memory layout, and a function that puts the numbers of a NumPy array into it.
NUMPY_LAYOUTS = {
    "transposed": lambda a: np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2),
    "batch dimension last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 0, -1)), -1, 0),
    "sliced": _sliced,
    "last stride 2": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "negative strides": _backwards,
    "Fortran order": np.asfortranarray,
    "byte-swapped": lambda a: a.astype(a.dtype.newbyteorder()),
    "unaligned": lambda a: np.frombuffer(b"." + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "field of records": _field,
    "read-only": _read_only,
}

#: The same for tensors.
TORCH_LAYOUTS = {
    "transposed": lambda a: a.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch dimension last": lambda a: a.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda a: a.repeat_interleave(2, -2)[..., ::2, :],
    "last stride 2": lambda a: a.repeat_interleave(2, -1)[..., ::2],
    "offset in its storage": lambda a: torch.cat([a[:1], a])[1:],
    "negative bit": lambda a: torch._neg_view(-a),
}
