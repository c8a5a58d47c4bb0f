"A fit that is killed, starved, crowded or fed with odd data; a model folder that is damaged or hostile. DDCL_KILLS is the number of random kills (3 here, 20 at night)."
import json, os, pickle, random, resource, shutil, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs

pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

from ddcl_nb import fitted
from ddcl_nb.encoders import TokenEmbeddings
from ddcl_nb.estimators import DDCLClusterer
from ddcl_nb.metrics import clustering_accuracy
from ddcl_nb.fitted import RESULT_FILES, Embedder, FitPlan, FittedModel, InUse, _checksum, fit_model, workplace, write_assignments
from ddcl_nb.sources import BadChoice, SourceError, open_source
from ddcl_nb.storage import StateError

KILLS = int(os.environ.get("DDCL_KILLS", 3))
SAME = ("model.safetensors", "training.safetensors", "assignments.parquet", "config.json")

@pytest.fixture(scope="module", autouse=True)
def few_examples():
    "The page of the report is not what is tested here: fewer documents on it take less time."
    fitted.EXAMPLES, before = 100, fitted.EXAMPLES
    yield
    fitted.EXAMPLES = before

def contents(folder): return {name: (folder / name).read_bytes() for name in SAME}

def table(path, X, names="abcdefgh", end=""):
    path.write_text(",".join(names[:X.shape[1]]) + "\n" + "".join(",".join(f"{x:.9g}" for x in row) + "\n" for row in X) + end)
    return path

@pytest.fixture(scope="module")
def points():
    return make_blobs(600, 3, centers=[[0, 0, 0], [9, 0, 0], [0, 9, 0]], random_state=0)[0]

@pytest.fixture(scope="module")
def result(tmp_path_factory, points):
    folder = tmp_path_factory.mktemp("fit")
    fit_model(FitPlan(table(folder / "points.csv", points), folder / "model", k=3))
    return folder / "model"

def copied(result, tmp_path):
    return Path(shutil.copytree(result, tmp_path / "copy"))

# the numbers

def test_in_memory_and_in_blocks_the_fit_is_that_of_the_estimator(tmp_path):
    X, _ = make_blobs(2000, 6, centers=9, cluster_std=2, random_state=0)
    np.save(tmp_path / "x.npy", X.astype(np.float32))
    model = fit_model(FitPlan(tmp_path / "x.npy", tmp_path / "out", k=9, seed=3))
    same = DDCLClusterer(9, random_state=3).fit(X.astype(np.float32))
    np.testing.assert_array_equal(model.clusterer.prototypes_, same.prototypes_)
    kept = pq.read_table(tmp_path / "out" / "assignments.parquet")
    np.testing.assert_array_equal(kept["label"], same.labels_); np.testing.assert_allclose(kept["probability"], same.probabilities_, atol=1e-4)
    np.testing.assert_allclose(model.clusterer.inertia_, same.inertia_, rtol=1e-5)
    assert sorted(os.listdir(tmp_path)) == ["out", "x.npy"] and sorted(os.listdir(tmp_path / "out")) == sorted(RESULT_FILES)

@pytest.mark.parametrize("options", [{"k": 8}, {"k": 4, "n_prototypes": 12}, {"k": 8, "tau": 0.05}])
def test_a_sample_refined_over_all_rows_is_within_two_per_cent_of_the_full_fit(tmp_path, monkeypatch, options):
    X, _ = make_blobs(6000, 3, centers=15, cluster_std=2.0, random_state=1)
    np.save(tmp_path / "x.npy", X)
    full = fit_model(FitPlan(tmp_path / "x.npy", tmp_path / "full", **options)).clusterer
    monkeypatch.setattr(fitted, "SAMPLE_ROWS", 1500); monkeypatch.setattr(fitted, "SAMPLE_PER_PROTOTYPE", 50)
    part = fit_model(FitPlan(tmp_path / "x.npy", tmp_path / "part", **options))
    assert part.config["data"]["sample"] == 1500 and part.config["data"]["steps"] > 0
    assert part.clusterer.inertia_ < 1.02 * full.inertia_
    assert abs(part.clusterer.tau_ / full.tau_ - 1) < 0.1 and part.training.counts.sum() == 6000

