"""The emulator's engine: that it computes what CUDA would, and that it catches what CUDA would not."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from l1attn_cupy.emulator import toolchain
from l1attn_cupy.emulator.engine import (
    EmulatorCompileError,
    EmulatorError,
    LaunchStats,
    Region,
    compile_kernel,
    kernels_executed,
)

KERNELS = Path(__file__).parent / "emulator_kernels"
SEEDS = range(4)

needs_cuda_headers = pytest.mark.skipif(
    not toolchain.cuda_include_dirs(), reason="no cuda_fp16.h: pip install nvidia-cuda-runtime-cu12"
)


def python(code):
    """Start a Python that runs `code`, with this file imported as t."""
    here = Path(__file__).parent
    start = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\nimport test_emulator_engine as t\n"
    return subprocess.Popen([sys.executable, "-c", start + code])


def text_of(file):
    return (KERNELS / file).read_text()


def build(file, entry=None, *, check=True, source=None, **defines):
    """Compile a kernel of the folder; macros as keywords."""
    source = f'#line 1 "{file}"\n' + (source or text_of(file))
    entry = entry or file.removesuffix(".cu")
    return compile_kernel(source, name=entry, defines=defines, entry=entry, check=check)


def run(kernel, grid, block, inputs=None, outputs=None, scalars=(), **options):
    """Launch with a struct of pointers to `inputs`, then to `outputs`, then `scalars`."""
    arrays = {**(inputs or {}), **(outputs or {})}
    memory = [Region(a.ctypes.data, a.nbytes, n in (outputs or {}), n) for n, a in arrays.items()]
    codes = "".join("f" if isinstance(s, float) else "i" for s in scalars)
    args = struct.pack(f"@{len(arrays)}Q{codes}0Q", *(a.ctypes.data for a in arrays.values()), *scalars)
    return kernel.launch(grid, block, args, memory=memory, **options)


def place(file, code):
    """``file.cu:12``: the one line that holds `code`."""
    lines = [i for i, line in enumerate(text_of(file).splitlines(), 1) if code in line]
    assert len(lines) == 1, f"{code!r} is on lines {lines} of {file}"
    return f"{file}:{lines[0]}"


def vectors(n=1000):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(n, dtype=np.float32) for name in "ab"}, {"out": np.zeros(n, np.float32)}


def says(message, pattern):
    """Whether a regular expression, in which ``[...]`` stands for itself, is found."""
    return re.search(pattern.replace("[...]", r"\[\.\.\.\]"), message)


def failure(kernel, *args, **kwargs):
    """The message that a launch must end with."""
    with pytest.raises(EmulatorError) as caught:
        run(kernel, *args, **kwargs)
    assert str(caught.value).startswith(f"kernel '{kernel.name}': ")
    return str(caught.value)


# ---- right kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("entry", ["add", "add4"])
def test_vector_result(entry, check):
    inputs, outputs = vectors()
    before = kernels_executed()
    stats = run(build("vector.cu", entry, check=check), 8, 128, inputs, outputs, (1000, 0, 0))
    np.testing.assert_array_equal(outputs["out"], inputs["a"] + inputs["b"])
    assert isinstance(stats, LaunchStats)
    assert (stats.blocks, stats.threads, stats.barriers) == (8, 1024, 0)
    assert stats.seconds > 0
    assert kernels_executed() == before + 1
    if entry == "add":
        assert (stats.loads, stats.stores) == ((2000, 1000) if check else (0, 0))


def running_sum(source=None, *, check, seed=0, chunks=3, grid=5):
    """Run it, on integers: their sums are exact."""
    x = np.random.default_rng(1).integers(-8, 8, (grid, chunks, 128)).astype(np.float32)
    out = np.zeros((grid, 128), np.float32)
    kernel = build("running_sum.cu", source=source, check=check)
    stats = run(kernel, grid, 128, {"x": x}, {"out": out}, (chunks,), seed=seed)
    assert source or stats.barriers == grid * chunks * (1 + 7 + 1)
    return out, x.sum((1, 2))[:, None].repeat(128, 1)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_barriers_result(seed, check):
    out, expected = running_sum(check=check, seed=seed, chunks=3)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("check", [True, False])
def test_tiled_result(check):
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((256, 32), np.float32), rng.standard_normal((128, 32), np.float32)
    out = np.full((256, 128), np.nan, np.float32)
    stats = run(build("tiled_l1.cu", check=check), 2, 256, {"q": q, "k": k}, {"out": out}, (32,))
    expected = np.abs(q[:, None] - k[None]).astype(np.float64).sum(-1)
    np.testing.assert_allclose(out, expected, rtol=32 * 2**-23)
    assert stats.barriers == 2 * 2 * 2


@pytest.mark.parametrize("check", [True, False])
def test_warp_operations(check):
    n = 96
    out, wide = np.full((15, n), -99, np.int32), np.zeros(n)
    run(build("warp.cu", check=check), 1, n, {}, {"out": out, "wide": wide})
    t = np.arange(n)
    lane, base = t % 32, t - t % 32

    def group(width):
        return t - t % width

    def ballot(predicate):
        bits = np.array([sum(1 << i for i in range(32) if predicate[b + i]) for b in base], np.uint64)
        return bits.astype(np.uint32).view(np.int32)

    rows = [
        base + 3,
        group(8) + 3,
        np.where(lane >= 2, t - 2, t),
        np.where(t % 16 >= 2, t - 2, t),
        np.where(lane + 5 < 32, t + 5, t),
        np.where(t % 8 + 5 < 8, t + 5, t),
        t ^ 7,
        ballot(t % 3 == 0),
        t >= 32,
        t < 32,
        np.full(n, -1),
        np.where(lane < 15, t + 1, np.where(lane == 15, -1, np.where(lane > 16, t - 1, -1))),
        np.full(n, n // 2),
        np.ones(n),
        np.ones(n),
    ]
    for i, expected in enumerate(rows):
        np.testing.assert_array_equal(out[i], expected, err_msg=f"row {i}")
    np.testing.assert_array_equal(wide, np.add.reduceat(t + 0.5, [0, 32, 64]).repeat(32))


@pytest.mark.parametrize("check", [True, False])
def test_atomics_result(check):
    grid, block = 20, 96
    n = grid * block
    bins = np.random.default_rng(3).integers(0, 16, n).astype(np.int32)
    outputs = {
        "histogram": np.zeros(16, np.int32),
        "sum": np.zeros(1, np.float32),
        "wide_sum": np.zeros(1),
        "count": np.zeros(1, np.uint64),
        "extremes": np.array([-1, 10**6], np.int32),
        "last": np.zeros(1, np.uint32),
    }
    run(build("atomics.cu", check=check), grid, block, {"bin": bins}, outputs, workers=3)
    np.testing.assert_array_equal(outputs["histogram"], np.bincount(bins, minlength=16))
    assert outputs["sum"][0] == n / 2
    assert outputs["wide_sum"][0] == n / 4
    assert outputs["count"][0] == n
    assert outputs["extremes"].tolist() == [n - 1, 0]
    assert outputs["last"][0] == n - 1


@needs_cuda_headers
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packed_arithmetic(dtype, check):
    kind = np.dtype(np.float16)
    if dtype == "bfloat16":
        kind = np.dtype(pytest.importorskip("ml_dtypes", reason="ml_dtypes gives NumPy its bfloat16").bfloat16)
    rng = np.random.default_rng(4)
    a, b = (rng.standard_normal(500).astype(np.float32).astype(kind) for _ in range(2))
    out, total = np.zeros(500, kind), np.zeros(2, kind)
    kernel = build("packed.cu", check=check, USE_BF16=int(dtype == "bfloat16"))
    run(kernel, 4, 64, {"a": a, "b": b}, {"out": out, "sum": total}, (250,))
    difference = np.abs(a.astype(np.float32) - b.astype(np.float32)).astype(kind)
    expected = (difference.astype(np.float64) * 2 + b.astype(np.float64)).astype(kind)
    np.testing.assert_array_equal(out.astype(np.float32), expected.astype(np.float32))
    assert total.astype(np.float32).tolist() == [250, 500]


@pytest.mark.parametrize("check", [True, False])
def test_dynamic_shared_result(check):
    x = np.arange(200, dtype=np.float32)
    out = np.zeros_like(x)
    kernel = build("dynamic_shared.cu", check=check)
    run(kernel, 4, 50, {"x": x}, {"out": out}, shared_bytes=200)
    np.testing.assert_array_equal(out, x.reshape(4, 50)[:, ::-1].ravel())


@pytest.mark.parametrize("check", [True, False])
def test_async_copy_result(check):
    x = np.arange(640, dtype=np.float32).reshape(10, 64)
    out = np.zeros_like(x)
    run(build("async_copy.cu", check=check, MODE=0), 1, 64, {"x": x}, {"out": out}, (10,))
    np.testing.assert_array_equal(out, 2 * x[:, ::-1])


@pytest.mark.parametrize("check", [True, False])
def test_numbers(check):
    x = np.array([1.2e-38, 2.41e-38, 1.5, 0.7], np.float32)
    out, integers = np.full(13, 99, np.float32), np.zeros(10, np.uint32)
    run(build("numbers.cu", check=check), 1, 1, {"x": x}, {"out": out, "integers": integers})
    expected = [0, 0, 1, 0, 0.75, 0.75, 0, 0, 4, 2 / 3, 1.5]
    np.testing.assert_allclose(out[:11], expected, atol=3e-7, rtol=1e-6)
    fused = "-mfma" in toolchain.find_compiler().flags(check=check) or platform.machine() != "x86_64"
    assert (out[11] != 0) == fused
    assert out[12] == 0
    assert integers.tolist() == [
        1 + 255 + 1 + 2,
        0x01FF0102,
        8 + 31 + 4,
        0x80000000,
        0x07050301,
        3,
        2**31 - 1,
        0x3F800000,
        15,
        16 + 16 + 12 + 16 + 4,
    ]


def test_denormals_are_kept_outside_a_launch():
    """Flushing is per thread of the processor: Python's own must not see it."""
    test_numbers(False)
    assert np.float32(1.2e-38) * np.float32(0.5) != 0


