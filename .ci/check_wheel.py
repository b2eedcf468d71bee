"""Check an installed wheel, from outside the checkout: check_wheel.py CHECKOUT.

It has every file of the source tree that it should have, works with numpy and numba alone, and finds its
kernels.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import sys
import time
from pathlib import Path

CACHES = {".pyc", ".nbc", ".nbi"}


def source_files(checkout: Path) -> set[str]:
    """Paths the package should have, relative to it; kernels_cu/ at the top of the checkout moves inside."""
    found = set()
    for folder, prefix in ((checkout / "l1attn_cupy", ""), (checkout / "kernels_cu", "kernels_cu/")):
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix not in CACHES:
                found.add(prefix + path.relative_to(folder).as_posix())
    return found


def main() -> None:
    checkout = Path(sys.argv[1]).resolve()

    start = time.perf_counter()
    import l1attn_cupy as l1

    print(f"import took {time.perf_counter() - start:.3f} s")
    installed = Path(l1.__file__).resolve().parent
    assert checkout not in installed.parents, f"imported from the checkout: {installed}"
    for name in ("torch", "cupy"):
        assert importlib.util.find_spec(name) is None, f"base needs only numpy and numba, but {name} is here"
    for name in ("numba", "torch", "cupy"):
        assert name not in sys.modules, f"`import l1attn_cupy` imported {name}"

    missing = sorted(name for name in source_files(checkout) if not (installed / name).is_file())
    assert not missing, f"in the source tree but not in the wheel (see packages in setup.cfg): {missing}"
    assert (installed / "py.typed").is_file(), "py.typed is missing"
    if (checkout / "kernels_cu").is_dir():
        kernels = importlib.resources.files("l1attn_cupy") / "kernels_cu"
        assert kernels.is_dir(), f"no kernels folder at {kernels}"
        assert any(kernels.iterdir()), f"the kernels folder is empty: {kernels}"
        print(f"kernels in {kernels}")

    import numpy as np

    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 33, 17)).astype(np.float32)
    key = rng.standard_normal((2, 65, 17)).astype(np.float32)
    distance = np.abs(query[:, :, None].astype(np.float64) - key[:, None]).sum(-1)
    np.testing.assert_allclose(l1.l1_scores(query, key), 1 / (1e-3 + distance), rtol=1e-5)
    l1.show_config()
    print("The wheel works.")


if __name__ == "__main__":
    main()
