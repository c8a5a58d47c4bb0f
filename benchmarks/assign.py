"""Time and memory of one forward and backward pass through a prototype bank, beside other ways to do the same or similar work.

    python benchmarks/assign.py [--runs 5] [--threads 2] [--out results/bench/assign.json]

Each method is a function of tokens `(N, m)` and prototypes `(K, m)`, both with gradients. Times are medians in one process
after a warm-up, methods taking turns; each memory figure comes from a process of its own. See `METHODS` for what is compared."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from ddcl_nb.assign import ddcl
from ddcl_nb.benchmark import peak_so_far
from ddcl_nb.experiments.registry import provenance
from ddcl_nb.storage import write_text

SHAPES = [(65536, 64, 64), (65536, 64, 512), (16384, 64, 8192)]
TEMPERATURE = 20.0


def backward(*outputs):
    "Gradients of the sum of all outputs, given as dense tensors, as a network above would."
    torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])


def through_ddcl(backend):
    "Centroids and loss by the library, both differentiated in full."
    def method(z, p):
        out = ddcl(z, p, TEMPERATURE, backend=backend)
        backward(out.centroids, out.loss)
    return method


def composed(z, p):
    "The definition from stock operations: distances, softmax, centroids, loss."
    squared = torch.cdist(z, p).square()
    q = torch.softmax(-squared / TEMPERATURE, -1)
    backward(q @ p, (q * squared).sum(-1))


def vector_quantizer(codes):
    "The EMA codebook of vector-quantize-pytorch in training: hard assignment, so another operation, but the usual alternative."
    from vector_quantize_pytorch import VectorQuantize
    layer = VectorQuantize(dim=codes.shape[1], codebook_size=len(codes), decay=0.99, commitment_weight=1.0).train()

    def method(z, p):
        quantized, _, loss = layer(z[None])
        backward(quantized, loss)
    return method


def attention(z, p):
    "Fused softmax attention with the prototypes as keys and values: centroids alone, without distances or loss. Eight groups of tokens occupy all cores."
    keys = p.expand(1, 8, *p.shape)
    backward(scaled_dot_product_attention(z.view(1, 8, -1, z.shape[1]), keys, keys))


def products(z, p):
    "As many multiplications as centroids and loss need at least: two products forward, four backward, and no softmax."
    backward(z @ p.mT @ p)


METHODS = {
    "ddcl": lambda p: through_ddcl("auto"),
    "ddcl, matmul": lambda p: through_ddcl("matmul"),
    "composed": lambda p: composed,
    "EMA-VQ (library)": vector_quantizer,
    "attention": lambda p: attention,
    "matrix products": lambda p: products,
}


def inputs(shape):
    "Tokens and prototypes from one seed, with gradients."
    N, m, K = shape
    gen = torch.Generator().manual_seed(0)
    return torch.randn(N, m, generator=gen).requires_grad_(), torch.randn(K, m, generator=gen).requires_grad_()


def run_once(method, z, p):
    "Seconds for one forward and backward pass."
    z.grad = p.grad = None
    start = time.perf_counter()
    method(z, p)
    return time.perf_counter() - start


def times(shape, runs, advance):
    "Seconds of every run, by method; a warm-up run, then methods take turns so that a busy moment hits all of them."
    z, p = inputs(shape)
    methods = {name: make(p.detach()) for name, make in METHODS.items()}
    seconds = {name: [] for name in methods}
    for i in range(-1, runs):
        for name, method in methods.items():
            taken = run_once(method, z, p)
            if i >= 0:
                seconds[name].append(taken)
            advance()
    return seconds


def peak_memory(name, shape):
    "Bytes by which one pass raises the peak of this process, after a small pass has loaded what every pass needs."
    small = inputs((256, shape[1], 16))
    METHODS[name](small[1].detach())(*small)
    z, p = inputs(shape)
    method = METHODS[name](p.detach())
    before = peak_so_far()
    method(z, p)
    return peak_so_far() - before


def memory(name, shape):
    "`peak_memory` in a fresh process."
    command = [sys.executable, __file__, "--memory", name, *map(str, shape)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def rows(runs):
    "One row for each shape and method, with every single run."
    total = len(SHAPES) * len(METHODS) * (runs + 1)
    steps = iter(track(range(total), "passes", console=Console(stderr=True)))
    found = []
    for shape in SHAPES:
        for name, seconds in times(shape, runs, lambda: next(steps, None)).items():
            median = statistics.median(seconds)
            found.append(dict(zip("NmK", shape)) | {"method": name, "median_ms": 1e3 * median, "runs_ms": [1e3 * s for s in seconds]})
    for row in track(found, "memory", console=Console(stderr=True)):
        row["peak_bytes"] = memory(row["method"], [row[x] for x in "NmK"])
    return found


def table(found):
    "Times and memory, and both as multiples of `ddcl`."
    shown = Table("N, m, K", "method", "ms", "× ddcl", "MiB", "× ddcl", title="forward + backward")
    for row in found:
        ours = next(r for r in found if r["method"] == "ddcl" and all(r[x] == row[x] for x in "NmK"))
        ratio = row["median_ms"] / ours["median_ms"], row["peak_bytes"] / max(1, ours["peak_bytes"])
        shown.add_row(f"{row['N']}, {row['m']}, {row['K']}", row["method"], f"{row['median_ms']:.0f}", f"{ratio[0]:.2f}",
                      f"{row['peak_bytes'] / 2**20:.0f}", f"{ratio[1]:.2f}", end_section=row["method"] == list(METHODS)[-1])
    return shown


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "bench" / "assign.json")
    parser.add_argument("--memory", nargs=4, metavar=("METHOD", "N", "m", "K"), help="print the peak memory of one pass in bytes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(peak_memory(options.memory[0], [int(x) for x in options.memory[1:]]))
        return
    about = provenance() | {"temperature": TEMPERATURE, "dtype": "float32", "device": "cpu", "runs": options.runs}
    about["versions"]["vector-quantize-pytorch"] = version("vector-quantize-pytorch")
    load = [os.getloadavg()[0]]
    found = rows(options.runs)
    about["load_before_and_after"] = [*load, os.getloadavg()[0]]  # more than the number of cores: other work disturbed the times
    write_text(options.out, json.dumps({"about": about, "rows": found}, indent=1) + "\n")
    Console().print(table(found))


if __name__ == "__main__":
    main()
