"""`lab list`, `new`, `tune` and `report`: what they print and write, on a machine without a GPU."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
from child import ROOT, start
from lab_cases import GATHER, damaged, lab

import l1attn_cupy as l1
from l1attn_cupy.cuda import machine_code, occupancy, registry, tuning
from l1attn_cupy.cuda.machine_code import Resources
from l1attn_cupy.lab import costs, tune
from l1attn_cupy.lab.shapes import Shape

needs_tools = pytest.mark.skipif(bool(machine_code.missing()), reason=machine_code.missing() or "-")
NAME = "scores_forward_mine.cu"


@pytest.fixture
def no_tools(monkeypatch):
    """A machine where nothing can be disassembled."""

    def missing(*_arguments):
        raise machine_code.ToolMissing("ptxas is not installed: pip install nvidia-cuda-nvcc")

    monkeypatch.setattr(machine_code, "_tool", missing)
    costs._tools.cache_clear()
    yield
    costs._tools.cache_clear()


# ---- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "list", "new", "try", "tune", "report"])
def test_lab_help(capsys, command):
    status, text = lab(capsys, *filter(None, [command]), "--help")
    assert status == 0
    assert "usage: python -m l1attn_cupy.lab" in text


def test_lab_script_and_module_are_the_same():
    """`scripts/lab.py` is the module's command line, for those who work in the source tree."""
    module = start(
        "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('l1attn_cupy.lab', run_name='__main__')"
    )
    script = start(
        "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_path('scripts/lab.py', run_name='__main__')"
    )
    assert module.returncode == script.returncode == 0
    assert module.stdout == script.stdout


def test_lab_says_what_to_install():
    code = "import sys; sys.modules['rich'] = None; from l1attn_cupy.lab.__main__ import main; sys.exit(main(['list']))"
    done = start(code)
    assert done.returncode == 2
    assert done.stderr == 'the lab needs rich: pip install "l1attn_cupy[lab]"\n'


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["list", "sideways"], "OP must be one of scores_forward, scores_backward.*, got sideways"),
        (["list", "--dtype", "f8"], "--dtype must be one of f32, f16, bf16, f64, i8, u8, got f8"),
        (["list", "--shape", "8x0x8x8"], "a shape must be BxLxSxE, such as 8x1024x1024x64, got '8x0x8x8'"),
        (["list", "--arch", "999"], "--arch must be one of 75, .*, got 999"),
        (["tune", "sideways", "--shapes", "1x1x1x1"], "OP must be one of"),
        (
            ["report", "scores_forward", "--output", "no/where.png"],
            "--output must lie in a folder that exists, got no/wh",
        ),
        (["report", "scores_forward", "--output", "page.pdf"], "--output must end in .html or .png, got page.pdf"),
        (
            ["report", "scores_forward", "--bench", "nowhere.json"],
            "--bench must be a file that scripts/bench.py --json",
        ),
    ],
)
def test_lab_bad_arguments(capsys, folder, arguments, message):
    status, text = lab(capsys, *arguments)
    assert status == 2
    assert re.search(message, text), text
    assert "Traceback" not in text


def test_lab_bad_header_elsewhere(capsys, folder):
    """Whatever the command, the file that is wrong is named."""
    file = damaged(folder, NAME, ("rank=0", "speed=9"))
    for arguments in (["list"], ["new", "other", "--from", "scores_forward_gather"]):
        status, text = lab(capsys, *arguments)
        assert status == 2
        assert f"error: {file}:7: unknown key speed" in text


# ---- new ----------------------------------------------------------------------------------------------------------


def test_new_copies_with_a_header_to_edit(capsys, tmp_path, monkeypatch):
    """It makes the folder, names the file, and the copy can be used at once, by name only."""
    monkeypatch.setenv("L1ATTN_KERNELS", str(tmp_path / "mine"))
    status, text = lab(capsys, "new", "pairs", "--from", "scores_forward_gather")
    file = tmp_path / "mine" / "scores_forward_pairs.cu"
    assert status == 0, text
    assert str(file) in text
    made, origin = file.read_text(), GATHER.read_text()
    assert made.splitlines()[0] == "// scores_forward_pairs.cu: L1 scores, forward; (say here what it is good for)."
    assert "// Delta     like scores_forward_gather.cu, but (say here what is different)\n// @variant" in made
    assert "rank=0" in made
    assert made.partition("\n\n")[2] == origin.partition("\n\n")[2]  # all code
    query = np.random.default_rng(0).standard_normal((5, 7), np.float32)
    results = [l1.l1_scores(query, query, backend="emulator", variant=name) for name in ("pairs", "gather")]
    assert np.array_equal(*results)


