"The command as people use it: what it prints, where it stops, how it goes on, and how it fails."
import json, os, re, signal, subprocess, sys, textwrap, time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ddcl_nb
from ddcl_nb import data
from ddcl_nb.cli import Reproduction, app, data_of, finished, seeds_of, words
from ddcl_nb.experiments import registry
from ddcl_nb.experiments.registry import Experiment, Log, spread

class Toy:
    "An experiment with a row for each seed; `stop` maps a seed to what is raised before its row."
    def __init__(self, name):
        self.name, self.stop, self.measured = name, {}, []
        self.experiment = Experiment(name, f"The {name}", "Table 0", self.run, lambda profile, seeds=None: len(self.seeds(profile, seeds)))

    def seeds(self, profile, seeds): return list({"quick": range(3), "full": range(6)}[profile] if seeds is None else seeds)

    def row(self, seed):
        if seed in self.stop: raise self.stop[seed]
        self.measured.append(seed)
        return {"acc": 0.7 + seed / 100}

    def run(self, profile="quick", seeds=None, out="results", advance=lambda n=1, note="": None):
        log = Log(self.name, profile, out, {"seeds": self.seeds(profile, seeds)}, advance)
        for seed in self.seeds(profile, seeds): log.row(lambda: self.row(seed), data="rings [1]", method="ours", seed=seed)
        line = {"data": "rings [1]", "measure": "acc", "paper": 0.772, "paper_kmeans": 0.756, "papers_setting": None, "kmeans": [0.6, 0.1], "ours": spread([r["acc"] for r in log.rows])}
        return log.finish(title=self.experiment.title, paper="Table 0", sources={"rings [1]": "made here"}, table=[line], verdict="Held.")

@pytest.fixture
def toys(monkeypatch, tmp_path):
    toys = {name: Toy(name) for name in ("apple", "banana")}
    monkeypatch.setattr(registry, "experiments", lambda: {name: toy.experiment for name, toy in toys.items()})
    monkeypatch.chdir(tmp_path)
    return toys

def ddcl(*arguments, code=0):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == code, done.output
    return done

def error(*arguments, code):
    "The only line on standard error."
    lines = ddcl(*arguments, code=code).stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and "Traceback" not in lines[0]
    return lines[0]

def in_another_process(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options)

def test_version_and_help():
    assert ddcl("--version").stdout == f"ddcl_nb {ddcl_nb.__version__}\n"
    assert {"reproduce", "data"} <= set(re.findall(r"\w+", ddcl("--help").stdout))
    ddcl("no-such-command", code=2)
    ddcl("reproduce", "--no-such-option", code=2)

def test_python_m_ddcl_nb_is_the_command():
    done = in_another_process("-m", "ddcl_nb", "reproduce", "--profile", "huge")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "Error: --profile: must be one of quick, full; got 'huge'\n")

@pytest.mark.parametrize("arguments, heavy", [(["--help"], ("torch", "numpy", "transformers", "torchvision", "matplotlib", "sklearn")), (["data"], ("transformers", "torchvision", "matplotlib", "sklearn", "pandas"))])
def test_nothing_heavy_is_imported_to_answer(arguments, heavy):
    script = f"import sys, atexit; atexit.register(lambda: print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)); sys.argv = ['ddcl', *{arguments!r}]; from ddcl_nb.cli import main; main()"
    done = in_another_process("-c", script)
    assert done.returncode == 0 and done.stderr.strip() == "[]"

def test_data_as_a_table_and_for_programs():
    rows = json.loads(ddcl("data", "--json").stdout)
    assert [row["name"] for row in rows] == list(data.DATASETS) and all(set(row) == {"name", "what", "size", "found", "licence"} for row in rows)
    lines = ddcl("data").stdout.splitlines()
    assert len(lines) == len(rows) + 1 and "built in" in next(line for line in lines if line.startswith("digits"))

def test_download(monkeypatch):
    assert "--download: no data set 'minst'; there are orbits" in error("data", "--download", "minst", code=2)
    def broken(name): raise data.DownloadFailed(f"{name}: download failed: no network")
    monkeypatch.setattr(data, "download_data", broken)
    assert error("data", "--download", "mnist", code=1) == "Error: mnist: download failed: no network"
    monkeypatch.setattr(data, "download_data", lambda name: "the cache")
    done = ddcl("data", "--download", "mnist", "--json")
    assert done.stderr == "mnist: the cache\n" and json.loads(done.stdout)

def test_list_counts_the_rows_of_both_profiles(toys):
    head, apple, banana = (line.split() for line in ddcl("reproduce", "--list").stdout.splitlines() if line.strip())
    assert head[0] == "name" and apple == ["apple", "The", "apple", "Table", "0", "3", "6"] and banana[0] == "banana"
    assert not toys["apple"].measured and not Path("results").exists()

