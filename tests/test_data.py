"Data: what a notebook should not carry: damaged files, downloads that fail, absent data, the physics at scale, scikit-learn's own rule as an oracle."
import gzip
import hashlib
import http.server
import lzma
import pickle
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ddcl_nb import data
from ddcl_nb.extras import require

SPLITS = {"20newsgroups": ["train", "test"], "sst2": ["train", "dev", "test"], "imdb": ["train", "test"], "mnist": ["train", "test"], "cifar10": ["train", "test"],
          "ecg5000": ["train", "test"], "modelnet10": ["train", "test"], "wikitext2": ["train", "valid", "test"], "aeslc": ["train", "dev", "test"],
          "scitldr": ["train", "dev", "test"]}
FROM_FILES = [name for name, entry in data.DATASETS.items() if entry.files]


def need(name: str) -> data.Entry:
    "The entry of a data set, or skip where none of its files is here."
    entry = data.DATASETS[name]
    if not any(data.locate(*names) for names in entry.files):
        pytest.skip(f"{entry.title}: not on this machine")
    return entry


@pytest.fixture
def empty(tmp_path, monkeypatch):
    "A machine without data: only an empty folder is looked at, and it is the cache too."
    monkeypatch.setenv("DDCL_CACHE", str(tmp_path))
    monkeypatch.delenv("DDCL_DATA", raising=False)
    monkeypatch.setattr(data, "data_folders", lambda: [("the cache", tmp_path / "data")])
    return tmp_path / "data"


def publish(monkeypatch, files: dict[str, Path]) -> list[str]:
    "Let addresses that end in a key of `files` be those files; returns the list of addresses that will be asked for."
    asked = []
    real = data.urlopen

    def open_address(request, timeout):
        asked.append(request.full_url)
        match = next((file for end, file in files.items() if request.full_url.endswith(end)), None)
        if match is None:
            raise OSError("no such address")
        return real(match.as_uri(), timeout=timeout)
    monkeypatch.setattr(data, "urlopen", open_address)
    return asked


def test_import_is_light():
    "Importing the module brings none of the heavy packages."
    code = "import sys, ddcl_nb.data; print([m for m in ('pandas', 'pyarrow', 'sklearn', 'torchvision', 'transformers', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- optional packages

def test_require_names_the_extra():
    with pytest.raises(ImportError, match=r"no_such_package is not installed.*ddcl_nb\[data\]"):
        require("no_such_package.parquet", "data")


