"""Kernel files: the header that describes a variant, which variant a call gets, and folders of one's own."""

from __future__ import annotations

import os
import re
import shutil

import numpy as np
import pytest
from cases import assert_identical

import l1attn_cupy as l1
from l1attn_cupy.cuda import registry
from l1attn_cupy.cuda.registry import KernelError
from l1attn_cupy.emulator.engine import EmulatorCompileError

PACKAGED = sorted(registry.packaged_folder().glob("*.cu"))
GATHER = registry.packaged_folder() / "scores_forward_gather.cu"
GOOD = "op=scores_forward dtypes=f32 BLOCK_Q=1 BLOCK_K=32 THREADS=256"

QUERY, KEY = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((5, 7), (9, 7)))


def emulate(variant=None):
    return l1.l1_scores(QUERY, KEY, backend="emulator", variant=variant)


# ---- the @variant line --------------------------------------------------------------------------------------------


def test_header_is_read(folder):
    line = (
        "// @variant op=scores_backward dtypes=f16,f64 BLOCK_X=4 BLOCK_E=8 THREADS=32 rank=7 min_k=2 max_e=64 DEPTH=3"
    )
    (folder / "scores_backward_mine.cu").write_text(f"// mine\n\n{line}\n")
    variant = next(v for v in registry.variants("scores_backward") if v.name == "mine")
    assert (variant.op, variant.line, variant.rank) == ("scores_backward", 3, 7)
    assert variant.path == folder / "scores_backward_mine.cu"
    assert variant.dtypes == ("float16", "float64")
    assert variant.parameters == {"BLOCK_X": 4, "BLOCK_E": 8, "THREADS": 32, "DEPTH": 3}
    assert variant.limits == {"min_k": 2, "max_e": 64}
    assert variant.fits("float16", {"q": 1, "k": 2, "e": 64})
    assert not variant.fits("float32", {"q": 1, "k": 2, "e": 64})
    assert not variant.fits("float16", {"q": 1, "k": 1, "e": 64})
    assert not variant.fits("float16", {"q": 1, "k": 2, "e": 65})


OPS = ", ".join(registry.OPS)
BAD_LINES = {
    "unknown key": (f"{GOOD} speed=9", "unknown key speed; known are op, dtypes, rank, min_q"),
    "a number that is none": (f"{GOOD} BLOCK_E=many", "BLOCK_E must be a whole number, got 'many'"),
    "negative number": (f"{GOOD} rank=-1", "rank must be a whole number, got '-1'"),
    "no number": (f"{GOOD} BLOCK_E=", "BLOCK_E must be a whole number, got ''"),
    "no equals sign": (f"{GOOD} fast", "@variant is followed by KEY=VALUE pairs, got 'fast'"),
    "wrong op": (
        GOOD.replace("forward", "sideways"),
        f"op must be one of {OPS}, got scores_s",
    ),
    "no op": (
        GOOD.partition(" ")[2],
        f"op must be one of {OPS}, got None",
    ),
    "op of another file": (
        "op=scores_backward dtypes=f32 BLOCK_X=1 BLOCK_E=1 THREADS=32",
        "the file of a variant of scores_backward must be named scores_backward_NAME.cu, got scores_forward_bad.cu",
    ),
    "unknown dtype": (GOOD.replace("f32", "f32,f8"), "dtypes must be a list from f32,f16,bf16,f64, got f32,f8"),
    "dtype of another op": (GOOD.replace("f32", "f32,i8"), "dtypes must be a list from f32,f16,bf16,f64, got f32,i8"),
    "no dtypes": (GOOD.replace("dtypes=f32 ", ""), "dtypes must be a list from f32,f16,bf16,f64, got None"),
    "no block size": (
        GOOD.replace("BLOCK_K=32 ", ""),
        "scores_forward needs ['BLOCK_K', 'BLOCK_Q', 'THREADS'], got ['BLOCK_Q', 'THREADS']",
    ),
    "no number of threads": (GOOD.replace("THREADS=256", ""), "scores_forward needs ['BLOCK_K', 'BLOCK_Q', 'THREADS']"),
}


@pytest.mark.parametrize("fault", BAD_LINES)
def test_header_error_names_file_and_line(folder, fault):
    """It is raised by the next call that looks for a kernel, whatever that asks for."""
    line, message = BAD_LINES[fault]
    (folder / "scores_forward_bad.cu").write_text(f"// first line\n// @variant {line}\n")
    with pytest.raises(KernelError) as caught:
        emulate("gather")
    assert str(caught.value).startswith(f"{folder / 'scores_forward_bad.cu'}:2: {message}")