def test_standardised_or_as_they_are(tmp_path, points):
    path = table(tmp_path / "p.csv", points * [1, 1000, 1])
    standard, plain = (fit_model(FitPlan(path, tmp_path / scale, k=3, scale=scale)) for scale in ("standard", "none"))
    np.testing.assert_allclose(standard.training.deviation, 1, rtol=1e-6); np.testing.assert_allclose(plain.reads.scale, 1)
    label, of_plain = (pq.read_table(tmp_path / scale / "assignments.parquet")["label"].to_numpy() for scale in ("standard", "none"))
    assert clustering_accuracy(label, of_plain) < 0.9, "a column in larger units decides alone"
    again = FittedModel.load(tmp_path / "standard")
    np.testing.assert_array_equal(again.clusterer.predict(again.reads.scaled(open_source(path).blocks().__next__().values)), label)

def test_what_a_user_should_know_is_noted(tmp_path, points):
    notes = lambda X, **options: fit_model(FitPlan(table(tmp_path / "n.csv", X), tmp_path / "n", **{"k": 2, **options}), replace=True).config["notes"]
    assert notes(points) == []
    assert notes(np.column_stack([points, np.full(600, 7.3), points[:, 0]])) == ["columns that do not vary: 'd'", "equal columns count twice: 'a' = 'e'"]
    assert notes(np.repeat(points[:3], 5, 0), k=6) == ["6 clusters were asked, but there are only 3 different rows"]
    assert notes(np.ones((9, 2)), k=1) == ["columns that do not vary: 'a', 'b'"]

def test_odd_data_are_fitted_or_refused_in_one_line(tmp_path):
    fit = lambda X, **options: fit_model(FitPlan(table(tmp_path / "o.csv", np.asarray(X, dtype=float)), tmp_path / "o", **options), replace=True)
    assert fit([[1], [2], [9]], k=2).training.counts.tolist() in ([2, 1], [1, 2])
    with pytest.raises(SourceError, match="row 1, column 'a': 2e\\+300 is too large"): fit([[1], [2e300], [9e299]], k=2)
    with pytest.raises(SourceError, match="o.csv: its numbers differ by less than 1e-100"): fit([[1e-300], [2e-300], [9e-300]], k=2)
    assert fit([[5.5]], k=1).training.counts.tolist() == [1] and fit([[5.5, 1.0]], k="auto").training.counts.tolist() == [1]
    for options in ({"k": 4}, {"k": 2, "n_prototypes": 4}):
        with pytest.raises(BadChoice, match="o.csv: 4 clusters were asked of 3 rows"): fit([[1], [2], [3]], **options)
    table(tmp_path / "o.csv", np.ones((2, 2)), end="1,\n")
    with pytest.raises(SourceError, match="row 2, column 'b'"): fit_model(FitPlan(tmp_path / "o.csv", tmp_path / "p", k=1))
    assert not (tmp_path / "p").exists()
    assert fit_model(FitPlan(tmp_path / "o.csv", tmp_path / "p", k=1, skip_missing=True)).config["data"]["rows"] == 2

# nothing lost

def test_killed_at_random_moments_the_same_call_ends_with_the_same_bytes(tmp_path):
    "A process that has everything imported forks the fits, so that a kill falls into the fit and not into the imports."
    script = """if 1:
        import os, random, signal, sys, time
        import torch; torch.set_num_threads(1)
        import numpy as np
        from pathlib import Path
        from ddcl_nb import fitted, page; import ddcl_nb.data, sklearn.cluster, pyarrow.parquet, pyarrow.csv, filelock, threadpoolctl
        fitted.EXAMPLES, fitted.SAMPLE_ROWS, folder, kills, rng = 100, 2000, Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
        np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(20_000, 3)) ** 3)
        def start(name):
            if (pid := os.fork()) == 0:
                try: fitted.fit_model(fitted.FitPlan(folder / "x.npy", folder / name, k=4)); os._exit(0)
                except BaseException as error: print(repr(error), flush=True); os._exit(1)
            return pid
        began = time.time(); assert os.waitpid(start("whole"), 0)[1] == 0; whole = time.time() - began
        killed, delay = 0, 0
        for attempt in range(kills):
            pid = start("killed"); time.sleep(rng.uniform(0, whole)); os.kill(pid, signal.SIGKILL)
            killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
            assert not (folder / "killed").exists() or len(os.listdir(folder / "killed")) == 5
            if (folder / "killed").exists(): os.rename(folder / "killed", folder / f"done-{attempt}")
        assert os.waitpid(start("killed"), 0)[1] == 0
        ends = [os.waitpid(pid, 0)[1] for pid in [start("crowd") for _ in range(3)]]
        assert 0 in ends and os.waitpid(start("crowd"), 0)[1] == 0
        print(killed)
    """
    seed = random.randrange(10**6)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(KILLS), str(seed)], capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, (seed, done.stdout, done.stderr)
    whole = contents(tmp_path / "whole")
    for folder in [tmp_path / "killed", tmp_path / "crowd", *tmp_path.glob("done-*")]:
        assert contents(folder) == whole, (seed, folder)
    assert set(done.stdout.splitlines()[:-1]) <= {"InUse('crowd: another process is fitting into this folder')"}
    assert int(done.stdout.split()[-1]) > 0 and not list(tmp_path.glob(".*"))