def test_order_is_shuffled_by_seed():
    kernel = build("order.cu", check=False)

    def order(seed):
        out = np.zeros((2, 64), np.int32)
        run(kernel, 1, 64, {}, {"out": out}, seed=seed)
        return out

    assert sorted(order(5)[0]) == list(range(64))
    assert (order(5) == order(5)).all()
    assert (order(5) != order(6)).any(1).all()
    assert (order(5)[1] - 64 != order(5)[0]).any(), "each interval between barriers has its own order"


# ---- wrong kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("barrier", range(3))
def test_missing_barrier_is_found(barrier):
    """As a race; without the first one also as a read of what nobody has written yet."""
    source = without_barrier(barrier)
    for seed in SEEDS:
        with pytest.raises(EmulatorError) as caught:
            running_sum(source, check=True, seed=seed)
        message = str(caught.value)
        assert "shared tile[...], byte offset " in message
        place = r"running_sum\.cu:\d+"
        race = says(message, rf"race: (read|write) of .*{place}; no barrier is between\n.*{place}")
        assert race or (barrier == 0 and "uninitialised" in message), message


@pytest.mark.parametrize("barrier", range(3))
def test_missing_barrier_gives_wrong_numbers(barrier):
    source = without_barrier(barrier)
    wrong = 0
    for seed in SEEDS:
        out, expected = running_sum(source, check=False, seed=seed)
        wrong += not np.array_equal(out, expected)
    assert wrong == len(SEEDS)