def test_a_whole_run(toys):
    said = ddcl("reproduce").stdout
    assert re.search(r"apple: 3 rows in \d+ s\n  rings \[1\]: made here\n", said) and "Results: results/quick\nReport: report/index.html\n" in said
    line = next(line for line in said.splitlines() if line.startswith("rings [1]"))
    assert re.split(r"  +", line.strip()) == ["rings [1]", "ACC", "0.772", "0.756", "0.600 ± 0.100", "–", "0.710 ± 0.010"]
    assert "\x1b" not in said and all(name in Path("report/index.html").read_text() for name in ("The apple", "The banana"))
    assert sorted(p.name for p in Path("results").rglob("*") if p.is_file()) == ["apple.csv", "apple.json", "banana.csv", "banana.json"]

def test_options_reach_the_experiments(toys):
    ddcl("reproduce", "--only", "banana", "--profile", "full", "--seeds", "4,9", "--out", "there", "--report", "page/x.html")
    assert toys["banana"].measured == [4, 9] and not toys["apple"].measured
    assert Path("there/full/banana.json").exists() and Path("page/x.html").exists()

@pytest.mark.parametrize("only", [["--only", "banana", "--only", "apple"], ["--only", "banana, apple"], []])
def test_only_keeps_the_order_of_the_registry(toys, only):
    said = ddcl("reproduce", *only).stdout
    assert said.index("apple: 3 rows in") < said.index("banana: 3 rows in")

def test_the_report_keeps_what_earlier_calls_measured(toys):
    for name in toys: ddcl("reproduce", "--only", name)
    assert all(f"The {name}" in Path("report/index.html").read_text() for name in toys)
    ddcl("reproduce", "--only", "apple", "--profile", "full")
    assert "The banana" not in Path("report/index.html").read_text()

def test_a_stopped_run_goes_on_where_it_was(toys):
    toys["banana"].stop = {2: KeyboardInterrupt()}
    done = ddcl("reproduce", code=130)
    assert done.stderr == "Stopped. What was measured is in results/.partial; the same command goes on from there.\n" and not Path("report/index.html").exists()
    toys["banana"].stop = {}
    said = ddcl("reproduce").stdout
    assert toys["apple"].measured == [0, 1, 2] and toys["banana"].measured == [0, 1, 2]
    assert "apple: finished before the interruption (3 rows" in said and "banana: 3 rows; an interrupted run left 2\n" in said and "2 of them were already there" in said
    assert "The apple" in Path("report/index.html").read_text()
    ddcl("reproduce")
    assert toys["apple"].measured == [0, 1, 2] * 2

def test_other_seeds_do_not_go_on_from_there(toys):
    toys["banana"].stop = {1: KeyboardInterrupt()}
    ddcl("reproduce", code=130)
    toys["banana"].stop = {}
    said = ddcl("reproduce", "--seeds", "2").stdout
    assert "already there" not in said and "before the interruption" not in said and "those left were of other settings" in said
    assert toys["apple"].measured == [0, 1, 2, 0, 1] and toys["banana"].measured == [0, 0, 1]

def test_fresh_forgets(toys):
    toys["banana"].stop = {1: KeyboardInterrupt()}
    ddcl("reproduce", code=130)
    toys["banana"].stop = {}
    said = ddcl("reproduce", "--fresh").stdout
    assert "already there" not in said and toys["apple"].measured == [0, 1, 2] * 2 and toys["banana"].measured == [0, 0, 1, 2]

@pytest.mark.parametrize("damage", ["", "{", "[]", '{"rows": 3}', '{"call": 1, "finished": 2}'])
def test_damaged_leftovers_are_as_none(toys, damage):
    for name in ("finished-quick.json", "apple-quick.json"):
        Path("results/.partial").mkdir(parents=True, exist_ok=True)
        Path("results/.partial", name).write_text(damage)
    assert "apple: 3 rows\n" in ddcl("reproduce").stdout
    assert toys["apple"].measured == [0, 1, 2]

def test_a_failure_is_one_line_and_the_others_run(toys):
    toys["apple"].stop = {1: ValueError("seed 1\nis odd")}
    assert error("reproduce", code=1) == "Error: apple: seed 1 is odd (--debug shows where)"
    assert toys["banana"].measured == [0, 1, 2] and "The apple" not in Path("report/index.html").read_text()
    toys["apple"].stop = {}
    said = ddcl("reproduce").stdout
    assert "1 of them were already there" in said and toys["banana"].measured == [0, 1, 2]