@pytest.mark.parametrize("file", sorted(registry.packaged_folder().glob("*.cu")), ids=lambda file: file.stem)
def test_new_copies_every_variant(capsys, folder, file):
    """Its header has every part once, and every @variant line of the origin."""
    status, text = lab(capsys, "new", "mine", "--from", file.stem)
    assert status == 0, text
    (made,) = folder.glob("*.cu")
    header = made.read_text().partition("\n\n")[0]
    for part in ("Computes", "Shapes", "Tiling", "Cost", "Delta"):
        assert len(re.findall(rf"^// {part} ", header, re.MULTILINE)) == 1, part
    lines = [(v.dtypes, v.parameters, v.limits, v.choices) for v in registry.read(made)]
    assert lines == [(v.dtypes, v.parameters, v.limits, v.choices) for v in registry.read(file)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["tiled", "--from", "scores_forward_gather"],
            r"NAME must be new: .*scores_forward_tiled\.cu:\d+ is the variant",
        ),
        (["Big", "--from", "scores_forward_gather"], "NAME must be lower-case letters, digits and _"),
        (["mine", "--from", "nothing"], "--from must be one of .*, scores_backward_tiled, .*, got nothing"),
        (
            ["mine", "--from", "gather"],
            "gather is a variant of several ops: say .*scores_backward_gather or scores_forward_g",
        ),
    ],
)
def test_new_bad_arguments(capsys, folder, arguments, message):
    status, text = lab(capsys, "new", *arguments)
    assert status == 2
    assert re.search(message, text), text
    assert not list(folder.iterdir())


def test_new_twice(capsys, folder):
    """A duplicate name: the file that has it is named, with its line, and stays as it is."""
    assert lab(capsys, "new", "mine", "--from", "scores_forward_gather")[0] == 0
    (folder / NAME).write_text((folder / NAME).read_text() + "// edited\n")
    status, text = lab(capsys, "new", "mine", "--from", "scores_forward_tiled")
    assert status == 2
    assert f"NAME must be new: {folder / NAME}:7 is the variant 'mine' of scores_forward already" in text
    assert (folder / NAME).read_text().endswith("// edited\n")


def test_new_without_a_folder(capsys, monkeypatch):
    monkeypatch.delenv("L1ATTN_KERNELS", raising=False)
    status, text = lab(capsys, "new", "mine", "--from", "scores_forward_gather")
    assert status == 2
    assert "say where: export L1ATTN_KERNELS=$PWD/my_kernels" in text


# ---- list ---------------------------------------------------------------------------------------------------------


@needs_tools
def test_list_has_every_variant(capsys, folder):
    damaged(folder, NAME)
    status, text = lab(capsys, "list")
    assert status == 0, text
    for variant in registry.variants():
        row = next(line for line in text.splitlines() if line.startswith(f"{variant.path.name}:{variant.line} "))
        ptx = machine_code.compile_ptx(variant, variant.dtypes[0])
        resources = machine_code.assemble(ptx, shared=variant.shared)[1]
        words = row.split()
        chosen = {f"{key}={value}" for key, value in variant.parameters.items() if key not in variant.choices}
        below = [line for line in text.splitlines() if re.match(rf"{variant.name}:{variant.line} ", line)]
        assert any(chosen <= set(line.split()) for line in below)
        assert words[-4:-1] == [str(variant.rank), str(resources.registers), str(resources.shared)]
        assert words[-1].endswith("%")


