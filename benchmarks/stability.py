"""What the instruments of `ddcl_nb.stability` cost beside a training step.

    python benchmarks/stability.py [--runs 7] [--threads 2] [--out results/bench/stability.json]

The report: time, and peak memory beside that of a training step, for a frozen MiniLM with a readout of 64 prototypes; each
figure comes from a process of its own. `watch`: medians of blocks of steps with and without it, taking turns in one process."""
import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from assign import peak_so_far
from rich.console import Console
from rich.table import Table
from torch import nn

from ddcl_nb.bank import PrototypeBank
from ddcl_nb.data import docstring_corpus
from ddcl_nb.encoders import load_transformer
from ddcl_nb.experiments.registry import provenance
from ddcl_nb.layers import DDCLReadout
from ddcl_nb.stability import stability_report, watch
from ddcl_nb.storage import write_text
from ddcl_nb.training import bank_loss, initialise, param_groups

TEXTS, LENGTH, CLASSES, PROTOTYPES = 32, 64, 4, 64
POOLS = ("histogram", "residual")
BLOCK = 10


class FrozenReader(nn.Module):
    "A frozen encoder, a readout of all its tokens, and a linear head."

    def __init__(self, pool):
        super().__init__()
        self.tokenizer, self.encoder = load_transformer("offline")
        self.readout = DDCLReadout(384, PROTOTYPES, pool=pool)
        self.head = nn.Linear(self.readout.out_dim, CLASSES)

    def forward(self, ids, mask):
        tokens = self.encoder(ids, attention_mask=mask).last_hidden_state
        out = self.readout(tokens, mask.bool())
        return self.head(out.output), out.loss


def objective(model, ids, mask, labels):
    logits, distortion = model(ids, mask)
    return nn.functional.cross_entropy(logits, labels) + 0.1 * distortion


def reader(pool):
    "Model and batch from one seed, prototypes among the tokens of the batch."
    torch.manual_seed(0)
    model = FrozenReader(pool)
    texts = docstring_corpus().inputs[:TEXTS]
    batch = model.tokenizer(list(texts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    batch = batch["input_ids"], batch["attention_mask"], torch.arange(TEXTS) % CLASSES
    initialise(model, [batch], loss=objective)
    return model.train(), batch


def step(model, batch, optimiser, loss=objective):
    optimiser.zero_grad(set_to_none=True)
    loss(model, *batch).backward()
    optimiser.step()


def trained(pool):
    "Three steps of training."
    model, batch = reader(pool)
    optimiser = torch.optim.Adam(param_groups(model))
    before, start = peak_so_far(), time.perf_counter()
    for _ in range(3):
        step(model, batch, optimiser)
    return {"seconds": (time.perf_counter() - start) / 3, "peak_bytes": peak_so_far(), "raised_bytes": peak_so_far() - before}


def reported(pool):
    model, batch = reader(pool)
    before, start = peak_so_far(), time.perf_counter()
    report = stability_report(model, objective, batch)
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak_so_far(), "raised_bytes": peak_so_far() - before,
            "products": report.products, "status": report.status, "kappa": report.kappa}


MEASURES = {"training step": trained, "report": reported}


def elsewhere(measure, pool, threads):
    "A measure in a fresh process."
    command = [sys.executable, __file__, "--measure", measure, pool, "--threads", str(threads)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.splitlines()[-1])


def bank_alone(n_tokens, dim, n_prototypes):
    "A step that is nothing but a bank."
    torch.manual_seed(0)
    model, tokens = PrototypeBank(n_prototypes, dim), torch.randn(n_tokens, dim)
    model.init_from(tokens, "random")
    return model.train(), (tokens,), bank_loss


def watching(runs):
    "Seconds of blocks of steps, plain and watched in turns."
    cases = {"frozen MiniLM, K=64": (*reader("histogram"), objective), "bank alone, N=4096, m=64, K=64": bank_alone(4096, 64, 64),
             "bank alone, N=4096, m=64, K=1024": bank_alone(4096, 64, 1024)}
    for name, (model, batch, loss) in cases.items():
        optimiser, seconds = torch.optim.Adam(param_groups(model)), {"plain": [], "watched": []}
        for i in range(-1, runs):
            for kind in seconds:
                with watch(model) if kind == "watched" else contextlib.nullcontext():
                    start = time.perf_counter()
                    for _ in range(BLOCK):
                        step(model, batch, optimiser, loss)
                if i >= 0:
                    seconds[kind].append((time.perf_counter() - start) / BLOCK)
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        yield {"case": name, "medians": medians, "overhead": medians["watched"] / medians["plain"] - 1, "seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "bench" / "stability.json")
    parser.add_argument("--measure", nargs=2, metavar=("MEASURE", "POOL"), help="print one measure")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(MEASURES[options.measure[0]](options.measure[1])))
        return
    reports = {pool: {measure: elsewhere(measure, pool, options.threads) for measure in MEASURES} for pool in POOLS}
    overheads = list(watching(options.runs))
    write_text(options.out, json.dumps({"report": reports, "watch": overheads, "about": provenance()}, indent=1) + "\n")
    shown = Table("what", "s", "memory × training step")
    for pool, found in reports.items():
        shown.add_row(f"report, {pool}", f"{found['report']['seconds']:.1f}", f"{found['report']['peak_bytes'] / found['training step']['peak_bytes']:.2f}")
    for row in overheads:
        shown.add_row(f"watch, {row['case']}", f"{100 * row['overhead']:+.1f}% of a step", "")
    Console().print(shown)


if __name__ == "__main__":
    main()