def without_barrier(index):
    parts = text_of("running_sum.cu").split("__syncthreads();")
    assert len(parts) == 4
    return "__syncthreads();".join(parts[: index + 1]) + ";" + "__syncthreads();".join(parts[index + 1 :])


@pytest.mark.parametrize("check", [True, False])
def test_divergent_barrier_names_both_lines(check):
    message = failure(build("divergence.cu", check=check, MODE=0), 1, 64, {}, {"out": np.zeros(64, np.int32)})
    assert "divergent barrier" in message
    assert "10 threads (first: 0) in __syncthreads, divergence.cu:8" in message
    assert "54 threads (first: 10) in __syncthreads, divergence.cu:10" in message


def test_divergent_barrier_after_return():
    message = failure(build("divergence.cu", MODE=1), 1, 64, {}, {"out": np.zeros(64, np.int32)})
    assert "50 threads (first: 0) in __syncthreads, divergence.cu:14; 14 threads (first: 50) ended" in message


def test_divergent_shuffle():
    message = failure(build("divergence.cu", MODE=2), 1, 32, {}, {"out": np.zeros(32, np.int32)})
    assert "16 threads (first: 0) in __shfl_xor_sync, divergence.cu:17, mask 0xffffffff" in message
    assert "16 threads (first: 16) in __syncthreads, divergence.cu:18" in message