@needs_tools
def test_list_says_which_variant_a_call_gets_and_why(capsys, folder):
    """The one that a call does get: by dtype, by its sizes, by rank, by tuning."""
    damaged(folder, NAME, ("rank=0", "rank=99 max_k=64"), ("BLOCK_K=32", "BLOCK_K=32,64"), dtypes="f64")
    for shape, dtype in (
        ("2x33x33x16", "f64"),
        ("2x33x65x16", "f64"),
        ("2x33x33x16", "f32"),
        ("8x1024x1024x64", "f16"),
    ):
        status, text = lab(capsys, "list", "scores_forward", "--shape", shape, "--dtype", dtype)
        sizes = dict(zip("qke", map(int, shape.split("x")[1:]), strict=True))
        chosen = registry.choose("scores_forward", registry.DTYPES[dtype], sizes, None)
        assert status == 0
        assert re.search(rf"{shape} float\d\d: {chosen.name} \({chosen.path.name}:{chosen.line}\)", text), text
        fitting = [v for v in registry.variants("scores_forward") if v.fits(registry.DTYPES[dtype], sizes)]
        others = ", ".join(f"{v.name}:{v.line} ({v.rank})" for v in fitting[1:])
        assert f"of {len(fitting)} lines that take it rank {chosen.rank} is the highest; then {others}" in text
    status, text = lab(capsys, "list", "scores_forward", "--shape", "2x33x33x16", "--dtype", "f64")
    assert "elsewhere BLOCK_K=32, the first of each list" in text


def test_list_without_tools(capsys, folder, no_tools):
    """What files say is there all the same, and what to install for the rest."""
    status, text = lab(capsys, "list", "scores_forward")
    assert status == 0, text
    assert re.search(r"^scores_forward_gather\.cu:7 .* - +- +- *$", text, re.MULTILINE)
    assert "no registers, shared memory and occupancy: ptxas is not installed" in text


# ---- occupancy and costs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "resources, threads, arch, blocks, limit",
    [
        (Resources(32, 0, 0, 128), 256, "90", 8, "threads"),
        (Resources(168, 0, 0, 25600), 128, "90", 3, "registers"),
        (Resources(32, 0, 0, 47 << 10), 128, "90", 4, "shared memory"),
        (Resources(32, 0, 0, 47 << 10), 128, "86", 2, "shared memory"),
        (Resources(16, 0, 0, 0), 32, "90", 32, "blocks"),
        (Resources(255, 0, 0, 0), 1024, "90", 0, "registers"),
        (Resources(32, 0, 0, 60 << 10), 128, "90", 3, "shared memory"),
        (Resources(32, 0, 0, 64 << 10), 128, "75", 1, "shared memory"),
        (Resources(32, 0, 0, 100 << 10), 128, "86", 0, "102400 bytes of shared memory a block, at most 101376"),
        (Resources(32, 0, 0, 0), 2048, "90", 0, "2048 threads a block, at most 1024"),
    ],
)
def test_occupancy(resources, threads, arch, blocks, limit):
    """Worked out by hand from the tables of the CUDA programming guide."""
    found = occupancy.occupancy(resources, threads, arch)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == blocks * threads / occupancy.MULTIPROCESSORS[arch].threads


def test_occupancy_unknown_architecture():
    with pytest.raises(ValueError, match=r"arch must be one of 75, 80, .*, got '30'"):
        occupancy.occupancy(Resources(32, 0, 0, 0), 128, "30")