def test_a_full_disk_loses_nothing(tmp_path, result, points):
    path, out = table(tmp_path / "points.csv", points), tmp_path / "out"
    fit_model(FitPlan(path, out, k=2))
    before, limits = contents(out), resource.getrlimit(resource.RLIMIT_FSIZE)
    stops = 0
    for size in (100, 2000, 15_000, 40_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            fit_model(FitPlan(path, out, k=3), replace=True)
        except OSError as error:
            stops += 1
            assert "\n" not in str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if stops and contents(out) != before: break
    assert stops and fit_model(FitPlan(path, out, k=3), replace=True).clusterer.n_clusters_ == 3
    assert {n: b for n, b in contents(out).items() if n != "config.json"} == {n: b for n, b in contents(result).items() if n != "config.json"}

def test_an_unfinished_fit_of_other_data_or_options_is_not_taken_up(tmp_path, points, monkeypatch):
    path = table(tmp_path / "points.csv", points)
    def cut(*a, **k): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(fitted, "write_assignments", cut)
        with pytest.raises(KeyboardInterrupt): fit_model(FitPlan(path, tmp_path / "out", k=2))
    table(path, points[:300])
    model = fit_model(FitPlan(path, tmp_path / "out", k=3))
    assert model.clusterer.n_clusters_ == 3 and model.training.counts.sum() == 300 and not list(tmp_path.glob(".*"))

def test_damaged_stages_are_made_again(tmp_path, points, monkeypatch):
    path = table(tmp_path / "points.csv", points)
    def cut(*a, **k): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(fitted, "write_report", cut)
        with pytest.raises(KeyboardInterrupt): fit_model(FitPlan(path, tmp_path / "out", k=3))
    place = tmp_path / ".out.partial"
    for name in ("scan.safetensors", "sample-model.safetensors", "assigned.safetensors"):
        (place / name).write_bytes((place / name).read_bytes()[:-7])
    fit_model(FitPlan(path, tmp_path / "out", k=3)); fit_model(FitPlan(path, tmp_path / "fresh", k=3))
    assert {n: b for n, b in contents(tmp_path / "out").items()} == contents(tmp_path / "fresh")

def test_a_switch_that_was_cut_in_the_middle_is_undone(tmp_path, points, monkeypatch):
    path, out = table(tmp_path / "points.csv", points), tmp_path / "out"
    fit_model(FitPlan(path, out, k=2))
    before, rename, calls = contents(out), os.rename, []
    def cut(*a):
        calls.append(a)
        if len(calls) == 2: raise KeyboardInterrupt
        rename(*a)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", cut)
        with pytest.raises(KeyboardInterrupt): fit_model(FitPlan(path, out, k=3), replace=True)
    assert not out.exists()
    with workplace(out, "something else"): assert contents(out) == before

def test_two_processes_cannot_fit_into_one_folder(tmp_path, points):
    path = table(tmp_path / "points.csv", points)
    with workplace(tmp_path / "out", "first"):
        with pytest.raises(InUse, match="^out: another process is fitting into this folder$"): fit_model(FitPlan(path, tmp_path / "out", k=3))
    fit_model(FitPlan(path, tmp_path / "out", k=3))

def test_results_and_other_files_are_not_overwritten_unasked(tmp_path, points, result):
    path, out = table(tmp_path / "points.csv", points), copied(result, tmp_path)
    before = contents(out)
    with pytest.raises(BadChoice, match="'copy' holds the result of another fit; --replace replaces it"): fit_model(FitPlan(path, out, k=2))
    (out / "thesis.doc").touch()
    with pytest.raises(BadChoice, match="holds files that no fit has written .thesis.doc."): fit_model(FitPlan(path, out, k=2), replace=True)
    with pytest.raises(BadChoice, match="'points.csv' is a file"): fit_model(FitPlan(path, path, k=2), replace=True)
    with pytest.raises(BadChoice, match="no fit has written"): fit_model(FitPlan(path, tmp_path, k=2), replace=True)
    assert contents(out) == before and (out / "thesis.doc").exists()

def test_a_folder_that_cannot_be_written_is_an_error(points, tmp_path):
    with pytest.raises(OSError): fit_model(FitPlan(table(tmp_path / "points.csv", points), Path("/proc/no/such"), k=2))

# texts, by an encoder of our own

class Letters:
    "An encoder whose tokens are words, embedded by counting letters."
    dim, fingerprint, dtype, calls = 26, "letters", torch.float32, 0
    def __init__(self, name): self.name = name
    def tokens(self, texts, max_length, **options):
        Letters.calls += len(texts)
        words = [[*text.lower().split(), "."][:max_length] for text in texts]
        E = torch.zeros(len(texts), max(map(len, words)), 26)
        for i, line in enumerate(words):
            for j, word in enumerate(line):
                for c in word: E[i, j, (ord(c) - 97) % 26] += 1
        return TokenEmbeddings(E, torch.arange(E.shape[1]) < torch.tensor([len(w) for w in words])[:, None])

@pytest.fixture
def letters(monkeypatch, tmp_path):
    monkeypatch.setattr("ddcl_nb.encoders.Encoder", Letters); monkeypatch.setenv("DDCL_CACHE", str(tmp_path / "cache"))
    Letters.calls = 0
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": random.Random(i).choice(["aaa abba baba", "zzz yyz zyzy"]) + f" {'ab' * (i % 3)}"}) + "\n" for i in range(1100)))
    return tmp_path

def test_texts_are_embedded_once_and_a_damaged_cache_is_made_again(letters):
    model = fit_model(FitPlan(letters / "docs.jsonl", letters / "one", k=2))
    assert Letters.calls == 1100 and sorted(model.training.counts) == sorted(np.bincount([random.Random(i).choice([0, 1]) for i in range(1100)]))
    fit_model(FitPlan(letters / "docs.jsonl", letters / "two", k=3))
    assert Letters.calls == 1100
    damaged, flipped, _ = sorted((letters / "cache" / "vectors").rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:50]); content = bytearray(flipped.read_bytes()); content[-9] ^= 4; flipped.write_bytes(content)
    again = fit_model(FitPlan(letters / "docs.jsonl", letters / "again", k=2))
    assert Letters.calls > 1100 and {**contents(letters / "again"), "config.json": b""} == {**contents(letters / "one"), "config.json": b""}
    assert again.training.texts[0].split()[0] in ("aaa", "zzz")

