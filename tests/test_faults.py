"""What the package reads back of its own is mutated, and `ddcl reproduce` is killed and crowded: an error of one line, or the same numbers.

DDCL_FUZZ is the number of mutated files (2,000 here, 10,000 at night), of which test_sources takes as many; DDCL_KILLS the number of kills (3 here, 20 at night)."""
import copy
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from test_sources import mutated

from ddcl_nb import fitted
from ddcl_nb.adapters import DDCLForSequenceClassification, DDCLPooling
from ddcl_nb.bank import PrototypeBank
from ddcl_nb.cli import Reproduction, finished, left_over
from ddcl_nb.estimators import DDCLClusterer
from ddcl_nb.experiments.claims import Evidence, read_evidence
from ddcl_nb.experiments.registry import Experiment, Log, Result, read_result
from ddcl_nb.report import write_report
from ddcl_nb.storage import StateError, load_state, save_state
from ddcl_nb.training import fit

FUZZ, KILLS = int(os.environ.get("DDCL_FUZZ", 2000)), int(os.environ.get("DDCL_KILLS", 3))


# --- what is mutated, and how

ODD = [None, True, -1, 0, 10**30, 1.5, float("1e308"), "", "x" * 300, "\x00", "../../etc/passwd", [], {}, [[1]], {"a": {"b": []}}, "nan"]


def altered(value, rng):
    "A copy of a JSON value in which one place was replaced, taken out, doubled, or put elsewhere."
    value = copy.deepcopy(value)
    place, way = value, []
    while isinstance(place, (dict, list)) and place and (not way or rng.random() < 0.7):
        way.append((place, rng.choice(list(place) if isinstance(place, dict) else range(len(place)))))
        place = place[way[-1][1]]
    if not way or rng.random() < 0.03:
        return rng.choice(ODD)
    holder, key = way[-1]
    match rng.randrange(4):
        case 0: del holder[key]
        case 1 if isinstance(holder, dict): holder[rng.choice(["auto_map", "extra", "rows", ""])] = holder[key]
        case _: holder[key] = rng.choice(ODD)
    return value


def altered_tensors(tensors, rng):
    "A copy in which one tensor was taken out, cut, turned, emptied, poisoned, or made of another kind."
    tensors, name = dict(tensors), rng.choice(sorted(tensors))
    t = tensors.pop(name)
    match rng.randrange(7):
        case 0: pass
        case 1: tensors[name] = t[:-1] if t.dim() else t[None]
        case 2: tensors[name] = t.flatten().flip(0)
        case 3: tensors[name] = t.new_zeros(0)
        case 4: tensors[name] = t * torch.nan if t.is_floating_point() else t - 10**6 if t.dtype != torch.bool else ~t
        case 5: tensors[name] = t.to(rng.choice([torch.float16, torch.int64, torch.float64, torch.bool]))
        case _: tensors[rng.choice(["../x", "other", "optimiser.0", "optimiser.x.y", "model."])] = t
    return tensors


def reseal(path, rng):
    "Alter a state and write it with the right checksum."
    tensors, meta = load_state(path)
    if tensors and rng.random() < 0.5:
        tensors = altered_tensors(tensors, rng)
    else:
        meta = altered(meta, rng)
        meta = meta if isinstance(meta, dict) else {"meta": meta}
    save_state(path, tensors, meta)


def rewrite(path, rng):
    "Alter a JSON file and write it as JSON again."
    path.write_text(json.dumps(altered(json.loads(path.read_text()), rng)))


def scramble(path, rng):
    path.write_bytes(mutated(path.read_bytes(), rng) if rng.random() < 0.98 else b"[" * 200_000)


# --- what reads

X = np.random.default_rng(0).normal(size=(30, 3))


def a_bank():
    torch.manual_seed(0)
    return PrototypeBank(2, 3)


def trained(path, epochs):
    "A tiny training with a checkpoint."
    return fit(a_bank(), torch.from_numpy(X).float(), epochs=epochs, checkpoint=path, batch_size=16)