def test_debug_shows_the_traceback(toys):
    toys["apple"].stop = {0: ZeroDivisionError("no")}
    assert "apple: ZeroDivisionError: no" in error("reproduce", code=1)
    done = CliRunner().invoke(app, ["reproduce", "--debug"])
    assert isinstance(done.exception, ZeroDivisionError)

@pytest.mark.parametrize("arguments, message", [
    (["--only", "cherry"], "--only: no experiment 'cherry'; there are apple, banana"), (["--profile", "huge"], "--profile: must be one of quick, full; got 'huge'"),
    (["--seeds", "x"], "--seeds: a number of seeds (1 to 10,000) or different seeds with commas, such as 5 or 0,1,2; got 'x'"),
    (["--seeds", "99999999999"], "--seeds: a number of seeds (1 to 10,000) or different seeds with commas, such as 5 or 0,1,2; got '99999999999'"),
    (["--out", "file/results"], "--out: cannot write in 'file/results' (Not a directory)"), (["--report", "file/index.html"], "--report: cannot write in 'file' (File exists)"),
    (["--report", "."], "--report: '.' is a folder; give the name of a file")])
def test_what_cannot_be_asked(toys, arguments, message):
    Path("file").touch()
    assert error("reproduce", *arguments, code=2) == f"Error: {message}"
    assert not toys["apple"].measured

@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a user who may not write everywhere")
def test_a_folder_without_permission(toys):
    Path("locked").mkdir(mode=0o500)
    assert error("reproduce", "--out", "locked", code=2) == "Error: --out: cannot write in 'locked' (Permission denied)"

def test_a_damaged_result_is_named_before_the_work(toys):
    Path("results/quick").mkdir(parents=True)
    Path("results/quick/banana.json").write_text('{"rows": [')
    assert "banana.json is not a result of ddcl_nb" in error("reproduce", "--only", "apple", code=1) and not toys["apple"].measured
    ddcl("reproduce")

@pytest.mark.parametrize("text, seeds", [("1", [0]), ("3", [0, 1, 2]), ("7,", [7]), ("2, 0", [2, 0]), (None, None)])
def test_seeds(text, seeds): assert seeds_of(text) == seeds

def test_words_of_errors():
    assert [words(e) for e in (ValueError("a\n b"), KeyError("x"), ValueError(), ImportError("no y"))] == ["a b", "KeyError: 'x'", "ValueError", "no y"]

def test_what_finished_needs_its_result(tmp_path):
    plan = Reproduction([], "quick", None, tmp_path)
    assert finished(plan) == []

def test_data_are_named_before_the_run(toys, monkeypatch):
    from ddcl_nb.experiments import space_debris
    real = space_debris.EXPERIMENT
    assert [entry.name for entry in data_of(real)] == ["orbits", "space"] and data_of(toys["apple"].experiment) == []
    monkeypatch.setattr(registry, "experiments", lambda: {"space_debris": real})
    monkeypatch.setattr("ddcl_nb.cli.run_all", lambda plan, debug: ([], []))
    monkeypatch.setattr(data, "data_folders", lambda: [])
    said = ddcl("reproduce").stdout
    assert "(orbits), built in" in said and "(space), not here: built-in data serve instead (orbits); `ddcl data --download space` gets it" in said

def test_real_experiments_are_known():
    assert "space_debris" in registry.experiments()
    assert all(e.steps("quick", [0]) <= e.steps("full", [0]) for e in registry.experiments().values())

@pytest.mark.skipif(os.name == "nt", reason="sends a Unix signal")
def test_ctrl_c_in_a_real_process(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(textwrap.dedent("""
        import sys, time
        from ddcl_nb.experiments import registry
        def run(profile, seeds, out, advance):
            log = registry.Log("slow", profile, out, {"seeds": seeds}, advance)
            for seed in range(4): log.row(lambda: time.sleep(float(sys.argv.pop()) if seed == 2 and len(sys.argv) > 2 else 0) or {"acc": 1.0}, method="ours", seed=seed)
            return log.finish(title="Slow")
        registry.experiments = lambda: {"slow": registry.Experiment("slow", "Slow", "none", run, lambda profile, seeds=None: 4)}
        from ddcl_nb.cli import app
        app(["reproduce"])
        """))
    process = subprocess.Popen([sys.executable, str(script), "wait", "60"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial, deadline = tmp_path / "results/.partial/slow-quick.json", time.time() + 60
    while time.time() < deadline and not (partial.exists() and len(json.loads(partial.read_text())["rows"]) == 2): time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.count("\n") == 1 and stderr.startswith("Stopped.")
    done = in_another_process(str(script), cwd=tmp_path)
    assert done.returncode == 0 and "2 of them were already there" in done.stdout and done.stderr == ""