def test_shuffle_mask_without_caller():
    message = failure(build("divergence.cu", MODE=3), 1, 32, {}, {"out": np.zeros(32, np.int32)})
    assert says(message, r"divergence\.cu:21: __shfl_sync with mask 0x0000ffff, .* lane (1[6-9]|2\d|3[01])\n")


def test_shuffle_does_not_wait_for_ended_lanes():
    out = np.zeros(64, np.int32)
    run(build("divergence.cu", MODE=4), 1, 64, {}, {"out": out})
    np.testing.assert_array_equal(out[:48], np.arange(48) ^ 1)


@pytest.mark.parametrize("shift", [1, -1, 10**9])
def test_out_of_bounds_read(shift):
    inputs, outputs = vectors()
    message = failure(build("vector.cu", "add"), 8, 128, inputs, outputs, (1000, shift, 0))
    assert "out-of-bounds read of 4 bytes: " in message
    assert place("vector.cu", "args.a[i + args.read_shift] + args.b[i]") in message
    if shift == 1:
        assert "a[...], byte offset 4000 of 4000\n  at thread 103 of block 7," in message
    if shift == -1:
        assert "a[...], byte offset -4 of 4000\n  at thread 0 of block 0," in message
    if shift == 10**9:
        assert "in no memory that was handed to the kernel" in message


def test_out_of_bounds_write():
    inputs, outputs = vectors()
    message = failure(build("vector.cu", "add"), 8, 128, inputs, outputs, (1000, 0, 8))
    assert says(message, r"out-of-bounds write of 4 bytes: out[...], byte offset 40(0|1|2)\d of 4000")
    assert "of block 7" in message
    assert place("vector.cu", "args.out[i + args.write_shift] = x") in message


def test_write_to_read_only():
    inputs, _ = vectors()
    inputs["out"] = np.zeros(1000, np.float32)
    message = failure(build("vector.cu", "add"), 1, 1, inputs, {}, (1000, 0, 0))
    assert "write of 4 bytes to read-only memory: out[...], byte offset 0 of 4000\n  at thread 0 of block 0" in message


def test_regions_may_overlap():
    """Columns of one buffer, some given and some written: the bytes from first to last overlap."""
    inputs, outputs = vectors()
    memory = [Region(a.ctypes.data, a.nbytes, False, n) for n, a in {**inputs, **outputs}.items()]
    memory.append(Region(outputs["out"].ctypes.data + 4, 3996, True, "part"))
    arrays = [*inputs.values(), *outputs.values()]
    kernel = build("vector.cu", "add")
    args = struct.pack("@3Q3i0Q", *(a.ctypes.data for a in arrays), 999, 0, 1)
    kernel.launch(8, 128, args, memory=memory)
    np.testing.assert_array_equal(outputs["out"][1:], (inputs["a"] + inputs["b"])[:-1])
    args = struct.pack("@3Q3i0Q", *(a.ctypes.data for a in arrays), 1000, 0, 0)
    with pytest.raises(EmulatorError, match=r"read-only memory: out.*byte offset 0 of 4000"):
        kernel.launch(8, 128, args, memory=memory)