def test_header_error_no_variant_line(folder):
    (folder / "scores_forward_bad.cu").write_text("// variant op=scores_forward\n")
    with pytest.raises(KernelError, match=r"scores_forward_bad\.cu:1: no '// @variant op=\.\.\. dtypes=\.\.\."):
        emulate()


def test_header_error_is_gone_once_mended(folder):
    file = folder / "scores_forward_bad.cu"
    file.write_text("// nothing\n")
    with pytest.raises(KernelError):
        emulate()
    file.unlink()
    assert_identical(emulate(), l1.l1_scores(QUERY, KEY, backend="emulator", variant="tiled"))


def test_kernels_folder_that_is_not_there(folder, monkeypatch):
    monkeypatch.setenv("L1ATTN_KERNELS", str(folder / "typo"))
    with pytest.raises(KernelError, match=r"L1ATTN_KERNELS must name a folder, got '.*typo'"):
        emulate()


def test_kernels_folder_that_is_gone(folder):
    """After it was used."""
    own = folder / "kernels"
    own.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L1ATTN_KERNELS", str(own))
        emulate()
        shutil.rmtree(own)
        with pytest.raises(KernelError, match="L1ATTN_KERNELS must name a folder"):
            emulate()


# ---- the packaged files -------------------------------------------------------------------------------------------

PARTS = ["Computes", "Shapes", "Tiling", "Cost", "Delta", "@variant"]