def test_another_encoder_must_be_named_and_must_be_the_same(letters, monkeypatch):
    model = fit_model(FitPlan(letters / "docs.jsonl", letters / "out", k=2, encoder="somebody/letters"))
    with pytest.raises(BadChoice, match="read by the encoder 'somebody/letters'; name it by --encoder"): model.embedder()
    assert model.embedder("somebody/letters").max_length == 64
    monkeypatch.setattr(Letters, "fingerprint", "others")
    with pytest.raises(BadChoice, match="its weights differ"): model.embedder("somebody/letters")

# nobody let in

def rewritten(copy, change):
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps({**config, "checksum": _checksum(config)}))

HOSTILE = {
    "a key that names code": lambda c: rewritten(c, lambda config: config.update(auto_map={"AutoModel": "evil.Model"})),
    "a key inside": lambda c: rewritten(c, lambda config: config["reads"].update(trust_remote_code=True)),
    "a path as a file": lambda c: rewritten(c, lambda config: config.update(files={"../../etc/passwd": "0" * 64})),
    "another width": lambda c: rewritten(c, lambda config: config["reads"].update(width=4)),
    "text for numbers": lambda c: rewritten(c, lambda config: config["reads"].update(scale=["1", "2", "3"])),
    "no object": lambda c: (c / "config.json").write_text("[]"),
    "infinity": lambda c: (c / "config.json").write_text((c / "config.json").read_text().replace('"seed": 0', '"seed": Infinity')),
    "a changed number": lambda c: (c / "config.json").write_text((c / "config.json").read_text().replace('"seed": 0', '"seed": 1')),
    "not UTF-8": lambda c: (c / "config.json").write_bytes(b"\xff\xfe{}"),
    "a folder for a file": lambda c: ((c / "config.json").unlink(), (c / "config.json").mkdir()),
    "a file of another model": lambda c: DDCLClusterer(2).fit(np.random.default_rng(0).normal(size=(9, 3))).save(c / "model.safetensors"),
    "a pickle": lambda c: (c / "model.safetensors").write_bytes(pickle.dumps({"weights": 1})),
    "nothing": lambda c: (c / "model.safetensors").unlink(),
    "a link out": lambda c: (shutil.move(c / "training.safetensors", c.parent / "away"), (c / "training.safetensors").symlink_to(c.parent / "away")),
    "a link to itself": lambda c: ((c / "config.json").unlink(), (c / "config.json").symlink_to("config.json")),
}