@needs_tools
def test_costs_are_kept_until_the_file_changes(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("L1ATTN_CACHE_DIR", str(tmp_path / "cache"))
    file = damaged(folder, NAME)
    first = costs.costs(registry.read(file)[0], "float32")
    with monkeypatch.context() as patch:
        patch.setattr(machine_code, "compile_ptx", None)
        assert costs.costs(registry.read(file)[0], "float32") == first
    more = "const int lane = threadIdx.x & 31; __shared__ int more[64]; more[lane] = lane; if (more[lane] > 99) return;"
    damaged(folder, NAME, ("const int lane = threadIdx.x % 32;", more))
    assert costs.costs(registry.read(file)[0], "float32").resources.shared == first.resources.shared + 256


# ---- tune ---------------------------------------------------------------------------------------------------------

SHAPE = "8x1024x1024x64"


@needs_tools
def test_tune_writes_what_the_next_call_uses(capsys, folder, monkeypatch):
    """What does not compile is left out with the reason, the rest ranked, and a call gets the winner."""
    loop = "for (int e = lane; e < p.channels; e += 32) sum += absolute(to_acc(q[e]) - to_acc(row[e]));"
    damaged(
        folder,
        NAME,
        ("BLOCK_K=32", "BLOCK_K=32 UNROLL=1,4,0"),
        (loop, f"#pragma unroll UNROLL\n{loop}"),
        ("static_assert(BLOCK_Q == 1,", 'static_assert(UNROLL > 0, "a loop has turns");\nstatic_assert(BLOCK_Q == 1,'),
    )
    status, text = lab(capsys, "tune", "scores_forward", "--variant", "mine", "--shapes", SHAPE)
    assert status == 0, text
    assert "there is no GPU: ranked by machine code, the winner is checked by emulation" in text
    assert re.search(r"^1 +UNROLL=4 .* best *$", text, re.MULTILINE), text
    assert re.search(r"^2 +UNROLL=1 .* default *$", text, re.MULTILINE), text
    assert re.search(r"^- +UNROLL=0 .*does not compile: a loop has turns", text, re.MULTILINE), text
    (written,) = tuning.read(folder / "tuning" / "sm-90.json")
    assert (written.device, written.by, written.parameters) == ("sm_90", "machine code", {"UNROLL": 4})
    sizes = {"q": 1024, "k": 1000, "e": 33}
    variant = registry.choose("scores_forward", "float32", sizes, "mine")
    assert tuning.tuned(variant, "float32", sizes, ("NVIDIA H200", "sm_90")).parameters["UNROLL"] == 4
    assert lab(capsys, "list", "scores_forward", "--shape", SHAPE)[0] == 0


@needs_tools
def test_tune_leaves_out_what_is_wrong(capsys, folder):
    """The best by machine code is not the winner if emulation finds it wrong."""
    damaged(folder, NAME, ("BLOCK_K=32", "BLOCK_K=32 SKIP=2,1"), ("e += 32)", "e += 32 * SKIP)"))
    file = folder / "elsewhere.json"
    status, text = lab(capsys, "tune", "scores_forward", "--variant", "mine", "--shapes", SHAPE, "--output", file)
    assert status == 0, text
    assert tuning.read(file)[0].parameters == {"SKIP": 1}
    assert re.search(r"^- +SKIP=2 .*wrong: scores\[0, 0, 0\] must be .* default", text, re.MULTILINE), text
    assert f"which calls read once it lies in {folder / 'tuning'}" in text


@needs_tools
def test_tune_no_winner(capsys, folder):
    """Nothing is written, and the exit status says so."""
    damaged(folder, NAME, ("BLOCK_K=32", "BLOCK_K=32 SKIP=2,3"), ("e += 32)", "e += 32 * SKIP)"))
    status, text = lab(capsys, "tune", "scores_forward", "--variant", "mine", "--shapes", SHAPE)
    assert status == 1
    assert "no winner for 1 of 1 shapes and dtypes" in text
    assert len(re.findall(r"^- +SKIP=\d .*wrong: scores\[0, 0, 0\] must be", text, re.MULTILINE)) == 2, text
    assert not (folder / "tuning").exists()


@needs_tools
def test_tune_spills_and_what_does_not_fit():
    variant = next(v for v in registry.variants("scores_forward") if v.name == "tiled" and v.choices)
    spilling = tune.weigh(variant, {"BLOCKS_PER_SM": 8}, "float32", Shape(8, 1024, 1024, 64), "90")
    assert re.fullmatch(r"spills \d+ bytes", spilling.why_not)


@needs_tools
def test_tune_takes_the_dtypes_with_lists(capsys, folder):
    """Unless one is asked for that has none."""
    line = "op=scores_forward BLOCK_Q=1 THREADS=256 rank=0"
    file = damaged(folder, NAME, ("BLOCK_K=32", "BLOCK_K=32,64"))
    file.write_text(f"// @variant {line} dtypes=f64 BLOCK_K=32\n{file.read_text()}")
    status, text = lab(capsys, "tune", "scores_forward", "--variant", "mine", "--shapes", SHAPE)
    assert status == 0, text
    assert [entry.dtype for entry in tuning.read(folder / "tuning" / "sm-90.json")] == ["float32"]
    status, text = lab(capsys, "tune", "scores_forward", "--variant", "mine", "--shapes", SHAPE, "--dtype", "f64")
    assert status == 2
    assert f"{file}:1: there is nothing to tune" in text


@pytest.mark.parametrize(
    "shapes, message",
    [
        ([SHAPE], r"scores_forward_mine\.cu:7: there is nothing to tune, no parameter lists values"),
        (["8x1"], "a shape must be BxLxSxE"),
    ],
)
def test_tune_bad_arguments(capsys, folder, shapes, message):
    damaged(folder, NAME)
    status, text = lab(capsys, "tune", "scores_forward", "--variant", "mine", "--shapes", *shapes)
    assert status == 2
    assert re.search(message, text), text


def test_tune_shapes_of_one_class(capsys, folder):
    """The later would undo the earlier."""
    damaged(folder, NAME, ("BLOCK_K=32", "BLOCK_K=32,64"))
    shapes = [SHAPE, "8x1000x1000x64"]
    status, text = lab(capsys, "tune", "scores_forward", "--variant", "mine", "--shapes", *shapes)
    assert status == 2
    assert f"{shapes[0]} and {shapes[1]} are both L<=1024 S<=1024 E<=64" in text


def test_tune_bad_tuning_file(capsys, folder):
    """Found before the work begins."""
    damaged(folder, NAME, ("BLOCK_K=32", "BLOCK_K=32,64"))
    (folder / "mine.json").write_text("[7]\n")
    arguments = ["--variant", "mine", "--shapes", SHAPE, "--output", folder / "mine.json"]
    status, text = lab(capsys, "tune", "scores_forward", *arguments)
    assert status == 2
    assert f"{folder / 'mine.json'}:1: an entry has the keys" in text


def test_tune_counts_what_tiles_compute_in_vain():
    parameters = {"BLOCK_Q": 64, "BLOCK_K": 32, "BLOCK_E": 8}
    assert tune.beyond_the_edges(parameters, Shape(1, 128, 64, 16)) == 1
    assert tune.beyond_the_edges(parameters, Shape(1, 65, 33, 9)) == pytest.approx(128 / 65 * 64 / 33 * 16 / 9)
    assert tune.beyond_the_edges({"BLOCK_X": 64, "BLOCK_E": 64}, Shape(1, 64, 32, 64)) == 1.5


# ---- report -------------------------------------------------------------------------------------------------------


@needs_tools
def test_report_html(capsys, folder):
    """One file that refers to no other: every variant for the dtype, its instructions per term, peers, the limit."""
    file = folder / "page.html"
    bench = ROOT / "benchmarks" / "nvidia-h100-80gb-hbm3.json"
    status, text = lab(capsys, "report", "scores_forward", "--output", file, "--bench", bench)
    assert status == 0, text
    page = file.read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    picture = base64.b64decode(re.search(r"data:image/svg\+xml;base64,([^\"]+)", page)[1])
    assert b"<svg" in picture
    limits = json.loads(bench.read_text())["bench"]["limits"]
    limit = next(one["median"] for one in limits if (one["op"], one["dtype"]) == ("forward", "float32"))
    assert f"{limit * 1e9:.3g} terms/s" in page
    for variant in registry.variants("scores_forward"):
        if variant.fits("float32", {"q": 1024, "k": 1024, "e": 64}):
            found = costs.costs(variant, "float32")
            assert f"<td>{variant.name}:{variant.line}</td>" in page
            assert f"<td>{found.slots_per_term:.2f}</td>" in page
            assert (
                f"<td>{machine_code.budget(variant) / found.slots_per_term:.0%}</td>" in page
            )  # of the limit, at most
    assert "cdist, benchmark" in page
    assert "Nothing was run" in page


@needs_tools
def test_report_png(capsys, folder):
    file = folder / "page.png"
    assert lab(capsys, "report", "scores_backward", "--output", file, "--dtype", "f16")[0] == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_report_without_tools(capsys, folder, no_tools):
    """Nothing to place on the page: an error that says what to install, and no file."""
    status, text = lab(capsys, "report", "scores_forward", "--output", folder / "page.html")
    assert status == 2
    assert "ptxas is not installed" in text
    assert not (folder / "page.html").exists()