def header_of(path):
    """Its lines, without the slashes."""
    lines = path.read_text().splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("//"))
    return [line.removeprefix("//") for line in lines[:count]]


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.name)
def test_packaged_header_has_every_part(path):
    """What it is, formula, shapes, tiling, cost, how it differs from another, variants: in this order."""
    header = header_of(path)
    assert re.match(rf" {re.escape(path.name)}: [A-Za-z].*\.$", header[0])
    found = [line.split()[0] for line in header if line.startswith(" ") and line.split() and line.split()[0] in PARTS]
    assert list(dict.fromkeys(found)) == PARTS


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.name)
def test_packaged_header_names_real_macros(path):
    """Every name in capitals in the header is in the code, and so is every parameter of the @variant lines."""
    text = path.read_text()
    code = re.sub(r"//[^\n]*", "", text + (path.parent / "common.cuh").read_text())
    prose = "\n".join(line for line in header_of(path) if "@variant" not in line)
    named = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", prose))
    assert named, "the tiling is told in terms of the parameters"
    parameters = {key for variant in registry.variants() if variant.path == path for key in variant.parameters}
    assert parameters
    for name in named | parameters:
        assert re.search(rf"\b{name}\b", code), f"{name} is not in the code of {path.name}"


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.name)
def test_packaged_parameters_are_checked_with_a_reason(path):
    """``static_assert`` each constraint, and say why; each barrier says what it waits for."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if "static_assert" in line:
            assert re.search(r'static_assert\(.+, ".{10,}"\);', line), f"{path.name}:{number}: no reason"
        if "__syncthreads" in line:
            assert re.search(r"; +// .{10,}|\{ +// .{10,}", line), f"{path.name}:{number}: no reason"


def test_packaged_variants_fit_every_call():
    """Without ``variant=`` there is a kernel for all dtypes and sizes."""
    for op in registry.OPS:
        for dtype in registry.dtypes_of(op).values():
            for size in (0, 1, 64, 65, 2**20):
                assert registry.choose(op, dtype, {"q": size, "k": size, "e": size, "v": size}, None).rank > 0


def test_variants_are_listed():
    """With where each comes from, the preferred one first."""
    listed = l1.variants("scores_forward")
    assert {variant.name for variant in listed} == {"tiled", "gather", "half2"}
    assert [variant.rank for variant in listed] == sorted((variant.rank for variant in listed), reverse=True)
    assert all(variant.path.is_file() for variant in listed)
    assert set(l1.variants()) == {variant for op in registry.OPS for variant in l1.variants(op)}
    with pytest.raises(
        ValueError, match=r"op must be None or one of 'scores_forward', 'scores_backward', .*, got 'forward'"
    ):
        l1.variants("forward")


# ---- choosing -----------------------------------------------------------------------------------------------------


def test_variant_unknown():
    with pytest.raises(
        ValueError, match="variant must be None or one of 'gather', 'half2', 'tiled' for scores_forward"
    ):
        emulate("fast")
    with pytest.raises(ValueError, match="one of 'gather', 'scatter', 'tiled' for scores_backward, got 'half2'"):
        l1.l1_scores_backward(np.ones((5, 9), np.float32), QUERY, KEY, backend="emulator", variant="half2")


def test_variant_of_other_dtypes():
    with pytest.raises(ValueError) as caught:
        emulate("half2")
    assert "takes float32 with L=5, S=9, E=7 for scores_forward, got 'half2'" in str(caught.value)
    assert "half2: float16" in str(caught.value)


def test_variant_of_other_sizes(folder):
    (folder / "scores_forward_short.cu").write_text(f"// @variant {GOOD} max_k=8 min_e=8\n")
    with pytest.raises(ValueError, match=re.escape("short: float32 {'max_k': 8, 'min_e': 8}")):
        emulate("short")


# ---- one's own folder ---------------------------------------------------------------------------------------------


def copy(folder, name, *changes, file=GATHER):
    """A kernel under another name, with pieces of its text replaced."""
    text = file.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / name).write_text(text)


TIMES_TWO = ("to_scalar(result[0])", "to_scalar(2 * result[0])")
TIMES_THREE = ("to_scalar(result[0])", "to_scalar(3 * result[0])")


def test_own_folder_adds_a_variant(folder):
    """By name, and by default where its rank is the highest."""
    expected = emulate("gather")
    copy(folder, "scores_forward_mine.cu", TIMES_TWO, ("rank=1", "rank=99"))
    assert_identical(emulate("mine"), 2 * expected)
    assert_identical(emulate(), 2 * expected)
    assert_identical(emulate("gather"), expected)
    assert l1.variants("scores_forward")[0].path == folder / "scores_forward_mine.cu"


def test_own_folder_replaces_a_file(folder):
    expected = emulate("gather")
    copy(folder, GATHER.name, TIMES_TWO)
    assert_identical(emulate("gather"), 2 * expected)
    (folder / GATHER.name).unlink()
    assert_identical(emulate("gather"), expected)


def test_own_folder_replaces_common_code(folder):
    """Also for the packaged kernels."""
    expected = emulate("gather")
    change = ("to_scalar(acc_t x) { return x; }", "to_scalar(acc_t x) { return 2 * x; }")
    copy(folder, "common.cuh", change, file=registry.packaged_folder() / "common.cuh")
    assert_identical(emulate("gather"), 2 * expected)


def test_generation_changes_with_what_an_op_depends_on(folder):
    """Files of other ops are not looked at in each call; headers, tuning files, and a change of names are."""
    (folder / "tuning").mkdir()
    shared, own, other = ("common.cuh", "tuning/mine.json"), "scores_forward_mine.cu", "scores_backward_mine.cu"
    files = {name: folder / name for name in (*shared, own, other)}
    for file in files.values():
        file.write_text("")

    def changes(file):
        ops = ("", "scores_forward", "scores_backward")
        before = [registry.generation(op) for op in ops]
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
        return [op for op, number in zip(ops, before, strict=True) if registry.generation(op) != number]

    assert changes(files[own]) == ["", "scores_forward"]
    assert changes(files[other]) == ["", "scores_backward"]
    for path in (*(files[name] for name in shared), folder, folder / "tuning"):
        assert changes(path) == ["", "scores_forward", "scores_backward"]


def test_edited_file_is_used_by_the_next_call(folder):
    """No rebuild, no restart; the variant's parameters are read again, too."""
    expected = emulate("gather")
    name = "scores_forward_mine.cu"
    copy(folder, name, TIMES_TWO)
    assert_identical(emulate("mine"), 2 * expected)
    copy(folder, name, TIMES_THREE)
    assert_identical(emulate("mine"), 3 * expected)
    copy(folder, name, TIMES_THREE, ("THREADS=256", "THREADS=64"))
    assert_identical(emulate("mine"), 3 * expected)
    assert registry.choose("scores_forward", "float32", {"q": 5, "k": 9, "e": 7}, "mine").parameters["THREADS"] == 64


def test_compile_error_shows_file_and_line_as_written(folder):
    copy(folder, "scores_forward_mine.cu", ("acc_t sum = 0;", "acc_t sum = zero;"))
    line = GATHER.read_text().partition("acc_t sum = 0;")[0].count("\n") + 1
    with pytest.raises(EmulatorCompileError, match=rf"{folder}/scores_forward_mine\.cu:{line}:\d+: error: .*zero"):
        emulate("mine")


def test_compile_error_of_a_broken_constraint_shows_its_reason(folder):
    """A parameter that the kernel does not take."""
    copy(folder, "scores_forward_mine.cu", ("BLOCK_K=32 THREADS=256", "BLOCK_K=32 THREADS=48"))
    with pytest.raises(EmulatorCompileError, match="whole warps, for the shuffles"):
        emulate("mine")
