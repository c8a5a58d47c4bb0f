"Files under exceptions, kills, full disks and read-only folders; states that are damaged, foreign or hostile."
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ddcl_nb.storage import StateError, atomic, load_state, save_state, write_text

TENSORS = {"whole": torch.arange(6.0).reshape(2, 3), "half": torch.randn(3).bfloat16(), "flag": torch.tensor(True), "count": torch.tensor([2**40]),
           "empty": torch.zeros(0, 3), "strided": torch.arange(12.0).reshape(3, 4).T, "": torch.tensor(1.0)}
META = {"text": "Grüße ✓", "numbers": [1, 0.1, None], "nested": {"deep": [{}]}}


def files(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@contextmanager
def without_privileges():
    "For root, to whom no folder is read-only: somebody else for a while."
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# --- atomic files

def test_a_file_appears_whole_with_ordinary_permissions(tmp_path):
    path = write_text(tmp_path / "new" / "folder" / "ü.txt", "Grüße\n")
    assert path.read_bytes() == "Grüße\n".encode() and files(path.parent) == ["ü.txt"]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_an_exception_leaves_what_was_there(tmp_path, error, old):
    path = tmp_path / "file"
    if old:
        path.write_text(old)
    with pytest.raises(error):
        with atomic(path) as temporary:
            temporary.write_text("half of the n")
            assert temporary.parent == tmp_path
            raise error
    assert files(tmp_path) == (["file"] if old else []) and (not old or path.read_text() == old)


def test_a_folder_in_the_way_is_an_error_and_leaves_no_rest(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "file", "text")
    assert files(tmp_path) == ["file"] and files(tmp_path / "file") == []


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX users")
def test_a_read_only_folder_is_an_error_and_loses_nothing():
    with tempfile.TemporaryDirectory() as folder:
        path = write_text(Path(folder) / "file", "old")
        os.chmod(folder, 0o555)
        with without_privileges():
            assert path.read_text() == "old"
            with pytest.raises(PermissionError):
                write_text(path, "new")
            with pytest.raises(PermissionError):
                save_state(path, TENSORS, META)
        assert files(folder) == ["file"] and path.read_text() == "old"
        os.chmod(folder, 0o755)


FULL_DISK = """
import resource, signal, sys
from ddcl_nb.storage import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_text(sys.argv[1], "x" * 5000)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = write_text(tmp_path / "file", "old")
    found = run(FULL_DISK, path)
    assert found.returncode == 1 and "OSError" in found.stderr
    assert files(tmp_path) == ["file"] and path.read_text() == "old"


KILLED = """
import os, signal, sys
from ddcl_nb.storage import atomic
with atomic(sys.argv[1]) as temporary:
    temporary.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_writer_leaves_what_was_there(tmp_path):
    path = write_text(tmp_path / "file", "old")
    assert run(KILLED, path).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert write_text(path, "new").read_text() == "new"


# --- states

def test_a_state_comes_back_as_it_was(tmp_path):
    tensors, meta = load_state(save_state(tmp_path / "state.safetensors", TENSORS, META))
    assert meta == META and tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].equal(value) and tensors[name].dtype == value.dtype, name


def test_a_state_is_independent_of_what_it_was_made_from(tmp_path):
    shared = torch.ones(3, requires_grad=True)
    path = save_state(tmp_path / "state", {"one": shared, "view": shared[:2], "same": shared}, {})
    tensors, _ = load_state(path)
    tensors["one"].zero_()
    assert tensors["same"].eq(1).all() and load_state(path)[0]["one"].eq(1).all() and shared.eq(1).all()


def test_what_is_not_json_is_refused_and_the_old_state_stays(tmp_path):
    path = save_state(tmp_path / "state", TENSORS, META)
    with pytest.raises(TypeError):
        save_state(path, TENSORS, {"function": print})
    assert load_state(path)[1] == META and files(tmp_path) == ["state"]


@pytest.fixture
def state(tmp_path):
    return save_state(tmp_path / "state.safetensors", TENSORS, META)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_state_is_named(state, share):
    whole = state.read_bytes()
    state.write_bytes(whole[:int(share * len(whole))])
    with pytest.raises(StateError, match="state.safetensors is not a state of ddcl_nb, or is damaged"):
        load_state(state)


def test_a_state_with_something_after_it_is_damaged(state):
    state.write_bytes(state.read_bytes() + b"more")
    with pytest.raises(StateError, match="damaged"):
        load_state(state)


def test_a_flipped_bit_anywhere_is_found(tmp_path):
    tensors, meta = {"whole": torch.arange(6.0), "flag": torch.tensor(True)}, {"history": [{"loss": 0.25}]}
    path = save_state(tmp_path / "state", tensors, meta)
    whole = path.read_bytes()
    for i in range(len(whole)):
        altered = bytearray(whole)
        altered[i] ^= 1 << i % 8
        path.write_bytes(altered)
        with pytest.raises(StateError, match="state is not a state of ddcl_nb, or is damaged"):
            load_state(path)
    path.write_bytes(whole)
    assert load_state(path)[1] == meta


def test_a_missing_state_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_state(tmp_path / "state")


class Hostile:
    "Unpickling this writes a file."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_foreign(kind, path):
    "A file that is something else."
    written = {"text": lambda: path.write_text("hello"), "json": lambda: path.write_text(json.dumps(META)), "folder": path.mkdir,
               "pickle": lambda: path.write_bytes(pickle.dumps(Hostile(str(path) + ".owned"))),
               "torch": lambda: torch.save({"model": Hostile(str(path) + ".owned")}, path), "zeros": lambda: path.write_bytes(bytes(1000)),
               "no metadata": lambda: save_file(TENSORS_PLAIN, path), "other metadata": lambda: save_file(TENSORS_PLAIN, path, {"format": "pt"}),
               "no json": lambda: save_file(TENSORS_PLAIN, path, {"ddcl_nb": "{"}),
               "no checksum": lambda: save_file(TENSORS_PLAIN, path, {"ddcl_nb": "{}"}),
               "no object": lambda: save_state(path, TENSORS_PLAIN, [1])}
    written[kind]()


TENSORS_PLAIN = {"whole": torch.ones(2)}


@pytest.mark.parametrize("kind", ["text", "json", "folder", "pickle", "torch", "zeros", "no metadata", "other metadata", "no json", "no checksum",
                                  "no object"])
def test_foreign_files_are_named_and_never_unpickled(tmp_path, kind):
    path = tmp_path / "foreign"
    write_foreign(kind, path)
    with pytest.raises(StateError, match="foreign is not a state of ddcl_nb"):
        load_state(path)
    assert files(tmp_path) == ["foreign"]


def test_no_module_of_the_package_reads_pickles():
    "A file from a stranger must not run code. (`data` opens one published archive of that kind after comparing its MD5, and is tested for it.)"
    import ddcl_nb
    sources = [source for source in Path(ddcl_nb.__file__).parent.rglob("*.py") if source.name != "data.py"]
    assert len(sources) > 5
    for source in sources:
        text = source.read_text(encoding="utf-8")
        assert not any(word in text for word in ("import pickle", "pickle.load", "torch.load(", "joblib.load", "allow_pickle=True")), source.name
