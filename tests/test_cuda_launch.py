"""What surrounds a launch on a GPU, with a stand-in for CuPy that notes what is asked of it."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from l1attn_cupy import plan
from l1attn_cupy.cuda import backend, compiler


class Gpus:
    """Two of them; the caller's own device is 0, its stream 70 on device 0 and 71 on device 1."""

    def __init__(self):
        self.current, self.entered, self.launches = 0, 0, []
        runtime = SimpleNamespace(getDevice=lambda: self.current)
        self.cuda = SimpleNamespace(runtime=runtime, Device=self.device, get_current_stream=lambda index: 70 + index)
        self.ndarray = type(None)

    @contextlib.contextmanager
    def device(self, index):
        self.current, before = index, self.current
        self.entered += 1
        yield
        self.current = before

    def kernel(self, launch, device):
        def run(grid, block, args, shared_mem, stream):
            self.launches.append((device, self.current, stream, grid, args[0].tobytes()))

        return run


@pytest.fixture
def gpus(monkeypatch):
    found = Gpus()
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setattr(compiler, "kernel", found.kernel)
    monkeypatch.setattr("l1attn_cupy.cuda.devices.names", lambda *_: ())
    return found


@pytest.mark.parametrize("index", [0, 1])
def test_scores_launch_on_the_device_and_stream_of_the_caller(gpus, index):
    """A device that is the current one already is not entered; another is, and left again."""
    query, key, out = (np.zeros(shape, np.float32) for shape in ((3, 33, 17), (3, 31, 17), (3, 33, 31)))
    specs = [
        plan.ArraySpec("cupy", x.shape, (x[0].size, x.shape[-1], 1), "float32", f"cuda:{index}") for x in (query, key)
    ]
    call = plan.scores(*specs, "inverse", 1.0, 1e-3, None, "gather")
    backend.scores_forward(call, query, key, out)
    ((device, current, stream, grid, struct),) = gpus.launches
    assert (device, current, stream) == (index, index, 70 + index)
    assert (gpus.entered, gpus.current) == (index, 0)
    assert grid[0] > 1
    for array in (query, key, out):
        assert array.__array_interface__["data"][0].to_bytes(8, "little") in struct