@pytest.mark.parametrize("shifts", [(1, 0), (0, 2)])
def test_misaligned_vector(shifts):
    if toolchain.find_compiler().is_clang:
        pytest.skip("Clang checks the 8-byte halves that it copies a float4 in, g++ all 16 bytes")
    inputs, outputs = vectors()
    message = failure(build("vector.cu", "add4"), 1, 1, inputs, outputs, (1000, *shifts))
    if shifts[0]:
        assert "misaligned read of 16 bytes: a[...], byte offset 4 of 4000" in message
        assert place("vector.cu", "args.a + i + args.read_shift);") in message
    else:
        assert "misaligned write of 16 bytes: out[...], byte offset 8 of 4000" in message


@pytest.mark.parametrize(
    ("mode", "what", "line"),
    [
        (0, r"uninitialised .* shared tile[...], byte offset 28 of 256\n  at thread 56", "tile[63 - t];"),
        (1, r"uninitialised .* shared scalar", "if (t == 0) result = scalar;"),
        (2, r"index 64 is outside the array of type 'float ?\[64\]'\n  at thread 63 ", "tile[t + 1] = t"),
        (3, r"out-of-bounds write of 4 bytes: ", "p[4096] = t"),
        (4, r"misaligned read of (16|8) bytes: shared tile[...], byte offset \d+ of 256", "->x;"),
        (5, r"race: .* shared scalar.*; no barrier|uninitialised.* shared scalar", "result = scalar;"),
        (6, r"race: write of shared scalar.*wrote", "scalar = 1.0f;"),
        (8, r"race: .* shared tile.*; no barrier|uninitialised.* shared tile", ""),
        (10, r"race: .* shared scalar.*; no barrier", ""),
    ],
)
def test_shared_memory_fault(mode, what, line):
    message = failure(build("shared_faults.cu", MODE=mode), 1, 64, {}, {"out": np.zeros(64, np.float32)})
    assert says(message, what), message
    branch = text_of("shared_faults.cu").partition(f"MODE == {mode} ")[2].partition("#e")[0]
    assert line in branch
    if line:
        number = (
            text_of("shared_faults.cu").partition(branch)[0].count("\n") + branch.partition(line)[0].count("\n") + 1
        )
        assert f"shared_faults.cu:{number}" in message


@pytest.mark.parametrize("mode", [7, 9, 11, 12])
def test_shared_memory_no_false_alarm(mode):
    for seed in SEEDS:
        run(build("shared_faults.cu", MODE=mode), 1, 64, {}, {"out": np.zeros(64, np.float32)}, seed=seed)


def test_race_names_both_parties():
    for seed in range(50):  # in some order the write comes first, in others the read, of nothing
        message = failure(build("shared_faults.cu", MODE=5), 1, 2, {}, {"out": np.zeros(64, np.float32)}, seed=seed)
        if "race" in message:
            break
    assert says(message, r"race: read of shared scalar.*, which thread 0 of block 0 wrote at shared_faults\.cu:25")
    assert message.endswith("at thread 1 of block 0, shared_faults.cu:26")


def test_dynamic_shared_too_small():
    x = np.arange(200, dtype=np.float32)
    kernel = build("dynamic_shared.cu")
    message = failure(kernel, 4, 50, {"x": x}, {"out": np.zeros_like(x)}, shared_bytes=196)
    assert says(message, r"out-of-bounds write of 4 bytes: shared (again|bytes)[...], byte offset 196")


