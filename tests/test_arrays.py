"""Arrays of other libraries: borrowed by DLPack, given back by their own ``from_dlpack``."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import child
import ml_dtypes
import numpy as np
import pytest
import torch
from cases import assert_identical

import l1attn_cupy as l1
from l1attn_cupy import arrays, testing


class ForeignArray:
    """The least that DLPack asks of an array, around a NumPy array or a tensor."""

    def __init__(self, data, device_type=1):
        self.data, self.shape, self.device_type = data, data.shape, device_type
        self.dtype = data.dtype if isinstance(data, np.ndarray) else f"foreign.{str(data.dtype)[6:]}"

    def __dlpack__(self, **options):
        return self.data.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.device_type, 0


class Subclass(np.ndarray):
    """One that changes nothing."""


class ForeignArrayWithNamespace(ForeignArray):
    """One that says where its functions are, as the array API standard asks."""

    def __array_namespace__(self):
        return types.SimpleNamespace(from_dlpack=ForeignArrayWithNamespace)


@pytest.fixture
def foreign_module(monkeypatch):
    """The module of `ForeignArray`, with a ``from_dlpack`` of its own."""
    module = types.ModuleType("foreign")
    module.from_dlpack = ForeignArray
    monkeypatch.setattr(ForeignArray, "__module__", "foreign.arrays")
    monkeypatch.setitem(sys.modules, "foreign", module)
    return module


def numbers():
    """Query, key and gradient as NumPy arrays."""
    return [array.numpy() for array in testing.inputs((2, 33, 17), (2, 31, 17), "float32")]


def test_scores_foreign_in_foreign_out(foreign_module):
    query, key, grad = numbers()
    result = l1.l1_scores(ForeignArray(query), ForeignArray(key))
    assert type(result) is ForeignArray
    assert_identical(result.data, l1.l1_scores(query, key))
    gradients = l1.l1_scores_backward(*map(ForeignArray, (grad, query, key)), scores=result)
    for gradient, expected in zip(gradients, l1.l1_scores_backward(grad, query, key), strict=True):
        assert type(gradient) is ForeignArray
        assert_identical(gradient.data, expected)


def test_scores_foreign_by_array_namespace():
    query, key, _ = numbers()
    result = l1.l1_scores(ForeignArrayWithNamespace(query), ForeignArrayWithNamespace(key))
    assert type(result) is ForeignArrayWithNamespace
    assert_identical(result.data, l1.l1_scores(query, key))


def test_scores_foreign_module_without_from_dlpack(foreign_module):
    """A library that cannot take an array gets NumPy's."""
    del foreign_module.from_dlpack
    query, key, _ = numbers()
    assert_identical(l1.l1_scores(ForeignArray(query), ForeignArray(key)), l1.l1_scores(query, key))


def test_scores_foreign_bfloat16(foreign_module):
    """NumPy has no bfloat16 in DLPack: such arrays go through torch."""
    query, key, _ = testing.inputs((33, 17), (31, 17), "bfloat16")
    result = l1.l1_scores(ForeignArray(query), ForeignArray(key))
    assert type(result) is ForeignArray
    assert_identical(result.data, l1.l1_scores(query, key))


def test_scores_foreign_is_not_copied(foreign_module):
    query = numbers()[0]
    assert np.shares_memory(arrays.accept("query", ForeignArray(query)), query)


@pytest.mark.parametrize("name", ["query", "key"])
def test_scores_foreign_on_another_device(name, foreign_module):
    """DLPack knows more devices than we do."""
    query, key, _ = numbers()
    arguments = {"query": ForeignArray(query), "key": ForeignArray(key)}
    arguments[name].device_type = 8  # Metal
    with pytest.raises(
        ValueError, match=f"{name} must be on the CPU, or a CuPy array or torch tensor on .* DLPack device type 8"
    ):
        l1.l1_scores(**arguments)


def test_scores_foreign_that_lends_nothing(foreign_module):
    """A library's refusal to export is passed on with the name of the argument."""
    query, key, _ = numbers()
    unwilling = ForeignArray(torch.from_numpy(query).requires_grad_())
    with pytest.raises(TypeError, match=r"query must be an array whose memory DLPack can lend, got foreign.arrays"):
        l1.l1_scores(unwilling, ForeignArray(key))


def test_scores_foreign_integers(foreign_module):
    query, key, _ = numbers()
    with pytest.raises(TypeError, match=r"query must have one of the dtypes .*, got int32"):
        l1.l1_scores(ForeignArray(query.astype(np.int32)), ForeignArray(key))


def test_scores_ml_dtypes_bfloat16():
    """NumPy arrays of ml_dtypes.bfloat16 in and out, with the same bits as torch's."""
    tensors = testing.inputs((33, 17), (31, 17), "bfloat16")
    query, key, grad = (tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) for tensor in tensors)
    result = l1.l1_scores(query, key)
    assert result.dtype == ml_dtypes.bfloat16
    assert_identical(result, l1.l1_scores(*tensors[:2]))
    wanted = l1.l1_scores_backward(tensors[2], *tensors[:2])
    for gradient, expected in zip(l1.l1_scores_backward(grad, query, key), wanted, strict=True):
        assert_identical(gradient, expected)


def test_scores_other_ml_dtypes():
    """8-bit floats are refused, not read as something else."""
    x = np.zeros((3, 4), ml_dtypes.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"query must have one of the dtypes .*, got float8_e4m3fn"):
        l1.l1_scores(x, x)


def test_scores_numpy_subclass():
    """A subclass of ndarray gives a plain array."""
    query, key, _ = numbers()
    result = l1.l1_scores(query.view(Subclass), key.view(Subclass))
    assert type(result) is np.ndarray
    assert_identical(result, l1.l1_scores(query, key))


def test_scores_memory_map(tmp_path):
    query, key, _ = numbers()
    np.save(tmp_path / "query.npy", query)
    assert_identical(l1.l1_scores(np.load(tmp_path / "query.npy", mmap_mode="r"), key), l1.l1_scores(query, key))


def test_scores_numpy_alone_does_not_import_torch():
    """NumPy users do not wait for torch."""
    code = (
        "import sys, numpy as np, l1attn_cupy as l1; x = np.eye(3); l1.l1_scores(x, x); print('torch' in sys.modules)"
    )
    assert child.run(code).strip() == "False"


#: Prints what the operating system was asked to do with the memory of a result.
FLAGS_OF_MEMORY = """
import re, sys, torch, l1attn_cupy as l1
query = torch.zeros(int(sys.argv[1]), 2)
scores = l1.l1_scores(query, query)
address, inside = scores.data_ptr() + scores.nbytes // 2, False
for line in open("/proc/self/smaps"):
    if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
        inside = int(place[1], 16) <= address < int(place[2], 16)
    elif inside and line.startswith("VmFlags:"):
        print(line)
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the operating system has no large pages"
)
@pytest.mark.parametrize("length, large", [(2048, True), (512, False)])
def test_large_results_come_in_large_pages(length, large):
    """As NumPy has it for its own: half the time to map them. In a new process, where the memory was no other's."""
    flags = child.run(FLAGS_OF_MEMORY, str(length)).split()
    assert "VmFlags:" in flags
    assert ("hg" in flags) == large
