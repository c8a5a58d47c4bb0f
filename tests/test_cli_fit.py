"The commands fit, predict, explain and doctor as people use them: what they print, what they write, and how they fail."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import make_blobs
from typer.testing import CliRunner

pytest.importorskip("pyarrow")

from ddcl_nb import fitted
from ddcl_nb.cli import app, clusters_asked, heat, plain

def ddcl(*arguments, code=0):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done

def error(*arguments, code):
    "The only line on standard error."
    done = ddcl(*arguments, code=code)
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and "Traceback" not in done.output
    return lines[0]

@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "A folder with a table, a fitted model, and rows of another kind."
    folder, before = tmp_path_factory.mktemp("shop"), fitted.EXAMPLES
    X = make_blobs(900, 2, centers=[[0, 0], [90, 0], [0, 900]], cluster_std=[1, 9, 9], random_state=0)[0]
    for name, rows in (("new", X), ("moved", X + [40, 0])):
        (folder / f"{name}.csv").write_text("name,east,north\n" + "".join(f"shop {i},{a:.6g},{b:.6g}\n" for i, (a, b) in enumerate(rows)))
    fitted.EXAMPLES = 300
    done = ddcl("fit", folder / "new.csv", "--k", 3, "--id", "name", "--out", folder / "model")
    fitted.EXAMPLES = before
    assert "new.csv: rows of 2 columns: east, north" in done.stdout and "3 clusters of 900 rows" in done.stdout and "report.html" in done.stdout
    return folder

def test_fit_says_what_it_found_and_writes_five_files(shop):
    assert sorted(os.listdir(shop)) == ["model", "moved.csv", "new.csv"]
    assert sorted(os.listdir(shop / "model")) == sorted(fitted.RESULT_FILES)
    page = (shop / "model" / "report.html").read_text()
    assert page.startswith("<!") and "shop 1" in page
    again = ddcl("fit", shop / "new.csv", "--k", 3, "--id", "name", "--out", shop / "model", "--json")
    facts = json.loads(again.stdout)
    assert again.stderr.splitlines() == ["model: this fit was finished before"]
    assert facts["rows"] == 900 and facts["counts"] == [300] * 3 and 0 < facts["tau"] < 1 and facts["notes"] == []

def test_predict(shop, tmp_path):
    import pyarrow.parquet as pq
    facts = json.loads(ddcl("predict", shop / "model", shop / "new.csv", "--out", tmp_path / "p.parquet", "--id", "name", "--json").stdout)
    assert facts["counts"] == [300] * 3 and pq.read_table(tmp_path / "p.parquet").equals(pq.read_table(shop / "model" / "assignments.parquet"))
    said = ddcl("predict", shop / "model", shop / "new.csv", "--out", tmp_path / "p.csv").stdout
    assert "33.3%" in said and len((tmp_path / "p.csv").read_text().splitlines()) == 901
    for out in ("p.txt", "p"):
        assert "--out: a new file whose name ends in .parquet or .csv" in error("predict", shop / "model", shop / "new.csv", "--out", tmp_path / out, code=2)
    assert "--out" in error("predict", shop / "model", shop / "new.csv", "--out", shop / "new.csv", code=2) and (shop / "new.csv").read_text().startswith("name")

def test_explain_adds_up(shop):
    why = json.loads(ddcl("explain", shop / "model", shop / "new.csv", "--row", 5, "--json").stdout)
    one, two = why["shares"][:2]
    assert [one["cluster"], two["cluster"]] == why["between"] and why["label"] == one["cluster"] and len(why["examples"]) == 5
    total = sum(piece["nats"] for piece in why["evidence"])
    assert total > 0 and (two["share"] < 1e-12 or abs(total - np.log(one["share"] / two["share"])) < 1e-3 * total)
    said = ddcl("explain", shop / "model", shop / "new.csv", "--row", 5).stdout
    assert f"row 5: cluster {why['label']}" in said and "east" in said and "Most like it" in said
    assert "has no row 900" in error("explain", shop / "model", shop / "new.csv", "--row", 900, code=2)
    assert "give either DATA and --row, or --text" in error("explain", shop / "model", shop / "new.csv", code=2)
    assert "--text: the model 'model' reads numbers" in error("explain", shop / "model", "--text", "hello", code=2)

def test_doctor(shop):
    assert ddcl("doctor", shop / "model", shop / "new.csv").stdout.startswith("Healthy: ")
    facts = json.loads(ddcl("doctor", shop / "model", shop / "moved.csv", "--json").stdout)
    assert facts["verdict"] == "changed" and facts["far"] > 0.3 and facts["moved"][0]["column"] == "east" and facts["layer"]["status"]