def test_async_copy_without_wait():
    x = np.arange(640, dtype=np.float32).reshape(10, 64)
    message = failure(build("async_copy.cu", MODE=1), 1, 64, {"x": x}, {"out": np.zeros_like(x)}, (10,))
    assert "uninitialised shared memory: shared buffer" in message
    out = np.zeros_like(x)
    run(build("async_copy.cu", MODE=1, check=False), 1, 64, {"x": x}, {"out": out}, (10,))
    assert not np.array_equal(out, 2 * x[:, ::-1])


@pytest.mark.parametrize(
    ("mode", "what"),
    [
        (0, r"undefined\.cu:13: integer overflow in an addition in type 'int'\n  at thread ([1-9]|\d\d) of block 0"),
        (1, r"undefined\.cu:15: division by zero.*\n  at thread 3 "),
        (2, r"undefined\.cu:17: index \d+ is outside the array of type 'int ?\[4\]'"),
        (3, r"undefined\.cu:19: the assumption is false: t < 4"),
        (4, r"undefined\.cu:22: __trap\(\)\n  at thread 5 "),
        (5, r"undefined\.cu:24: assertion failed: args\.zero == 1\n  at thread 5 "),
        (6, r"out of local memory.*\n  at thread "),
        (7, r"out-of-bounds write of 4 bytes: address 0x10, in no memory"),
        (11, r"out-of-bounds read of 32 bytes: out[...], byte offset 240 of 256\n.*undefined.cu:4"),
        (12, r"out-of-bounds write of 20 bytes: out[...], byte offset 240 of 256\n.*undefined.cu:4"),
        (14, r"out-of-bounds write of \d+ bytes: out[...], byte offset 2[45]\d of 256\n  at thread 0"),
        (15, r"misaligned write of 4 bytes: out[...], byte offset 2 of 256\n  at thread 0"),
        (8, r"race: write of out[...], byte offset 0 of 256, which thread \d+ of block \d wrote"),
        (9, r"race: write of out[...], byte offset 0 .* thread 0 of block 0 wrote; nothing orders blocks"),
    ],
)
def test_undefined(mode, what):
    kernel = build("undefined.cu", MODE=mode)
    message = failure(kernel, 3, 32, {}, {"out": np.zeros(64, np.int32)}, (2**31 - 1, 0), workers=1)
    assert says(message, what), message


@pytest.mark.parametrize("check", [True, False])
def test_uninitialised_local_is_not_zero(check):
    """Fresh memory is zero, and a sum that starts there by chance would be right."""
    out = np.zeros(64, np.int32)
    compiler = toolchain.find_compiler()
    if not compiler.is_clang and compiler.major < 12:
        pytest.skip(f"{compiler.version} cannot fill local variables with a pattern")
    run(build("undefined.cu", check=check, MODE=13), 1, 32, {}, {"out": out}, (2**31 - 1, 0))
    assert (out[:32] != 3).all()


def test_uninitialised_shared_is_nan():
    """What an unchecked kernel sees where a checked one stops."""
    out = np.zeros(64, np.float32)
    run(build("shared_faults.cu", check=False, MODE=0), 1, 64, {}, {"out": out})
    assert np.flatnonzero(np.isnan(out)).tolist() == [56]


def test_unsigned_arithmetic_wraps():
    out = np.ones(64, np.int32)
    run(build("undefined.cu", MODE=10), 1, 32, {}, {"out": out}, (2**31 - 1, 0))
    assert not out[:32].any()


@pytest.mark.parametrize(
    ("mode", "what"), [(1, "division by zero"), (6, "out of local memory"), (7, r"unmapped address \(0x10\)")]
)
def test_unchecked_fault_does_not_end_the_process(mode, what):
    kernel = build("undefined.cu", check=False, MODE=mode)
    message = failure(kernel, 1, 32, {}, {"out": np.zeros(64, np.int32)}, (2**31 - 1, 0))
    assert says(message, what), message


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("mode", range(5))
def test_time_limit(mode, check):
    kernel = build("spin.cu", check=check, MODE=mode)
    start = time.monotonic()
    message = failure(kernel, 3, 64, {}, {"flag": np.zeros(1, np.int32)}, time_limit=0.2)
    assert time.monotonic() - start < 3
    assert "still running after the time limit of 0.2 s" in message
    if mode == 0:
        assert place("spin.cu", "while (x != 12345u)") in message


