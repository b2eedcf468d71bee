"""What a user meets before the first result: the import, the caches, the README."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from child import ROOT, run, start

import l1attn_cupy as l1
from l1attn_cupy import config
from l1attn_cupy.cpu import elements, jit, scores, tangents

README = ROOT / "README.md"


def test_package_imports_numpy_alone():
    """The import is quick because Numba, torch and CuPy wait for a call that needs them."""
    code = "import sys, l1attn_cupy; print([name for name in ('numba', 'torch', 'cupy') if name in sys.modules])"
    assert run(code).strip() == "[]"


def test_package_has_what_it_names():
    for name in l1.__all__:
        assert callable(getattr(l1, name))
        assert getattr(l1, name).__doc__


def test_show_config_prints_what_a_bug_report_needs(capsys):
    l1.show_config()
    text = capsys.readouterr().out
    for pattern in (r"numpy \d", r"numba \d", "cpu: available", "cuda: .+", "emulator: .+", r"threads: \d"):
        assert re.search(pattern, text), pattern
    assert re.search(r"threading layer: (tbb|omp|workqueue)", text)
    for owner in ("", "cuda ", "emulator "):
        assert re.search(rf"^  {owner}kernel cache: /.* \(writable\)$", text, re.MULTILINE), owner
    assert re.search(r"kernels: /.*kernels_cu$", text, re.MULTILINE)


def test_show_config_says_which_caches_cannot_be_written(capsys, monkeypatch):
    monkeypatch.setattr(config.os, "access", lambda *_: False)
    l1.show_config()
    text = capsys.readouterr().out
    for variable in ("NUMBA_CACHE_DIR", "CUPY_CACHE_DIR", "L1ATTN_CACHE_DIR"):
        assert f"not writable: set {variable}" in text


def test_show_config_where_the_kernels_folder_is_wrong(capsys, monkeypatch):
    """It is what goes into a bug report: it must not fail for the bug."""
    monkeypatch.setenv("L1ATTN_KERNELS", "/nowhere")
    l1.show_config()
    assert "kernels: L1ATTN_KERNELS must name a folder, got '/nowhere'" in capsys.readouterr().out


def test_show_config_agrees_with_backends(capsys):
    """One list of backends, for `show_config`, ``scripts/check.py`` and the tests."""
    l1.show_config()
    text = capsys.readouterr().out
    for backend in config.backends():
        assert f"{backend.name}: {backend.missing or 'available'}" in text


def test_cache_keeps_parallel_and_serial_apart():
    """Numba's cache goes by the name of a function: two compilations of one function must not share an entry."""
    kernels = [scores.forward, scores.forward_serial, scores.backward, scores.backward_serial]
    kernels += [tangents.jvp, tangents.jvp_serial]
    names = {kernel._cache._impl.filename_base for kernel in kernels}
    assert len(names) == len(kernels)


def test_cache_notices_every_source_file(monkeypatch, tmp_path):
    """A kernel is compiled anew when a function that it calls changes, in whatever file."""
    stamps = set()
    for changed in (None, "functions.py", "cpu/elements.py", "cpu/vector.py", "cpu/scores.py", "cpu/attention.py"):
        package = tmp_path / f"{len(stamps)}" / "l1attn_cupy"
        shutil.copytree(Path(l1.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
        if changed:
            (package / changed).write_text((package / changed).read_text() + "# edited\n")
        monkeypatch.setattr(jit, "__file__", str(package / "cpu" / "jit.py"))
        stamps.add(jit.source_stamp.__wrapped__())
    assert len(stamps) == 6


def test_cache_files_carry_the_stamp():
    for kernel in (scores.forward, elements.load_rows):
        assert kernel._cache._cache_file._source_stamp == jit.source_stamp()


CALL = """
import warnings
import numpy as np

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import l1attn_cupy as l1
    x = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    assert np.array_equal(l1.l1_scores(x, x, score="distance"), np.abs(x[:, None] - x).sum(-1))
print(l1.__file__)
print(len(caught), *(warning.message for warning in caught), sep="\\n")
"""


@pytest.fixture
def copied_package(tmp_path):
    """The package in a folder of its own, with nothing compiled in it."""
    shutil.copytree(ROOT / "l1attn_cupy", tmp_path / "l1attn_cupy", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.slow
def test_cache_not_writable(copied_package):
    """It works, and says once what to set. Files where folders should be keep the administrator out as well."""
    (copied_package / "file").touch()
    (copied_package / "l1attn_cupy" / "cpu" / "__pycache__").touch()
    nowhere = str(copied_package / "file" / "folder")
    code = f"import sys; sys.path.insert(0, {str(copied_package)!r})\n{CALL}"
    done = start(
        code,
        HOME=nowhere,
        XDG_CACHE_HOME=nowhere,
        NUMBA_CACHE_DIR=nowhere,
        PYTHONDONTWRITEBYTECODE="1",
        PYTHONSAFEPATH="1",
    )
    assert done.returncode == 0, done.stderr
    module, count, *messages = done.stdout.splitlines()
    assert module.startswith(str(copied_package))
    assert count == "1"
    assert "Set NUMBA_CACHE_DIR to a folder that can be written" in messages[0]


def test_cache_disk_full(monkeypatch):
    """A cache that cannot be written after all is a warning, once, and no error."""

    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    @jit.kernel()
    def successor(x):
        return x + 1

    successor._cache.flush()
    monkeypatch.setattr(jit, "_warned", False)
    monkeypatch.setattr(successor._cache._cache_file, "save", no_space)
    with pytest.warns(RuntimeWarning, match="Set NUMBA_CACHE_DIR to a folder that can be written") as caught:
        assert successor(1) == 2
        assert successor(1.5) == 2.5
    assert len(caught) == 1


def readme_examples() -> list[str]:
    if not README.exists():
        return []
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def runnable(example: str):
    """The example, with the mark that what it imports asks for."""
    imported = set(re.findall(r"^import (\w+)", example, re.MULTILINE))
    name = " ".join(re.findall(r"^\w.*", example, re.MULTILINE)[-1].split())[:40]
    if "cupy" in imported:
        return pytest.param(example, id=name, marks=pytest.mark.gpu)
    lacking = sorted(module for module in imported & {"jax", "transformers"} if not importlib.util.find_spec(module))
    return pytest.param(
        example, id=name, marks=pytest.mark.skipif(bool(lacking), reason=f"{lacking} of an example is not installed")
    )


def test_readme_has_examples_that_parse():
    """Those that cannot run here too."""
    assert len(readme_examples()) >= 5 or not README.exists()
    for example in readme_examples():
        compile(example, str(README), "exec")


# The one for several processes runs with the other tests of them.
@pytest.mark.parametrize("example", [runnable(example) for example in readme_examples() if "torchrun" not in example])
def test_readme_examples_run(example):
    """Each on its own, so that a reader can copy any of them."""
    run(example)
