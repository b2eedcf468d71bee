"""Lists of values in @variant lines, and the tuning files that choose from them."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import numpy as np
import pytest
from lab_cases import damaged

import l1attn_cupy as l1
from l1attn_cupy.cuda import registry, tuning
from l1attn_cupy.cuda.registry import KernelError

NAME = "scores_forward_mine.cu"
LISTS = ("BLOCK_K=32", "BLOCK_K=32,64,96")
SHOW = ("to_scalar(result[0])", "to_scalar(BLOCK_K)")  # a kernel that tells with what it was compiled
QUERY, KEY = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((5, 7), (9, 7)))
SHAPE = "L<=64 S<=64 E<=32"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of the user's own kernels, and an emulator that stands in for a card."""
    monkeypatch.setenv("L1ATTN_KERNELS", str(tmp_path))
    monkeypatch.setenv("L1ATTN_EMULATOR_DEVICE", "NVIDIA H200, sm_90")
    return tmp_path


def used(query=QUERY, key=KEY) -> int:
    """The BLOCK_K that a call gets."""
    result = l1.l1_scores(query, key, backend="emulator", variant="mine")
    assert (result == result.flat[0]).all()
    return int(result.flat[0])


def entry(**changes):
    made = {"device": "NVIDIA H200", "op": "scores_forward", "variant": "mine", "dtype": "float32", "shape": SHAPE,
            "by": "time", "parameters": {"BLOCK_K": 64}}  # fmt: skip
    return {**made, **changes}


def write(folder, *entries, name="h200.json"):
    """A tuning file with one entry a line, the first in line 2."""
    (folder / "tuning").mkdir(exist_ok=True)
    file = folder / "tuning" / name
    file.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
    return file


# ---- lists --------------------------------------------------------------------------------------------------------


def test_list_first_value_is_the_default(folder):
    file = damaged(folder, NAME, LISTS, SHOW)
    variant = registry.read(file)[0]
    assert variant.parameters["BLOCK_K"] == 32
    assert variant.choices == {"BLOCK_K": (32, 64, 96)}
    assert variant.combinations() == [{"BLOCK_K": 32}, {"BLOCK_K": 64}, {"BLOCK_K": 96}]
    assert used() == 32


def test_lists_combine(folder):
    """Every value of each with every value of the others, the defaults first."""
    file = damaged(folder, NAME, LISTS, ("THREADS=256", "THREADS=256,128"))
    combinations = registry.read(file)[0].combinations()
    assert len(combinations) == 6
    assert combinations[0] == {"BLOCK_K": 32, "THREADS": 256}
    assert {"BLOCK_K": 96, "THREADS": 128} in combinations


BAD_LISTS = {
    "a value twice": ("BLOCK_K=32,64,32", "BLOCK_K lists a value twice, got 32,64,32"),
    "a value missing": ("BLOCK_K=32,", "BLOCK_K must be a whole number, got ''"),
    "no number": ("BLOCK_K=32,many", "BLOCK_K must be a whole number, got 'many'"),
    "a key that takes one value": ("BLOCK_K=32 min_q=1,2", "min_q must be a whole number, got '1,2'"),
    "a dtype twice": ("BLOCK_K=32 dtypes=f32", "dtypes is given twice"),
}


@pytest.mark.parametrize("fault", BAD_LISTS)
def test_list_error_names_file_and_line(folder, fault):
    text, message = BAD_LISTS[fault]
    file = damaged(folder, NAME, ("BLOCK_K=32", text))
    with pytest.raises(KernelError) as caught:
        used()
    assert str(caught.value) == f"{file}:7: {message}"


def test_two_lines_for_the_same_calls(folder):
    """The second would never be used; with other sizes or dtypes it would."""
    file = damaged(folder, NAME)
    line = next(line for line in file.read_text().splitlines() if "@variant" in line)
    file.write_text(f"{line} max_q=8\n{line.replace('=f32', '=f64')}\n{line}\n")
    assert len(registry.read(file)) == 3
    file.write_text(f"{line}\n{line.replace('BLOCK_K=32', 'BLOCK_K=64')}\n")
    with pytest.raises(KernelError, match=r"mine\.cu:2: line 1 is already for float32 and these sizes"):
        used()