def test_require_keeps_the_error_of_a_broken_package(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import something_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_that_is_missing"):
        require("broken_package", "data")


# ---- where data is looked for

def test_order_of_folders(tmp_path, monkeypatch):
    project, named = tmp_path / "work" / "project" / "nbs", tmp_path / "named"
    shared, cache = tmp_path / "work" / "shared" / "data", tmp_path / "cache"
    for folder in (project, shared, named, cache / "data"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(project)
    monkeypatch.setenv("DDCL_CACHE", str(cache))
    monkeypatch.setenv("DDCL_DATA", str(named))
    assert [folder for _, folder in data.data_folders()] == [named, shared, cache / "data"]
    for folder in (cache / "data", shared, named):
        (folder / "a.txt").write_text("")
        assert data.locate("a.txt") == folder / "a.txt"
        assert data.found_in(folder / "a.txt") in ("the cache", "the shared data folder", "the folder DDCL_DATA")


def test_alternatives_are_in_order_of_preference(empty):
    empty.mkdir()
    (empty / "second").touch()
    assert data.locate("first", "second").name == "second"
    (empty / "first.xz").touch()
    assert data.locate("first", "second").name == "first.xz"


@pytest.mark.parametrize("name", FROM_FILES)
def test_absent_data_says_where_it_was_looked_for_and_how_to_get_it(name, empty):
    with pytest.raises(data.DataNotFound) as caught:
        data.DATASETS[name].load()
    message = str(caught.value)
    assert "\n" not in message and str(empty) not in message
    for part in (repr(name), "the cache", "DDCL_DATA is not set", f"ddcl data --download {name}", "download=True"):
        assert part in message
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("name", FROM_FILES)
def test_no_network_unless_asked(name, empty, monkeypatch):
    asked = publish(monkeypatch, {})
    with pytest.raises(data.DataNotFound):
        data.DATASETS[name].load()
    assert asked == []


@pytest.mark.parametrize("name", sorted(set(FROM_FILES) - {"20newsgroups"}))
def test_a_failing_download_leaves_nothing(name, empty, monkeypatch):
    "The network is away: one line, and no file, not even a temporary one."
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    asked = publish(monkeypatch, {})
    with pytest.raises(data.DownloadFailed, match="download from .* failed: no such address") as caught:
        data.DATASETS[name].load(download=True)
    assert "\n" not in str(caught.value) and len(asked) == 1
    assert not [file for file in empty.rglob("*") if file.is_file()]


def test_newsgroups_download_failure_is_one_line(empty, monkeypatch):
    import sklearn.datasets

    def away(**_):
        raise OSError("host is away\nand more")
    monkeypatch.setattr(sklearn.datasets, "fetch_20newsgroups", away)
    with pytest.raises(data.DownloadFailed, match="host is away$"):
        data.load_20newsgroups(download=True)


@pytest.mark.parametrize("name", ["sst2", "imdb", "wikitext2"])
def test_hub_switch_is_respected(name, empty, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = publish(monkeypatch, {})
    with pytest.raises(data.DownloadFailed, match="HF_HUB_OFFLINE is set"):
        data.DATASETS[name].load(download=True)
    assert asked == []


def test_hub_mirror(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert data.hub_url("a/b", "c.parquet") == "https://mirror.example/datasets/a/b/resolve/main/c.parquet"


# ---- fetching from a real server

@pytest.fixture
def server():
    "A server on this machine: /whole answers, /short announces more than it sends, /slow cuts the line, anything else is 404."
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = {"/whole": 5, "/short": 5000}
            self.send_response(200 if self.path in known else 404)
            self.send_header("Content-Length", str(known.get(self.path, 0)))
            self.end_headers()
            self.wfile.write(b"hello" if self.path in known else b"")

        def log_message(self, *_):
            pass
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def test_fetch_whole(server, tmp_path):
    assert data.fetch(f"{server}/whole", tmp_path / "a" / "whole", md5=hashlib.md5(b"hello").hexdigest()).read_text() == "hello"


@pytest.mark.parametrize("path, md5, reason", [("/short", None, "5 of 5,000 bytes|IncompleteRead"), ("/none", None, "Not Found"), ("/whole", "0" * 32, "MD5")])
def test_fetch_failures_leave_nothing_and_keep_the_old_file(server, tmp_path, path, md5, reason):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(data.DownloadFailed, match=f"^file: download from 127.0.0.1:.* failed: .*({reason})") as caught:
        data.fetch(server + path, target, md5)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and target.read_text() == "old"


# ---- downloads are rewritten into the layout that the loaders read

def test_sst2_from_the_hub(empty, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    raw = tmp_path / "raw.parquet"
    data.write_parquet(raw, {"idx": [0, 1], "sentence": ["a fine \"film\" ", "dull "], "label": [1, 0]})
    publish(monkeypatch, {".parquet": raw})
    loaded = data.load_sst2("dev", download=True)
    assert loaded.inputs == ['a fine "film"', "dull"] and loaded.labels.tolist() == [1, 0]
    assert loaded.source == "downloaded from the Hugging Face hub (stanfordnlp/sst2)"
    assert data.load_sst2("train").source == "found in the cache"
    with pytest.raises(data.DataNotFound, match="does not have this part"):
        data.load_sst2("test", download=True)


def test_imdb_from_the_hub_is_the_full_set(empty, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    raw = tmp_path / "raw.parquet"
    data.write_parquet(raw, {"text": ["good", "bad", "ugly"], "label": [1, 0, 0]})
    publish(monkeypatch, {".parquet": raw})
    loaded = data.load_imdb("test", download=True)
    assert loaded.inputs == ["good", "bad", "ugly"] and loaded.note == "" and loaded.split == "test"


def test_wikitext_and_scitldr_and_shakespeare(empty, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    raw, lines, plays = tmp_path / "raw.parquet", tmp_path / "train.jsonl", tmp_path / "input.txt"
    data.write_parquet(raw, {"text": [" = A = \n", " \n", " a line \n"]})
    lines.write_text('{"source": ["One.", "Two."], "target": ["Short."], "title": "T"}\n')
    plays.write_text("A:\nHark.\n\nB:\nWhat?\n")
    publish(monkeypatch, {".parquet": raw, ".jsonl": lines, "input.txt": plays})
    assert data.load_wikitext2("train", download=True).inputs == ["= A =", "a line"]
    tldr = data.load_scitldr("train", download=True)
    assert tldr.inputs == ["One. Two."] and tldr.targets == [["Short."]] and tldr.labels is None
    assert data.load_tinyshakespeare(download=True).inputs == ["A:\nHark.", "B:\nWhat?"]


def test_splice_and_ecg_from_their_archives(empty, tmp_path, monkeypatch):
    splice, beats = tmp_path / "splice.data", tmp_path / "ECG5000.zip"
    splice.write_text("EI,  A-1,      ACGT\nN ,  B-2,      TTTT\n\n")
    with zipfile.ZipFile(beats, "w") as archive:
        for split in ("TRAIN", "TEST"):
            archive.writestr(f"ECG5000_{split}.txt", "1.0 0.5 0.25\n4.0 -0.5 1e0\n")
    publish(monkeypatch, {"splice.data": splice, ".zip": beats})
    genes = data.load_splice(download=True)
    assert genes.inputs == ["ACGT", "TTTT"] and genes.labels.tolist() == [0, 2]
    assert data.load_ecg5000("test", "kind", download=True).labels.tolist() == [0, 3]
    assert data.load_ecg5000("test").labels.tolist() == [0, 1]


def test_mails_and_shapes_from_their_archives(empty, tmp_path, monkeypatch):
    mails, shapes = tmp_path / "master.zip", tmp_path / "ModelNet10.zip"
    with zipfile.ZipFile(mails, "w") as archive:
        archive.writestr("AESLC-master/enron_subject_line/dev/ann_1.subject", "Hello @all\n\n@subject\nTea\n\n@ann0\nHot tea\n")
        archive.writestr("AESLC-master/README.md", "")
    cube = "8 12 0\n" + "\n".join(f"{x} {y} {z}" for x in (0, 1) for y in (0, 1) for z in (0, 1)) + "\n" + "\n".join(
        f"3 {a} {b} {c}" for a, b, c in [(0, 1, 3), (0, 3, 2), (4, 5, 7), (4, 7, 6), (0, 1, 5), (0, 5, 4), (2, 3, 7), (2, 7, 6), (0, 2, 6), (0, 6, 4), (1, 3, 7), (1, 7, 5)])
    with zipfile.ZipFile(shapes, "w") as archive:
        for kind, split, head in (("bed", "train", "OFF\n"), ("sofa", "train", "OFF"), ("bed", "test", "OFF\n")):
            archive.writestr(f"ModelNet10/{kind}/{split}/{kind}_1.off", head + cube)
    publish(monkeypatch, {"master.zip": mails, "ModelNet10.zip": shapes})
    mail = data.load_aeslc("dev", download=True)
    assert mail.inputs == ["Hello @all"] and mail.targets == [["Tea", "Hot tea"]]
    train, test = data.load_modelnet10("train", download=True), data.load_modelnet10("test")
    assert train.inputs.shape == (2, 1024, 3) and train.labels.tolist() == [0, 1] and test.label_names == ["bed", "sofa"]
    np.testing.assert_allclose(np.linalg.norm(train.inputs, axis=2).max(1), 1, atol=1e-4)
    low, high = train.inputs[0].min(0), train.inputs[0].max(0)
    on_a_face = np.abs((train.inputs[0] - low) / (high - low) - 0.5) > 0.499
    assert on_a_face.any(1).all()


def test_satcat_from_celestrak(empty, tmp_path, monkeypatch):
    header = "OBJECT_NAME,OBJECT_ID,NORAD_CAT_ID,OBJECT_TYPE,OPS_STATUS_CODE,OWNER,LAUNCH_DATE,LAUNCH_SITE,DECAY_DATE,PERIOD,INCLINATION,APOGEE,PERIGEE,RCS,DATA_STATUS_CODE,ORBIT_CENTER,ORBIT_TYPE"
    rows = ["STATION,1998-067A,25544,PAY,+,ISS,1998-11-20,TYMSC,,92.9,51.64,423,415,399.1,,EA,ORB",
            "GONE,1957-001B,2,PAY,D,CIS,1957-10-04,TYMSC,1958-01-03,96.2,65.1,938,214,,,EA,IMP",
            "MARTIAN,2001-013A,26734,PAY,+,US,2001-04-07,AFETR,,117.8,93.0,450,370,,,MA,ORB",
            "UNKNOWN,2020-001A,45000,DEB,,US,2020-01-01,AFETR,,,,,,,NEA,EA,ORB",
            "STATIONARY,2000-001A,26000,PAY,+,US,2000-01-01,AFETR,,1436.1,0.05,35795,35780,,,EA,ORB",
            "SWAPPED,2000-001B,26001,DEB,,US,2000-01-01,AFETR,,100,50,300,900,,,EA,ORB"]
    raw = tmp_path / "satcat.csv"
    raw.write_text("\n".join([header, *rows]) + "\n")
    publish(monkeypatch, {"satcat.csv": raw})
    loaded = data.load_space_catalogue(download=True)
    assert [loaded.label_names[label] for label in loaded.labels] == ["LEO", "GEO"]
    assert loaded.inputs.shape == (2, 4) and len(loaded.feature_names) == 4


def test_mnist_and_cifar_only_with_their_published_md5(empty, tmp_path, monkeypatch):
    fake = tmp_path / "fake"
    fake.write_bytes(b"not the file")
    publish(monkeypatch, {"ubyte.gz": fake, "cifar-10-python.tar.gz": fake})
    for load in (data.load_mnist, data.load_cifar10):
        with pytest.raises(data.DownloadFailed, match="MD5"):
            load(download=True)


def small_cifar(monkeypatch, folder: Path, names: list[str], suffix: str = "") -> None:
    "Write tiny batches and publish their MD5s."
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        raw = pickle.dumps({b"data": np.full((2, 3072), number, dtype=np.uint8), b"labels": [number, 9]})
        monkeypatch.setitem(data._CIFAR10, name, hashlib.md5(raw).hexdigest())
        (folder / (name + suffix)).write_bytes(lzma.compress(raw) if suffix else raw)


def test_cifar_says_which_batches_are_here(empty, monkeypatch):
    small_cifar(monkeypatch, empty / "cifar10" / "cifar-10-batches-py", ["data_batch_1", "data_batch_4"], ".xz")
    loaded = data.load_cifar10("train")
    assert loaded.inputs.shape == (4, 3, 32, 32) and loaded.labels.tolist() == [0, 9, 1, 9]
    assert loaded.note == "2 of 5 training batches: data_batch_1, data_batch_4"
    with pytest.raises(data.DataNotFound, match="test_batch"):
        data.load_cifar10("test")


def test_cifar_download_brings_all_batches(empty, tmp_path, monkeypatch):
    small_cifar(monkeypatch, tmp_path / "cifar-10-batches-py", list(data._CIFAR10))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    real = data.fetch
    monkeypatch.setattr(data, "fetch", lambda url, path, md5=None: real(url, path))
    publish(monkeypatch, {"cifar-10-python.tar.gz": tmp_path / "cifar-10-python.tar.gz"})
    assert len(data.load_cifar10("train", download=True)) == 10 and data.load_cifar10("test").labels.tolist() == [5, 9]
    assert data.whereabouts(data.DATASETS["cifar10"]) == "the cache"


def test_a_pickle_that_is_not_the_published_file_is_never_opened(empty, tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)
    folder = empty / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (folder / "test_batch").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(data.DataUnreadable, match="test_batch cannot be read .*MD5.*not unpickled"):
        data.load_cifar10("test")
    assert not (tmp_path / "sprung").exists()


# ---- damaged files

@pytest.mark.parametrize("name", FROM_FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_damaged_files_are_named(name, damage, empty, monkeypatch):
    "Real files, cut in the middle, emptied, or overwritten with something else, are reported by name in one line, for whatever format they have."
    monkeypatch.undo()
    entry = need(name)
    split = SPLITS.get(name, [None])[0 if name not in ("wikitext2", "cifar10") else 1]
    arguments = [split] if split else []
    originals = [path for path in (data.locate(*names) for names in entry.files) if path and path.stat().st_size < 3e7 and (name != "cifar10" or "test" in path.name)]
    roots = [folder for _, folder in data.data_folders()]
    monkeypatch.setattr(data, "data_folders", lambda: [("the cache", empty)])
    for path in originals:
        copy = empty / next(path.relative_to(root) for root in roots if path.is_relative_to(root))
        copy.parent.mkdir(parents=True, exist_ok=True)
        raw = path.read_bytes()
        copy.write_bytes({"cut": raw[:len(raw) // 2], "empty": b"", "foreign": b"<html>not found</html>\n"}[damage])
    with pytest.raises(data.DataUnreadable, match=r"cannot be read \(.+\); delete it and get it again") as caught:
        entry.load(*arguments)
    assert "\n" not in str(caught.value) and str(empty) not in str(caught.value)


def test_missing_parquet_reader_names_the_extra(tmp_path, monkeypatch, empty):
    (empty / "imdb").mkdir(parents=True)
    (empty / "imdb" / "imdb.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"ddcl_nb\[data\]"):
        data.load_imdb()


# ---- arguments

@pytest.mark.parametrize("name", sorted(SPLITS))
def test_unknown_split_is_named(name):
    with pytest.raises(ValueError, match="split must be one of .*; got 'training'"):
        data.DATASETS[name].load("training")


@pytest.mark.parametrize("arguments, message", [(dict(n_per_regime=0), "n_per_regime must be at least 1, got 0"), (dict(noise=-1), "noise .* got -1"),
                                                (dict(noise=float("nan")), "noise .* got nan"), (dict(noise=float("inf")), "noise .* got inf")])
def test_synthetic_orbits_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.synthetic_orbits(**arguments)


@pytest.mark.parametrize("arguments, error, message", [(dict(max_docs=0), ValueError, "max_docs .* got 0"), (dict(packages=()), ValueError, "packages"),
                                                       (dict(packages=("os",)), ValueError, "got 'os'")])
def test_docstring_corpus_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        data.docstring_corpus(**arguments)


def test_docstrings_of_an_absent_package():
    with pytest.raises(ImportError, match="'no_such_package' is not installed"):
        next(data.docstrings("no_such_package"))


def test_unknown_download():
    with pytest.raises(ValueError, match="name must be one of .*got 'nothing'"):
        data.download_data("nothing")


# ---- physics

def test_kepler_without_noise():
    orbits = data.synthetic_orbits(2000, noise=0).inputs
    expected = 2 * np.pi * np.sqrt(orbits[:, 0] ** 3 / 398_600.4418) / 60
    np.testing.assert_allclose(orbits[:, 5], expected, rtol=1e-9)


@pytest.mark.parametrize("noise", [0, 0.5, 1, 3, 10, 100])
@pytest.mark.parametrize("seed", [0, 42])
def test_every_orbit_stays_above_the_ground(noise, seed):
    axis, eccentricity, inclination, node, section, period = data.synthetic_orbits(1000, noise, seed).inputs.T
    assert (axis * (1 - eccentricity) >= data.EARTH_RADIUS + 99.99).all()
    assert ((eccentricity >= 0) & (eccentricity < 1)).all() and (period > 0).all() and (inclination >= 0).all()
    assert ((node >= 0) & (node < 360)).all() and np.isfinite(section).all()


def test_true_orbits_belong_to_their_regime():
    orbits = data.synthetic_orbits(3000, noise=0)
    axis, eccentricity, inclination = orbits.inputs[:, :3].T
    perigee, apogee = (np.round(axis * (1 + sign * eccentricity) - data.EARTH_RADIUS, 6) for sign in (-1, 1))
    found = data.regimes(perigee, apogee, inclination)
    assert np.mean(found == orbits.labels) > 0.99
    assert (found[orbits.labels != 2] == orbits.labels[orbits.labels != 2]).all()


def test_seed_decides_everything():
    first, again, other = data.synthetic_orbits(50, seed=1), data.synthetic_orbits(50, seed=1), data.synthetic_orbits(50, seed=2)
    assert np.array_equal(first.inputs, again.inputs) and np.array_equal(first.labels, again.labels)
    assert not np.array_equal(first.inputs, other.inputs)
    assert data.class_sizes(other) == dict.fromkeys(data.REGIMES, 50)


def test_noise_widens_the_classes():
    spread = [data.synthetic_orbits(500, noise).inputs[:, :3].std(0)[1] for noise in (0, 1)]
    narrow, wide = (data.synthetic_orbits(500, noise) for noise in (0, 1))
    assert spread[0] > 0
    for regime in range(4):
        assert (wide.inputs[wide.labels == regime].std(0)[[0, 2]] > narrow.inputs[narrow.labels == regime].std(0)[[0, 2]]).all()


# ---- the real sets, where they are

def test_catalogue_selection():
    entry = need("space")
    space = data.load_space_catalogue()
    assert entry.name == space.name and np.isfinite(space.inputs).all()
    if data.locate("space_objects/satcat_celestrak_2025-03.parquet"):
        assert len(space) == 28_309
        assert data.class_sizes(space) == dict(LEO=23_945, MEO=686, GEO=875, HEO=2_803)
        assert space.note.startswith("1,518 of 29,827")
    axis, eccentricity = space.inputs[:, 0], space.inputs[:, 1]
    assert (axis * (1 - eccentricity) > data.EARTH_RADIUS).all() and (eccentricity >= 0).all()


@pytest.mark.parametrize("split, size", [("train", 11_314), ("test", 7_532)])
def test_newsgroups_are_stripped_by_the_rule_of_scikit_learn(split, size, monkeypatch):
    "The same raw posts through fetch_20newsgroups(remove=...) itself, with only its download replaced, give the same texts."
    need("20newsgroups")
    ours, raw = data.load_20newsgroups(split), data.load_20newsgroups(split, strip=False)
    assert len(ours) == size and len(ours.label_names) == 20 and np.array_equal(ours.labels, raw.labels)
    from sklearn.datasets import _twenty_newsgroups as newsgroups
    from sklearn.utils import Bunch
    keep = slice(0, None, 10)
    posts, labels = raw.inputs[keep], raw.labels[keep]
    bunch = Bunch(data=posts, target=labels, target_names=raw.label_names, filenames=np.arange(len(posts)))
    monkeypatch.setattr(newsgroups, "_download_20newsgroups", lambda **_: {"train": bunch, "test": bunch})
    theirs = newsgroups.fetch_20newsgroups(data_home="no-such-folder", subset="train", remove=("headers", "footers", "quotes"), shuffle=False)
    assert theirs.data == ours.inputs[keep]


def test_newsgroups_by_download_are_the_same_texts_in_the_same_order(empty, monkeypatch):
    import sklearn.datasets
    from sklearn.utils import Bunch
    posts = {"train": [("sci.space", "60", "b"), ("alt.atheism", "9", "a2"), ("alt.atheism", "10", "a1")], "test": [("sci.space", "1", "c")]}

    def fetched(data_home, subset, shuffle):
        groups = ["alt.atheism", "sci.space"]
        return Bunch(data=[f"From: x\n\n{text}" for *_, text in posts[subset]], target=[groups.index(group) for group, *_ in posts[subset]], target_names=groups,
                     filenames=[f"{subset}/{group}/{number}" for group, number, _ in posts[subset]])
    monkeypatch.setattr(sklearn.datasets, "fetch_20newsgroups", fetched)
    loaded = data.load_20newsgroups("train", download=True)
    assert loaded.inputs == ["a1", "a2", "b"] and loaded.labels.tolist() == [0, 0, 1]
    assert "scikit-learn" in loaded.source and data.load_20newsgroups("test").inputs == ["c"]


@pytest.mark.parametrize("name, split, size, sizes", [
    ("sst2", "dev", 872, [428, 444]), ("sst2", "test", 1821, [912, 909]), ("mnist", "test", 10_000, [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
    ("modelnet10", "test", 908, [50, 100, 100, 86, 86, 100, 86, 100, 100, 100]), ("ecg5000", "test", 4500, [2627, 1873]), ("splice", None, 3190, [767, 768, 1655]),
    ("aeslc", "dev", 1960, []), ("scitldr", "test", 618, []), ("tinyshakespeare", None, 7222, [])])
def test_published_sizes(name, split, size, sizes):
    loaded = need(name).load(*([split] if split else []))
    assert len(loaded) == size and list(data.class_sizes(loaded).values()) == sizes
    assert loaded.source.startswith("found in") and "/" not in loaded.source
    assert loaded.targets is None or len(loaded.targets) == size


def test_ecg_kinds_lost_in_this_copy():
    need("ecg5000")
    assert data.class_sizes(data.load_ecg5000("train", "kind"))["normal"] == 292
    if "lost" in data.load_ecg5000("test").note:
        with pytest.raises(data.DataNotFound, match="has lost the kinds of the test split"):
            data.load_ecg5000("test", "kind")


# ---- docstrings

def test_docstrings_are_read_and_never_run(tmp_path, monkeypatch):
    package = tmp_path / "trap_package"
    package.mkdir()
    (package / "__init__.py").write_text(f'"""{"A docstring of the package itself. " * 5}"""\nopen(r"{tmp_path / "sprung"}", "w")\n')
    (package / "broken.py").write_text("def f(:\n")
    (package / "other.py").write_text(f'def f():\n    """{"Another docstring of one function. " * 5}"""\n    raise RuntimeError\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert len(list(data.docstrings("trap_package"))) == 2
    assert not (tmp_path / "sprung").exists() and "trap_package" not in sys.modules


def test_corpus_is_balanced_distinct_and_grows_from_the_front():
    small, large = data.docstring_corpus(40, ("numpy", "scipy")), data.docstring_corpus(80, ("numpy", "scipy"))
    assert large.inputs[:40] == small.inputs and len(set(large.inputs)) == 80
    assert data.class_sizes(large) == {"numpy": 40, "scipy": 40} and min(len(text.split()) for text in large.inputs) >= 20


# ---- the table

def test_list_data_says_what_is_here(empty):
    rows = {row["name"]: row for row in data.list_data()}
    assert set(rows) == set(data.DATASETS) and all(set(row) == {"name", "what", "size", "found", "licence"} and all(row.values()) for row in rows.values())
    assert {row["found"] for row in rows.values()} == {"built in", "not here"}
    data.write_gzip(empty / "sst2" / "dev.tsv.gz", "sentence\tlabel\nfine\t1\n")
    assert data.whereabouts(data.DATASETS["sst2"]) == "the cache (1 of 3 files)"
    assert data.load_sst2("dev").source == "found in the cache"


def test_write_gzip_is_deterministic(tmp_path):
    for name in ("a.gz", "b.gz"):
        data.write_gzip(tmp_path / name, "text\n")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes() and gzip.decompress((tmp_path / "a.gz").read_bytes()) == b"text\n"