def test_time_limit_not_reached():
    inputs, outputs = vectors()
    run(build("vector.cu", "add"), 8, 128, inputs, outputs, (1000, 0, 0), time_limit=60.0)


def test_time_limit_between_blocks():
    """Blocks that each end at once, and too many of them."""
    inputs, outputs = vectors()
    kernel = build("vector.cu", "add", check=False)
    message = failure(kernel, 2**31 - 1, 1, inputs, outputs, (0, 0, 0), time_limit=0.1)
    assert "still running after the time limit of 0.1 s" in message


def test_interrupt_stops_a_kernel():
    """Ctrl-C during a launch raises KeyboardInterrupt, and the kernel is gone."""
    kernel = build("spin.cu", check=False, MODE=0)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            run(kernel, 2, 32, {}, {"flag": np.zeros(1, np.int32)}, time_limit=60.0)
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)


def test_usable_after_every_error():
    """Errors of all kinds one after another, on several OS threads, then a right kernel."""
    good = build("vector.cu", "add")
    for mode in (1, 6, 7):
        for check in (True, False):
            failure(build("undefined.cu", check=check, MODE=mode), 5, 32, {}, {"out": np.zeros(64, np.int32)}, (1, 0))
    for mode in (0, 3):
        failure(build("spin.cu", MODE=mode), 2, 32, {}, {"flag": np.zeros(1, np.int32)}, time_limit=0.05)
    for mode in (0, 1, 3):
        failure(build("divergence.cu", MODE=mode), 2, 64, {}, {"out": np.zeros(64, np.int32)})
    inputs, outputs = vectors()
    run(good, 8, 128, inputs, outputs, (1000, 0, 0))
    np.testing.assert_array_equal(outputs["out"], inputs["a"] + inputs["b"])


def test_signal_handlers_are_restored():
    """In a process of its own, where no launch has been before."""
    code = (
        "import ctypes\n"
        "def handlers():\n"
        "    actions = [ctypes.create_string_buffer(256) for _ in range(65)]\n"
        "    for number in range(1, 65): ctypes.CDLL(None).sigaction(number, None, actions[number])\n"
        "    return [action.raw[:8] for action in actions]\n"
        "before = handlers()\n"
        "t.test_vector_result('add', False)\n"
        "assert handlers() == before\n"
    )
    with python(code) as process:
        assert process.wait() == 0


def test_concurrent_launches():
    """Two Python threads, one of them with a kernel that fails."""
    good, bad = build("vector.cu", "add"), build("undefined.cu", check=False, MODE=7)
    problems = []

    def succeed():
        for _ in range(20):
            inputs, outputs = vectors()
            run(good, 8, 128, inputs, outputs, (1000, 0, 0))
            if not np.array_equal(outputs["out"], inputs["a"] + inputs["b"]):
                problems.append("wrong numbers")

    def fail():
        for _ in range(20):
            failure(bad, 4, 32, {}, {"out": np.zeros(64, np.int32)}, (1, 0))

    threads = [threading.Thread(target=f) for f in (succeed, fail, succeed)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not problems


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("slow_block", [0, 1])
def test_report_names_lowest_block(slow_block, workers):
    """Whichever block fails first, the error reported is that of the lowest one."""
    kernel = build("undefined.cu", MODE=16)
    message = failure(kernel, 3, 1, {}, {"out": np.zeros(64, np.int32)}, (1, slow_block), workers=workers)
    assert "out[...], byte offset 256 of 256\n  at thread 0 of block 0" in message


# ---- launching and compiling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"grid": 0}, "grid must be from 1"),
        ({"block": 1025}, "block must be from 1 to 1024, got 1025"),
        ({"args": b"1234"}, "its argument struct has 40 bytes, got 4"),
        ({"shared_bytes": 10**6}, "shared_bytes must be from 0 to 232448"),
    ],
)
def test_launch_arguments(change, what):
    options = {"grid": 1, "block": 32, "args": bytes(40), "shared_bytes": 0} | change
    with pytest.raises(EmulatorError, match=what):
        build("vector.cu", "add").launch(**options, memory=[])