def test_only_overrides_files(folder):
    """What the lab tries need not be in any file."""
    variant = registry.read(damaged(folder, NAME, LISTS, SHOW))[0]
    write(folder, entry())
    assert used() == 64
    with registry.only(variant.with_parameters({"BLOCK_K": 160})):
        assert used() == 160
    assert used() == 64


# ---- shape classes ------------------------------------------------------------------------------------------------


def test_shape_classes():
    """The ends belong to the class below."""
    assert tuning.shape_class({"q": 64, "k": 65, "e": 0}) == "L<=64 S<=256 E<=32"
    assert tuning.shape_class({"q": 4096, "k": 4097, "e": 129}) == "L<=4096 S>4096 E>128"


# ---- what an entry decides ----------------------------------------------------------------------------------------


def test_entry_is_used(folder, monkeypatch):
    """For its device, dtype and class of shapes, and for no other."""
    damaged(folder, NAME, LISTS, SHOW, dtypes="f32,f64")
    write(folder, entry())
    assert used() == 64
    assert used(QUERY.astype(np.float64), KEY.astype(np.float64)) == 32
    assert used(np.zeros((65, 7), np.float32)) == 32
    monkeypatch.setenv("L1ATTN_EMULATOR_DEVICE", "NVIDIA A100, sm_80")
    assert used() == 32
    monkeypatch.delenv("L1ATTN_EMULATOR_DEVICE")
    assert used() == 32


def test_entry_of_the_card_before_that_of_the_architecture(folder):
    damaged(folder, NAME, LISTS, SHOW)
    write(folder, entry(device="sm_90", parameters={"BLOCK_K": 96}))
    assert used() == 96
    write(folder, entry(device="sm_90", parameters={"BLOCK_K": 96}), entry())
    assert used() == 64


def test_edited_tuning_file_is_used_by_the_next_call(folder):
    """A new folder, a new file, an edited one, one that is gone."""
    damaged(folder, NAME, LISTS, SHOW)
    assert used() == 32
    file = write(folder, entry())
    assert used() == 64
    write(folder, entry(parameters={"BLOCK_K": 96}))
    assert used() == 96
    other = write(folder, entry(device="sm_90", parameters={"BLOCK_K": 64}), name="other.json")
    assert used() == 96
    file.unlink()
    assert used() == 64
    other.unlink()
    assert used() == 32


def test_own_tuning_file_wins(folder, monkeypatch, tmp_path_factory):
    """Over the one that lies beside the packaged kernels, even with an entry for the architecture alone."""
    packaged = tmp_path_factory.mktemp("packaged")
    shutil.copytree(registry.packaged_folder(), packaged, dirs_exist_ok=True)
    monkeypatch.setattr(registry, "packaged_folder", lambda: packaged)
    registry._known_folders.cache_clear()
    try:
        damaged(packaged, NAME, LISTS, SHOW)
        write(packaged, entry())
        assert used() == 64
        write(folder, entry(device="sm_90", parameters={"BLOCK_K": 96}))
        assert used() == 96
    finally:
        registry._known_folders.cache_clear()


def test_stale_entry_is_not_used_and_said(folder):
    """The kernel's list has changed since, or the kernel is gone: a warning, and the default."""
    damaged(folder, NAME, ("BLOCK_K=32", "BLOCK_K=32,128"), SHOW)
    write(folder, entry())
    with pytest.warns(
        UserWarning, match=r"h200\.json:2: not used, as BLOCK_K=64 is not listed at .*mine\.cu:7; tune ag"
    ):
        assert used() == 32
    write(folder, entry(variant="gone"))
    with pytest.warns(UserWarning, match="there is no variant gone of scores_forward"):
        assert used() == 32


def test_own_kernel_instead_of_a_packaged_one_is_no_stale_entry(folder):
    """The packaged entries are for the packaged kernel; one's own of that name need not have its lists."""
    packaged = {(one.op, one.variant) for one in tuning.entries()}
    assert ("scores_forward", "tiled") in packaged
    file = registry.packaged_folder() / "scores_forward_tiled.cu"
    text = re.sub(r"(=\d+)(,\d+)+", r"\1", file.read_text())
    (folder / file.name).write_text(text)
    assert not registry.read(folder / file.name)[0].choices
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        l1.l1_scores(QUERY, KEY, backend="emulator", variant="tiled")