@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_or_damaged_model_is_refused_in_one_line(tmp_path, result, what):
    HOSTILE[what](copy := copied(result, tmp_path))
    with pytest.raises(StateError) as caught: FittedModel.load(copy)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("copy: ") and str(tmp_path) not in str(caught.value)

def test_pickles_are_never_loaded(tmp_path):
    class Boom:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "boom"),)
    for name in ("model.pkl", "model.pt", "pytorch_model.bin", "model.joblib"):
        (tmp_path / name).write_bytes(pickle.dumps(Boom()))
        with pytest.raises(StateError, match="files such as pickles are not loaded"): FittedModel.load(tmp_path / name)
        with pytest.raises(StateError, match="config.json is missing"): FittedModel.load(tmp_path)
    with pytest.raises(StateError, match="there is no such model"): FittedModel.load(tmp_path / "none")
    assert not (tmp_path / "boom").exists()

def test_no_mutated_model_breaks_its_reader(tmp_path, result):
    rng, copy = random.Random(0), copied(result, tmp_path)
    for count in range(int(os.environ.get("DDCL_FUZZ", 500)) // 10):
        name = ("config.json", "model.safetensors", "training.safetensors")[count % 3]
        content = bytearray((result / name).read_bytes())
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(len(content))
            if rng.random() < 0.6: content[i] ^= 1 << rng.randrange(8)
            else: del content[i:i + rng.choice([1, 9, 10**6])]
        (copy / name).write_bytes(content)
        if name != "config.json" and count % 2: rewritten(copy, lambda config: config["files"].update({name: fitted._file_digest(copy / name)}))
        try:
            FittedModel.load(copy)
        except StateError as error:
            assert "\n" not in str(error)
        for file in ("config.json", name): shutil.copy(result / file, copy / file)

# other rows

def test_assignments_as_parquet_and_csv(tmp_path, result, points):
    model, path = FittedModel.load(result), table(tmp_path / "new.csv", points)
    source = model.open(path)
    for out in (tmp_path / "a.parquet", tmp_path / "a.csv"):
        counts, inertia = write_assignments(out, model.clusterer, model.blocks(source))
        assert counts.tolist() == model.training.counts.tolist() and abs(inertia / model.clusterer.inertia_ - 1) < 1e-9
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines[0] == '"row","label","probability","distance"' and len(lines) == 601
    assert [int(line.split(",")[1]) for line in lines[1:]] == pq.read_table(tmp_path / "a.parquet")["label"].to_pylist()

def test_data_that_the_model_cannot_read(tmp_path, result, points):
    model = FittedModel.load(result)
    np.save(tmp_path / "x.npy", points[:, :2]); (tmp_path / "t.csv").write_text("a,c\n1,2\n"); (tmp_path / "d").mkdir(); (tmp_path / "d" / "a.txt").write_text("words")
    with pytest.raises(BadChoice, match="x.npy: the model reads 3 columns of numbers, this is 2"): model.open(tmp_path / "x.npy")
    with pytest.raises(BadChoice, match="t.csv: no column 'b'"): model.open(tmp_path / "t.csv")
    with pytest.raises(BadChoice, match="d: the model reads 3 columns of numbers, this is texts"): model.open(tmp_path / "d")