def test_compile_error_shows_line_and_options():
    with pytest.raises(EmulatorCompileError) as caught:
        build("broken.cu", BLOCK=7)
    message = str(caught.value)
    assert message.startswith("kernel 'broken' does not compile: broken.cu:5:")
    assert "args.out[threadIdx.x] = no_such_name;" in message, "the compiler quotes the line"
    assert "-DBLOCK=7" in message and "-std=c++17" in message


def test_too_much_static_shared_memory():
    with pytest.raises(EmulatorCompileError, match="has 49156 bytes of static shared memory, CUDA allows 49152"):
        build("too_much_shared.cu")


def test_entry_of_another_form():
    with pytest.raises(EmulatorCompileError, match="the entry must be"):
        build("two_arguments.cu")


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(EmulatorCompileError, match=r"CXX=/nonexistent, which does not exist\. Install one .*apt"):
        build("vector.cu", "add")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EmulatorCompileError, match=r"none of g\+\+, clang\+\+ and c\+\+ on PATH\. Install one"):
        build("vector.cu", "add")


def test_no_cuda_headers(monkeypatch):
    monkeypatch.setattr(toolchain, "cuda_include_dirs", list)
    with pytest.raises(EmulatorCompileError, match=r"'packed' includes cuda_fp16\.h, .* pip install nvidia-cuda-"):
        build("packed.cu", USE_BF16=0)
    inputs, outputs = vectors()
    run(build("vector.cu", "add"), 8, 128, inputs, outputs, (1000, 0, 0))


@pytest.fixture
def new_cache(monkeypatch, tmp_path):
    """A cache with nothing but the engine, which takes long to build."""
    engine = toolchain.build_engine(toolchain.find_compiler())
    (tmp_path / "emulator").mkdir()
    shutil.copy(engine, tmp_path / "emulator")
    monkeypatch.setenv("L1ATTN_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_cache(new_cache):
    """The second time costs no compilation; another macro, another file."""
    tmp_path = new_cache
    first = build("divergence.cu", MODE=4).library
    assert first.parent == tmp_path / "emulator"
    made = first.stat().st_mtime_ns
    assert build("divergence.cu", MODE=4).library == first
    assert first.stat().st_mtime_ns == made
    assert build("divergence.cu", MODE=0).library != first
    assert build("divergence.cu", MODE=4, check=False).library != first
    assert not list(tmp_path.rglob(".build-*"))


def test_cache_folder_not_writable(monkeypatch, tmp_path):
    shutil.copy(toolchain.build_engine(toolchain.find_compiler()), toolchain._temporary_cache("emulator"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("L1ATTN_CACHE_DIR", str(blocked))
    assert build("divergence.cu", MODE=4).library.is_file()


def test_check_from_environment(monkeypatch):
    monkeypatch.setenv("L1ATTN_EMULATOR_CHECK", "0")
    assert not build("vector.cu", "add", check=None).check
    monkeypatch.delenv("L1ATTN_EMULATOR_CHECK")
    assert build("vector.cu", "add", check=None).check


def test_parallel_processes_share_a_cache(new_cache):
    """Several processes that build the same kernel at the same time all get a whole one."""
    processes = [python("t.test_vector_result('add', True)") for _ in range(3)]
    assert [p.wait() for p in processes] == [0] * 3
    assert len(list(new_cache.rglob("*"))) == 3, "the folder, the engine, and one kernel"