def a_result(folder):
    line = {"data": "rings", "measure": "acc", "paper": 0.7, "paper_kmeans": 0.6, "papers_setting": None, "kmeans": [0.6, 0.1], "ours": [0.8, 0.02]}
    rows = [{"data": "rings", "method": "ours", "seed": seed, "acc": 0.8, "seconds": 0.1} for seed in range(3)]
    Result("toy", "quick", rows, {"title": "Toy", "paper": "Table 0", "sources": {"rings": "made here"}, "table": [line], "verdict": "Held.", "settings": {"seeds": [0]}, "versions": {"torch": "2"}, "hardware": {"cores": 2}}).write(folder)
    return folder / "quick" / "toy.json"


def a_model(folder):
    "A tiny BERT under a readout, as a folder of transformers; its configuration."
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    encoder = transformers.BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    DDCLForSequenceClassification.from_encoder(transformers.BertModel(encoder), n_prototypes=2, num_labels=2).save_pretrained(folder)
    return folder / "config.json"


def used(clusterer):
    clusterer.predict_proba(X), clusterer.transform(X), clusterer.score(X), clusterer.partial_fit(X)


READERS = {
    "state": (lambda folder: save_state(folder / "a.safetensors", {"x": torch.arange(5.0)}, {"a": [1, {"b": None}]}), load_state, (scramble, reseal), StateError),
    "clusterer": (lambda folder: DDCLClusterer(2, random_state=0).fit(X).save(folder / "c.safetensors"), lambda path: used(DDCLClusterer.load(path)), (scramble, reseal), StateError),
    "checkpoint": (lambda folder: trained(folder / "t.safetensors", 1) and folder / "t.safetensors", lambda path: trained(path, 1), (scramble,), StateError),
    "training": (lambda folder: fitted.Training(X, np.arange(30), X.mean(0), X.std(0), np.linspace(0, 1, 101), np.array([10, 20]), ["a"] * 30, None).save(folder / "training.safetensors") or folder / "training.safetensors",
                 lambda path: fitted.Training.load(path, 2, 3), (scramble, reseal), StateError),
    "result": (a_result, lambda path: write_report([read_result(path)], path.parents[1], path.parent / "report.html"), (scramble, rewrite), ValueError),
    "rows": (lambda folder: Log("toy", "quick", folder, {}).row(lambda: {"acc": 1}, seed=0) and folder / ".partial" / "toy-quick.json",
             lambda path: Log("toy", "quick", path.parents[1], {}).row(lambda: {"acc": 1}, seed=0), (scramble, rewrite), ()),
    "finished": (lambda folder: (folder / ".partial").mkdir() or (folder / ".partial" / "finished-quick.json").write_text(json.dumps({"call": a_plan(folder).call, "finished": ["toy"]})) and folder / ".partial" / "finished-quick.json",
                 lambda path: (finished(a_plan(path.parents[1])), left_over(a_plan(path.parents[1]), a_plan(path.parents[1]).experiments[0])), (scramble, rewrite), ()),
    "evidence": (lambda folder: (folder / "theory").mkdir() or (folder / "theory" / "a.json").write_text(json.dumps([vars(a_fact())])) and folder / "theory" / "a.json",
                 lambda path: read_evidence(path.parents[1]), (scramble, rewrite), ValueError),
    "model": (a_model, lambda path: DDCLForSequenceClassification.from_pretrained(path.parent), (scramble, rewrite), (ValueError, OSError)),
    "pooling": (lambda folder: DDCLPooling(4, 2).save(str(folder)) or folder / "config.json", lambda path: DDCLPooling.load(str(path.parent)), (scramble, rewrite), (ValueError, OSError)),
}


def a_plan(out):
    return Reproduction([Experiment("toy", "Toy", "Table 0", None, None)], "quick", None, out)


def a_fact():
    return Evidence(1, "01_decomposition", "Heading", "proof", "what was tested", "0", True)


