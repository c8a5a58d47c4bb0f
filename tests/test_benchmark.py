"How speed is measured: points and budgets, resuming, faults of a method, and the command."
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ddcl_nb import benchmark, costs
from ddcl_nb.benchmark import METHODS, OURS, Method, Point, aims, at, flat, growth, spared, take_turns
from ddcl_nb.cli import SUITES, app


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch):
    "Two small points instead of the axes, two methods instead of all, and no processes for memory."
    line = [Point(64, 8, 4), Point(128, 8, 4)]
    monkeypatch.setattr(benchmark, "axes", lambda quick: {"N": line, "K": [], "m": []})
    monkeypatch.setattr(benchmark, "METHODS", {name: METHODS[name] for name in (OURS, "composed", "GEMM (floor)")})
    monkeypatch.setattr(benchmark, "peak_memory", lambda name, point: 1000)
    return line


def test_every_point_is_measured_once_and_ours_everywhere():
    for quick in (True, False):
        found = benchmark.points(quick)
        assert len(set(found)) == len(found) and all(spared(OURS, p) is None for p in found)
        assert sum(what == "time" for what, _, _ in benchmark.tasks(quick)) == len(found)


def test_the_aims_are_about_points_that_are_measured():
    found = benchmark.points(False)
    assert {Point(16384, 64, 8192), Point(65536, 64, 64)} <= set(found) and any(p.K >= 512 for p in found)
    assert spared("composed", Point(16384, 64, 8192)) is None and spared("VQ, EMA", Point(16384, 64, 8192)) is None


def test_a_run_goes_on_where_it_stopped(tiny, tmp_path):
    counted, stop = [], 3

    def advance(n=1, note=""):
        counted.append(note)
        if len(counted) == stop: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): benchmark.measure(True, tmp_path, 2, advance)
    kept = json.loads((tmp_path / ".partial" / "bench-layer-quick.json").read_text())["rows"]
    stop = None
    result = benchmark.measure(True, tmp_path, 2, advance)
    assert kept[0]["times"][OURS] == [pytest.approx(ms / 1e3, rel=1e-3, abs=1e-6) for ms in at(result["rows"], tiny[0], OURS, "runs_ms")]
    assert json.loads((tmp_path / "bench" / "layer-quick.json").read_text()) == json.loads(json.dumps(result))
    assert not (tmp_path / ".partial" / "bench-layer-quick.json").exists()
    assert {row["peak_bytes"] for row in result["rows"]} == {1000}


def test_a_method_that_fails_does_not_take_the_others_with_it(monkeypatch):
    def broken(z, p):
        def run(): raise RuntimeError("no\nkernel")
        return run
    monkeypatch.setitem(benchmark.METHODS, "broken", Method(broken))
    found = take_turns(Point(64, 8, 4, 1), [OURS, "broken"], 2, 0)
    assert found["broken"] == "RuntimeError: no kernel" and len(found[OURS]) == 2
    rows = flat([{"what": "time", "N": 64, "m": 8, "K": 4, "threads": 1, "dtype": "float32", "times": found}])
    assert next(row for row in rows if row["method"] == "broken")["skipped"] == "RuntimeError: no kernel"


def test_a_process_that_dies_is_said(monkeypatch):
    class Dead:
        def submit(self, *work): raise benchmark.BrokenProcessPool("gone")
        def __enter__(self): return self
        def __exit__(self, *error): return False
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *a, **k: Dead())
    assert benchmark.peak_memory(OURS, Point(64, 8, 4)) == "the process was ended, as when memory runs out"


def test_memory_is_of_a_process_of_its_own():
    small, large = (benchmark.peak_memory("products (floor)", Point(4096, 16, K, threads=1)) for K in (16, 4096))
    assert large - small > 4 * 4096 * 4000, (small, large)
    assert "Error" in benchmark.peak_memory("PMA", Point(64, 30, 4, threads=1))


@pytest.mark.parametrize("rows", [[], [{"N": 64, "m": 8, "K": 4, "threads": 2, "dtype": "float32", "method": OURS, "skipped": "not run"}]])
def test_nothing_measured_gives_no_verdict(rows):
    assert {a["verdict"] for a in aims(rows)} == {"not measured"} and growth(rows) == []


def test_documents_are_scaled_by_batches():
    lines = costs.scaled({"batch": 4, "rows": [dict.fromkeys(costs.STAGES, 0.5)]}, 100)
    assert all(line["seconds"] == 12.5 and line["error"] is None and line["drift"] is None for line in lines)


def test_the_command(tiny, tmp_path):
    run = lambda *words: CliRunner().invoke(app, ["bench", *words])
    done = run("--only", "layer", "--quick", "--runs", "1", "--out", str(tmp_path))
    assert done.exit_code == 0 and "layer: about 1 min" in done.output and "aim" in done.output, done.output
    assert (tmp_path / "bench" / "layer-quick.json").exists()
    done = run("--only", "kernel")
    assert done.exit_code == 2 and done.stderr == f"Error: --only: no suite 'kernel'; there are {', '.join(SUITES)}\n"
    done = run("--runs", "0")
    assert done.exit_code == 2
    Path(tmp_path, "file").touch()
    assert run("--quick", "--out", str(tmp_path / "file")).exit_code == 2
