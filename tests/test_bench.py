"""The benchmark: its peers and their checks, growth, pictures and tables from files, and files that are no good."""

from __future__ import annotations

import copy
import json
import sys
import types

import numpy as np
import pytest
import torch
from child import ROOT

sys.path.append(str(ROOT / "scripts"))
import bench
from benchlib import attention_peers, growth, growth_probe, markdown, peers, pictures, saved, settings
from benchlib.cases import Case
from benchlib.verify import WrongResult

SMALL = {
    "device": "A machine",
    "versions": {"torch": "2.0", "numba": "1.0", "scipy": "1.0"},
    "command": "scripts/bench.py --json a-machine.json",
    "copy, GB/s": 20.0,
    "limits": [{"op": op, "dtype": "float32", "median": rate} for op, rate in (("forward", 80.0), ("backward", 35.0))],
    "rows": [],
    "attention": {
        "shape": [3, 33, 65, 64],
        "contest": [
            {"op": "forward", "peer": "ours", "ms": 2.0},
            {"op": "forward", "peer": "dot product", "ms": 1.0},
            {"op": "-", "peer": "keops", "ms": None, "note": "KeOps: none; pip install it"},
        ],
        "share": {"share": 0.5},
        "decode": [{"shape": [1, 1, 1000, 64], "ms": 0.5, "GB/s": 1.024, "copy, GB/s": 20.0, "share": 0.0512}],
    },
    "growth": {
        "channels": 64,
        "records": [
            {"peer": peer, "kind": kind, "length": n, "heads": 2, "ms": n * n / 1e6 * slower, "beyond_mib": n / 4096}
            for peer, slower in (("ours", 1), ("cdist", 9))
            for kind in growth_probe.KINDS
            for n in (128, 256, 512)
        ],
        "judged": [
            {"kind": "scores forward", "lengths": [1024, 4096], "least": 0.97, "most": 1.04, "beyond_mib": [1, 4]}
        ],
    },
}


def row(shape, op, peer, median, group="user", times=None):
    """A row of results."""
    shares = {"share_of_limit": 0.5, "share_by_core_time": None, "ours_is_faster_by": times, "milliseconds": 3.0}
    return {"shape": shape, "dtype": "float32", "group": group, "op": op, "peer": peer, "median": median, **shares}


SMALL["rows"] = [
    row([2, 33, 65, 17], "backward", "ours", 20.0),
    row([2, 33, 65, 17], "forward", "ours", 40.0),
    row([2, 33, 65, 17], "forward", "cdist", 4.0, times=10.0),
    row([2, 33, 65, 17], "forward", "cuvs", None) | {"note": "cuVS is not installed"},
    *(row([9, n, n, 16], "forward", "ours", 10.0, "grid") for n in (16, 32)),
    *(row([9, n, n, 16], "forward", "scipy", 5.0, "grid", n / 8) for n in (16, 32)),
]


# --- peers


@pytest.mark.parametrize("name", ["scipy", "sklearn"])
def test_bench_host_peers_give_the_scores(name):
    """With more heads than threads, or fewer, each thread has its own."""
    pytest.importorskip({"scipy": "scipy", "sklearn": "sklearn"}[name])
    for heads in (1, 5):
        case = Case("user", heads, 33, 17, 9, "float32")
        query, key = torch.randn(heads, 33, 9), torch.randn(heads, 17, 9)
        peer = peers.PEERS[name](case, "cpu")
        found = peer.scores(peer.prepare(query), peer.prepare(key))
        np.testing.assert_allclose(found, peers.naive(query.double(), key.double()).numpy(), rtol=1e-12)