@pytest.mark.parametrize("name", READERS)
def test_no_mutated_file_of_its_own_breaks_the_package(tmp_path, name):
    write, read, changes, errors = READERS[name]
    path = write(tmp_path)
    with warnings.catch_warnings(action="ignore"):
        read(path)
        content, rng, refused, n = path.read_bytes(), random.Random(0), 0, max(20, FUZZ // 40)
        for count in range(n):
            path.write_bytes(content)
            changes[count % len(changes)](path, rng)
            changed = path.read_bytes()
            try:
                read(path)
            except errors as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 1000, (count, str(error))
            except Exception as other:
                raise AssertionError(f"mutation {count}: {type(other).__name__}: {other}; {changed[:400]!r}") from other
    assert refused > n / 4 or not errors


@pytest.mark.parametrize("change", [lambda tensors, meta: (tensors, meta | {"history": 7}), lambda tensors, meta: (tensors | {"optimiser.0": torch.ones(1)}, meta)], ids=["history", "slot"])
def test_a_checkpoint_that_was_written_by_another_hand(tmp_path, change):
    trained(path := tmp_path / "t.safetensors", 1)
    save_state(path, *change(*load_state(path)))
    with pytest.raises(StateError):
        trained(path, 1)


# --- kills and crowds

SCRIPT = """if 1:
    import json, os, random, signal, sys, time
    from pathlib import Path
    import torch, numpy, pandas, sklearn.metrics
    from ddcl_nb import cli, report, data
    from ddcl_nb.experiments import registry
    folder, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
    os.chdir(folder)

    def toy(name):
        def run(profile="quick", seeds=None, out="results", advance=lambda n=1, note="": None):
            log = registry.Log(name, profile, out, {"toy": name}, advance)
            def measure(seed):
                time.sleep(0.01)
                with open(folder / "measured.txt", "a") as file: file.write(f"{name} {seed}\\n")
                return {"acc": numpy.random.default_rng(seed).random()}
            for seed in range(8): log.row(lambda: measure(seed), data="rings", method="ours", seed=seed)
            line = {"data": "rings", "measure": "acc", "paper": 0.7, "paper_kmeans": 0.6, "papers_setting": None, "kmeans": [0.6, 0.1], "ours": registry.spread([r["acc"] for r in log.rows])}
            return log.finish(title=name, paper="Table 0", sources={}, table=[line], verdict="Held.")
        return registry.Experiment(name, name, "Table 0", run, lambda profile, seeds: 8)

    toys = {name: toy(name) for name in ("apple", "banana")}
    registry.experiments, cli.data_of = lambda: toys, lambda experiment: []

    def start(out):
        if (pid := os.fork()) == 0:
            sys.stdout = open(os.devnull, "w")
            try: cli.app(["reproduce", "--out", out, "--report", out + "/page.html"], standalone_mode=False); os._exit(0)
            except BaseException as error: print(repr(error), file=sys.stderr, flush=True); os._exit(1)
        return pid

    def rows(out):
        found = {name: registry.read_result(folder / out / "quick" / f"{name}.json").rows for name in toys}
        return {name: [{k: v for k, v in row.items() if k != "seconds"} for row in rows] for name, rows in found.items()}

    began = time.time(); assert os.waitpid(start("whole"), 0)[1] == 0; whole, wanted = time.time() - began, rows("whole")
    (folder / "measured.txt").unlink()
    killed = 0
    for attempt in range(kills):
        pid = start("killed"); time.sleep(rng.uniform(0, whole)); os.kill(pid, signal.SIGKILL)
        killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
        for path in (folder / "killed").glob("quick/[!.]*.json"): assert len(registry.read_result(path).rows) == 8
        if (page := folder / "killed" / "page.html").exists(): assert page.read_text().endswith("</html>\\n") or "</html>" in page.read_text()[-20:]
    assert os.waitpid(start("killed"), 0)[1] == 0 and rows("killed") == wanted
    assert not list((folder / "killed" / ".partial").glob("[!.]*"))
    crowd = [start("crowd") for _ in range(3)]
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in crowd) and rows("crowd") == wanted
    print(killed)
"""


def test_reproduce_killed_at_random_moments_and_crowded_ends_with_the_same_rows(tmp_path):
    seed = random.randrange(10**6)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), str(KILLS), str(seed)], capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, (seed, done.stdout, done.stderr)
    assert int(done.stdout.split()[-1]) > 0