def test_errors_are_one_line_with_an_exit_code(shop, tmp_path):
    bad, model = tmp_path / "bad.csv", shop / "model"
    bad.write_text("a,b\n1,2\n3\n")
    assert error("fit", bad, "--out", tmp_path / "out", code=1) == "Error: bad.csv: row 1: expected 2 columns, got 1: 3"
    bad.write_text("a,b\n1,2\n3,\n")
    assert "bad.csv: row 1, column 'b': no number; --skip-missing" in error("fit", bad, "--out", tmp_path / "out", code=1)
    assert "none.csv: cannot be read (no such file or directory)" in error("fit", tmp_path / "none.csv", "--out", tmp_path / "out", code=1)
    assert "--k: a number of clusters" in error("fit", bad, "--k", "few", "--out", tmp_path / "out", code=2)
    assert "5 clusters were asked of 1 rows" in error("fit", bad, "--k", "5", "--skip-missing", "--out", tmp_path / "out", code=2)
    assert "no column 'c'" in error("fit", bad, "--column", "c", "--out", tmp_path / "out", code=2)
    assert "files that no fit has written" in error("fit", shop / "new.csv", "--out", shop, code=2)
    assert "--replace replaces it" in error("fit", shop / "new.csv", "--k", 2, "--out", model, code=2)
    assert "there is no such model" in error("predict", tmp_path / "gone", shop / "new.csv", "--out", tmp_path / "p.csv", code=1)
    assert "pickles are not loaded" in error("doctor", bad, shop / "new.csv", code=1)
    assert "no column 'east'" in error("doctor", model, bad, code=2)
    assert "/proc" in error("fit", shop / "new.csv", "--out", "/proc/none/here", code=1)
    assert sorted(os.listdir(tmp_path)) == ["bad.csv"]

def test_two_processes_on_one_folder(shop, tmp_path):
    with fitted.workplace(tmp_path / "out", "first"):
        assert error("fit", shop / "new.csv", "--out", tmp_path / "out", code=1) == "Error: out: another process is fitting into this folder"

def test_predictions_on_a_full_disk_or_into_a_folder_that_is_read_only(shop, tmp_path):
    import resource
    out, limits = tmp_path / "p.csv", resource.getrlimit(resource.RLIMIT_FSIZE)
    ddcl("predict", shop / "model", shop / "new.csv", "--out", out)
    before = out.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        assert "File too large" in error("predict", shop / "model", shop / "new.csv", "--out", out, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_bytes() == before and os.listdir(tmp_path) == ["p.csv"]
    assert "'/proc/p.csv'" in error("predict", shop / "model", shop / "new.csv", "--out", "/proc/p.csv", code=1)
    if os.geteuid():
        tmp_path.chmod(0o555)
        for command in (["predict", shop / "model", shop / "new.csv", "--out", tmp_path / "q.csv"], ["fit", shop / "new.csv", "--k", 2, "--out", tmp_path / "out"]):
            assert "Permission denied" in error(*command, code=1)
        tmp_path.chmod(0o755)

def test_text_in_another_encoding(shop, tmp_path):
    path = tmp_path / "old.csv"
    path.write_bytes("Größe,Maß\n1,2\n3,5\n9,9\n".encode("cp1252"))
    assert error("fit", path, "--out", tmp_path / "out", code=1) == "Error: old.csv: the header is not UTF-8 (byte 0xf6 at 2); name its encoding by --encoding, such as cp1252 or latin-1"
    assert "--encoding: no text encoding 'klingon'" in error("fit", path, "--encoding", "klingon", "--out", tmp_path / "out", code=2)
    assert "rows of 2 columns: Größe, Maß" in ddcl("fit", path, "--k", 2, "--encoding", "cp1252", "--out", tmp_path / "out").stdout
    assert json.loads(ddcl("predict", tmp_path / "out", path, "--encoding", "cp1252", "--out", tmp_path / "p.csv", "--json").stdout)["rows"] == 3
    assert "Größe" in ddcl("explain", tmp_path / "out", path, "--row", 1, "--encoding", "cp1252").stdout
    assert "not UTF-8" in error("doctor", tmp_path / "out", path, code=1)

def test_interrupted_it_says_so_and_goes_on(shop, tmp_path, monkeypatch):
    def stop(*a, **k): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(fitted, "write_assignments", stop)
        done = ddcl("fit", shop / "new.csv", "--k", 3, "--id", "name", "--out", tmp_path / "model", code=130)
    assert done.stderr.splitlines() == ["Stopped. The same command goes on from there."] and not (tmp_path / "model").exists()
    ddcl("fit", shop / "new.csv", "--k", 3, "--id", "name", "--out", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (shop / "model" / "model.safetensors").read_bytes()

def test_quiet_where_there_is_no_terminal_and_light_to_start(shop):
    done = subprocess.run([sys.executable, "-m", "ddcl_nb", "explain", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and "--row" in done.stdout
    script = "import sys, atexit; atexit.register(lambda: print([m for m in ('torch', 'numpy', 'sklearn', 'pyarrow') if m in sys.modules])); sys.argv = ['ddcl', 'fit', '--help']; from ddcl_nb.cli import main; main()"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120).stdout.splitlines()[-1] == "[]"

def test_words_of_others_do_not_steer_the_terminal():
    assert plain("a\x1b]0;title\x07b\r\n\u202ec") == "a ]0;title b c" and plain("word " * 40, 12) == "word word w…"
    shown = heat([{"word": "[CLS]", "nats": 0.0}, {"word": "proto\x1b", "nats": 2.0}])
    assert shown.plain == "[CLS] proto " and "rgb(255,120,120)" in str(shown.spans)
    assert clusters_asked("7") == 7