def fake_rapids(monkeypatch):
    """cuVS and CuPy as far as their peers use them, on the CPU; the streams that were asked for."""
    streams = []

    def pairwise_distance(q, k, out, metric, resources=None):
        assert metric == "cityblock"
        out[:] = torch.cdist(q, k, p=1.0)

    distance = types.SimpleNamespace(
        cuvs_available=True,
        pylibraft_available=False,
        cdist=lambda q, k, metric, out: pairwise_distance(q, k, out, metric),
    )
    modules = {
        "cuvs": {},
        "cuvs.common": {"Resources": lambda stream: streams.append(stream)},
        "cuvs.distance": {"pairwise_distance": pairwise_distance},
        "cupy": {"from_dlpack": lambda x: x},
        "cupyx": {},
        "cupyx.scipy": {},
        "cupyx.scipy.spatial": {"distance": distance},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    return streams


@pytest.mark.parametrize("name", ["cuvs", "cupyx"])
def test_bench_rapids_peers_give_the_scores(name, monkeypatch):
    """Head by head; cuVS on the stream that torch uses, by the handle of the legacy default stream."""
    streams = fake_rapids(monkeypatch)
    query, key = torch.randn(3, 33, 9), torch.randn(3, 17, 9)
    found = peers.PEERS[name](Case("user", 3, 33, 17, 9, "float32"), "cuda").scores(query, key)
    torch.testing.assert_close(found, peers.naive(query, key))
    assert streams == ([1] if name == "cuvs" else [])


def test_bench_cdist_does_no_more_than_it_can(monkeypatch):
    """On a GPU heads are split; a head that is too large for it is an error beforehand."""
    plain, heads = torch.cdist, []

    def noted(q, k, p):
        heads.append(len(q))
        return plain(q, k, p=p)

    monkeypatch.setattr(torch, "cdist", noted)
    monkeypatch.setattr(peers, "CDIST_TERMS", 2 * 33 * 17 * 9 + 1)
    query, key = torch.randn(5, 33, 9), torch.randn(5, 17, 9)
    for device, expected in (("cuda", [2, 2, 1]), ("cpu", [5])):
        heads.clear()
        found = peers.PEERS["cdist"](Case("user", 5, 33, 17, 9, "float32"), device).scores(query, key)
        torch.testing.assert_close(found, peers.naive(query, key))
        assert heads == expected
    heads.clear()
    attention_peers.cdist(query, key, key)
    assert heads == [2, 2, 1]
    with pytest.raises(peers.Unavailable, match="illegal memory access"):
        peers.PEERS["cdist"](Case("user", 1, 33, 65, 17, "float32"), "cuda")


@pytest.mark.parametrize(
    ("name", "module", "says"),
    [
        ("scipy", "scipy.spatial.distance", "SciPy is missing: pip install"),
        ("sklearn", "sklearn.metrics.pairwise", "scikit-learn is missing: pip install"),
        ("cuvs", "cuvs.common", "cuVS is not installed: .*pip install cuvs"),
        ("cupyx", "cupyx.scipy.spatial", "CuPy is not installed: .*pip install cupy"),
    ],
)
def test_bench_peer_missing_is_named(name, module, says, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(peers.Unavailable, match=says):
        peers.PEERS[name](Case("user", 1, 3, 3, 3, "float32"), "cuda")


def test_bench_dot_product_has_heads_in_a_dimension_of_their_own(monkeypatch):
    """With three dimensions torch takes its unfused path, and L1 looks better than it is."""
    plain, shapes = torch.nn.functional.scaled_dot_product_attention, []

    def noted(query, *others):
        shapes.append(tuple(query.shape))
        return plain(query, *others)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    given = attention_peers.inputs((3, 33, 65, 16), "cpu")
    attention_peers.check("dot product", attention_peers.dot_product(), *given[:3])
    assert shapes == [(1, 3, 33, 16)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("ours", torch.float32),
        ("ours", torch.bfloat16),
        ("cdist", torch.float32),
        ("dot product", torch.float32),
        ("dot product", torch.bfloat16),
    ],
)
def test_bench_attention_is_checked(name, dtype):
    """What is right passes; one wrong row, or gradients that are exchanged, do not."""
    function = attention_peers.makers("cpu", [name])[name]()
    arrays = [x.to(dtype) for x in attention_peers.inputs((2, 33, 65, 16), "cpu")]
    attention_peers.check(name, function, *arrays[:3])
    attention_peers.check_gradients(name, function, arrays)

    def one_row_wrong(q, k, v):
        return function(q, k, v) * torch.ones(33, 1).index_fill(0, torch.tensor(7), 3.0)

    def exchanged(q, k, v):
        return function(q, k.detach() + v - v.detach(), v.detach() + k - k.detach())

    with pytest.raises(WrongResult, match="off by"):
        attention_peers.check(name, one_row_wrong, *arrays[:3])
    with pytest.raises(WrongResult, match="dkey off by"):
        attention_peers.check_gradients(name, exchanged, arrays)


# --- growth


def chosen(**changes):
    """Settings of the parts alone."""
    basic = {"device": "cpu", "cases": [], "peers": ["ours"], "peers_given": True, "rounds": 2, "quick": False}
    more = {"only": {"growth"}, "threads": 2, "eager_bytes": 1, "cache_bytes": 1, "length": 256}
    return settings.Settings(**(basic | more | changes))


def test_bench_growth_measures_each_length():
    """In a process of its own: time of a term and memory, of scores and of attention."""
    found = growth.run_peer("ours", 256, chosen())
    assert [(r["kind"], r["length"], r["heads"]) for r in found] == [
        (kind, n, 4096 // n) for kind in growth_probe.KINDS for n in (128, 256)
    ]
    for r in found:
        terms = (3 if "backward" in r["kind"] else 1) * r["heads"] * r["length"] ** 2 * 64
        assert r["ps per term"] == pytest.approx(1e9 * r["ms"] / terms)
        assert r["low"] <= r["ms"] <= r["high"]
        assert r["beyond_mib"] < 64
    assert found[1]["outputs_mib"] == 256 * 64 * 4 / 2**20
    assert found[3]["outputs_mib"] == 4 * 256 * 64 * 4 / 2**20


def test_bench_growth_says_what_broke():
    """A peer that there is none of; time that runs out."""
    [note] = growth.run_peer("nobody", 128, chosen())
    assert note["peer"] == "nobody" and "nobody" in note["error"]
    [note] = growth.run_peer("ours", 128, chosen(seconds=0.1))
    assert "not done after" in note["error"]


def test_bench_growth_keeps_the_last_of_each_length():
    """Whatever else is printed, and a line that was cut off."""
    lines = ['{"kind": "a", "length": 1, "ms": 5}\n', "a warning\n", '{"kind": "a", "length": 2, "ms": 7}\n']
    lines += ['{"kind": "a", "length": 1, "ms": 6}\n', '{"kind": "a", "length": 4, "m']
    assert [record["ms"] for record in growth.read(lines)] == [6, 7]


@pytest.mark.parametrize(
    ("last", "says"), [(11.4, ": within 15 %"), (11.6, "NOT within 15 %"), (8.4, "NOT within 15 %")]
)
def test_bench_growth_is_judged(last, says):
    """By the time of a term from 1,024 on: shorter lengths may take longer."""
    terms = {128: 50.0, 1024: 10.0, 2048: 9.0, 4096: last}
    records = [
        {"peer": "ours", "kind": "scores forward", "length": n, "ps per term": ps, "beyond_mib": n / 1024}
        for n, ps in terms.items()
    ]
    judged = growth.judge("scores forward", records, cuda=True)
    assert judged["lengths"] == [1024, 4096]
    assert judged["beyond_mib"] == [1, 4]
    assert says in growth.describe(judged)
    assert growth.judge("attention forward", records, cuda=True) is None


# --- files, pictures, tables


def written(folder, content, name="a-machine.json"):
    """The content as a file."""
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_bench_pictures_are_drawn(tmp_path):
    """A roofline and the growth; of what gpu_suite.sh writes, too."""
    written(tmp_path, {"device": {"name": "A machine"}, "bench": SMALL})
    drawn = list(pictures.draw_all(tmp_path, tmp_path))
    assert [file.name for file in drawn] == ["a-machine-roofline.png", "a-machine-lengths.png"]
    for file in drawn:
        image = pictures.plt.imread(file)
        assert image.shape[1] > 700
        assert len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 50, "blank"


def test_bench_pictures_show_what_was_measured():
    """Terms per byte of inputs and outputs, and 1e9 terms per second; attention's terms are those of its scores."""
    found = {p.kind: p for p in pictures.points(SMALL, "forward") if not p.small}
    scores = 2 * 33 * 65 * 17 / (4 * (2 * 17 * (33 + 65) + 2 * 33 * 65))
    assert (found["scores"].intensity, found["scores"].rate) == (pytest.approx(scores), 40.0)
    assert found["attention"].rate == pytest.approx(3 * 33 * 65 * 64 / 2e-3 / 1e9)
    assert found["decode"].intensity == pytest.approx(1 / 8, rel=2e-3)  # a term needs a number of key and one of value
    assert found["decode"].rate == pytest.approx(1000 * 64 / 0.5e-3 / 1e9)
    assert sum(p.small for p in pictures.points(SMALL, "forward")) == 2
    assert pictures.bandwidth(SMALL) == 20.0
    assert pictures.bandwidth({}) is None


def test_bench_pictures_without_a_bandwidth(tmp_path):
    """Files of earlier runs have none, and lines of text for decoding."""
    old = copy.deepcopy(SMALL)
    del old["copy, GB/s"], old["growth"]
    old["attention"]["decode"] = [["(1, 1, 65536, 64)", "3.04"]]
    written(tmp_path, old)
    assert [file.name for file in pictures.draw_all(tmp_path, tmp_path)] == ["a-machine-roofline.png"]


def test_bench_tables_have_all_parts(tmp_path):
    """Passes in order, the grid on one line, who is slower or faster, growth, and whom there is no figure of."""
    written(tmp_path, SMALL)
    text = markdown.tables(tmp_path)
    assert text.index("| float32 | forward | 3.00 | 40.0 | 50 % | cdist 10.0x |") < text.index("| backward | 3.00 |")
    assert "| 2 shapes | float32 | forward | 50 % to 50 % | scipy 2.00x to 4.00x |" in text
    assert "| (3, 33, 65, 64) | float32 | forward | 2.00 | 50 % | dot product 0.500x |" in text
    assert "| (1, 1, 1000, 64) | 0.500 | 1.02 | 5 % |" in text
    assert "| scores forward | 1,024 to 4,096 | 0.97 to 1.04 | 1.00, 4.00 |" in text
    assert "Not timed: cuvs (cuVS is not installed); keops (KeOps: none)." in text
    assert "by `scripts/bench.py --json a-machine.json`:" in text
    assert "](docs/pictures/a-machine-lengths.png)" in text


BAD = {
    "no JSON": ("{", "must be JSON"),
    "a list": ([1], 'must have "device", a string'),
    "no device": ({key: SMALL[key] for key in SMALL if key != "device"}, 'must have "device", a string'),
    "versions that are a list": (SMALL | {"versions": []}, 'must have "versions", an object'),
    "attention that is none": (SMALL | {"attention": None}, '"attention" must be an object, got NoneType'),
    "attention without time": (SMALL | {"attention": {"contest": [{"op": "a", "peer": "b"}]}}, "lacks ms"),
    "rows that are none": (SMALL | {"rows": 3}, '"rows" must be a list, got int'),
    "a row without its rate": (
        SMALL | {"rows": [{"shape": [1] * 4, "dtype": "x", "op": "y", "peer": "z"}]},
        "lacks median",
    ),
    "growth that is a list": (SMALL | {"growth": []}, '"growth" must be an object, got list'),
    "growth without memory": (
        SMALL | {"growth": {"records": [{"peer": "ours", "kind": "a", "length": 1, "heads": 1, "ms": 1.0}]}},
        "lacks beyond_mib",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("option", ["--plot", "--markdown"])
def test_bench_bad_file_is_named(kind, option, tmp_path, monkeypatch):
    """The error says which and why; README stays as it is."""
    content, says = BAD[kind]
    file = written(tmp_path, content, "bad.json")
    monkeypatch.setattr(sys, "argv", ["bench.py", option])
    for module in (pictures, markdown):
        monkeypatch.setattr(module, "files", lambda folder: saved.files(tmp_path))
    before = (ROOT / "README.md").read_text()
    with pytest.raises(SystemExit) as error:
        bench.main()
    assert str(error.value).startswith(f"error: {file}") and says in str(error.value)
    assert (ROOT / "README.md").read_text() == before


def test_bench_readme_shows_the_pictures():
    """Each that its tables name is there."""
    names = [name for file, found in saved.files() for name in saved.pictures_of(file.stem, found)]
    assert names
    readme = (ROOT / "README.md").read_text()
    for name in names:
        assert f"(docs/pictures/{name})" in readme, "run scripts/bench.py --plot --markdown"
        assert (pictures.PICTURES / name).stat().st_size > 5000, "run scripts/bench.py --plot --markdown"


# --- the run


def test_bench_writes_what_it_has(tmp_path, monkeypatch):
    """A part that breaks is an error in the file; after an interruption the parts before it are there."""

    def broken(_):
        raise RuntimeError("no such luck")

    def interrupted(_):
        raise KeyboardInterrupt

    parts = {"attention": broken, "memory": lambda _: [1], "overhead": interrupted, "startup": lambda _: [2]}
    monkeypatch.setattr(bench, "RUN", parts)
    file = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only", ",".join(parts), "--json", str(file)])
    assert bench.main() == 1
    found = json.loads(file.read_text())
    assert found["errors"] == {"attention": "RuntimeError: no such luck"}
    assert (found["memory"], found["interrupted"]) == ([1], True)
    assert "startup" not in found
    assert found["command"].endswith("--json found.json")


def test_bench_leaves_out_what_there_is_no_time_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "RUN", {"attention": lambda _: [1]})
    file = tmp_path / "found.json"
    given = ["--only", "forward,attention", "--shapes", "1x2x3x4,1x2x3x5", "--seconds", "0", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench.py", *given])
    assert bench.main() == 0
    assert json.loads(file.read_text())["left out"] == ["shapes of user, float32", "attention"]
    assert "left out for want of time: shapes of user, float32; attention\n" in capsys.readouterr().out


def test_bench_length_too_short(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--length", "64"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--length must be at least 128, got 64" in capsys.readouterr().err