def test_entry_of_a_broken_kernel_is_no_error_of_others(folder):
    """Who tries another file is not stopped by it."""
    damaged(folder, NAME, LISTS, SHOW)
    broken = damaged(folder, "scores_forward_broken.cu", ("rank=0", "speed=9"))
    write(folder, entry(), entry(variant="broken"))
    assert [one.variant for one in tuning.entries()][:2] == ["mine", "broken"]
    broken.unlink()
    with pytest.warns(UserWarning, match="there is no variant broken of scores_forward"):
        assert used() == 64


# ---- bad files ----------------------------------------------------------------------------------------------------

BAD_ENTRIES = {
    "unknown key": (entry(speed=1), "an entry has the keys by, device, dtype, op, parameters, shape, variant, got by,"),
    "missing key": ({"device": "x"}, "an entry has the keys by, device, .*, got device"),
    "no object": (7, "an entry has the keys .*, got 7"),
    "unknown op": (entry(op="sideways"), "op must be one of 'scores_forward', 'scores_backward'.*, got 'sideways'"),
    "short dtype": (entry(dtype="f32"), "dtype must be one of 'float32', .*, got 'f32'"),
    "unknown class": (entry(shape="L<=77"), "shape must be one of 'L<=64 S<=64 E<=32', .*, got 'L<=77'"),
    "unknown way": (entry(by="luck"), "by must be one of 'time', 'machine code', got 'luck'"),
    "parameters that are none": (entry(parameters={"BLOCK_K": "64"}), "parameters must be whole numbers by name, got"),
    "device that is no name": (entry(device=90), "device must be a string, got 90"),
    "the same twice": (entry(device="sm_90"), r".*h200\.json:2 is already for sm_90, scores_forward, mine, float32"),
}


@pytest.mark.parametrize("fault", BAD_ENTRIES)
def test_bad_entry_names_file_and_line(folder, fault):
    """It is raised by the next call that looks for a kernel, whatever that asks for."""
    bad, message = BAD_ENTRIES[fault]
    damaged(folder, NAME, LISTS, SHOW)
    file = write(folder, entry(device="sm_90"), bad)
    with pytest.raises(KernelError, match=rf"^{re.escape(str(file))}:3: {message}"):
        l1.l1_scores(QUERY, KEY, backend="emulator", variant="gather")
    file.unlink()
    assert used() == 32


def test_bad_json_names_file_and_line(folder):
    damaged(folder, NAME, LISTS, SHOW)
    file = write(folder, entry())
    file.write_text(file.read_text().replace('"op":', '"op"'))
    with pytest.raises(KernelError, match=rf"^{re.escape(str(file))}:2: not JSON: "):
        used()
    file.write_text("{}\n")
    with pytest.raises(KernelError, match=rf"^{re.escape(str(file))}:1: a tuning file is a JSON list of entries"):
        used()


def test_write_keeps_other_entries(folder):
    """The same key is replaced, others stay, and what is written is read."""
    file = write(folder, entry(), entry(device="NVIDIA A100"))
    fields = {name: value for name, value in entry().items() if name != "parameters"}
    tuning.write(file, [tuning.Entry(**fields, parameters={"BLOCK_K": 96})])
    found = {one.device: one.parameters for one in tuning.read(file)}
    assert found == {"NVIDIA H200": {"BLOCK_K": 96}, "NVIDIA A100": {"BLOCK_K": 64}}


def test_default_forward_can_be_tuned():
    """`lab tune` has something to try without a file of one's own."""
    for dtype in ("float32", "float16", "bfloat16"):
        assert registry.choose("scores_forward", dtype, {"q": 1024, "k": 1024, "e": 64}, None).choices


# ---- the packaged files -------------------------------------------------------------------------------------------


def test_packaged_entries_are_used():
    """Each fits the line that a call of its shape comes to, on the device that it was timed on."""
    ends = {"L": "q", "S": "k", "E": "e"}
    for entry in tuning.entries():
        sizes = {ends[part[0]]: int(part[3:]) for part in entry.shape.split()}
        variant = registry.choose(entry.op, entry.dtype, sizes, entry.variant)
        assert tuning.entry_for(variant, entry.dtype, sizes, (entry.device,)) == entry
    assert {entry.device for entry in tuning.entries()} == {"NVIDIA H100 80GB HBM3"}
