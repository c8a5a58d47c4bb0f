"""Time, memory and inertia of `kmeans` on a million tokens of width 64 with 1,024 prototypes, beside scikit-learn's `KMeans(n_init=1)`.

    python benchmarks/kmeans.py [--seeds 3] [--threads 2] [--only ours] [--out results/bench/kmeans.json]

Every fit runs in a process of its own, which reads the tokens from a file, so that its peak memory is its own; wall time and
CPU time are those of the fit alone. The inertia of both is computed afterwards by one rule. `DATA` says what is clustered:
a mixture of 2,000 Gaussians of unequal weights, and patches of 8 x 8 pixels of real photographs (CIFAR-10). Rows that are in the
output file already are kept, so that an interrupted run goes on; give another file to measure anew."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from threadpoolctl import threadpool_limits

from ddcl_nb.benchmark import peak_so_far
from ddcl_nb.data import load_cifar10
from ddcl_nb.experiments.registry import provenance
from ddcl_nb.kmeans import kmeans, one_pass
from ddcl_nb.storage import write_text

N, m, K = 1_000_000, 64, 1024


def mixture(seed):
    "Gaussians with unequal weights, widths and spectra: more of them than prototypes."
    random, spectrum = np.random.default_rng(seed), np.arange(1, m + 1) ** -0.5
    centres, weights = random.normal(size=(2000, m)) * spectrum * 2, random.dirichlet(np.full(2000, 0.5))
    widths, which = random.uniform(0.3, 1.2, 2000), random.choice(2000, N, p=weights)
    return np.concatenate([(centres[part] + random.normal(size=(len(part), m)) * spectrum * widths[part, None]).astype(np.float32) for part in np.array_split(which, 20)])


def patches(seed):
    "Grey 8 x 8 patches of 20,000 photographs, a million of the 81 in each."
    grey = load_cifar10("train").inputs[:20_000].mean(1, dtype=np.float32) / 255
    windows = np.lib.stride_tricks.sliding_window_view(grey, (8, 8), axis=(1, 2))[:, ::3, ::3].reshape(-1, m)
    return windows[np.sort(np.random.default_rng(seed).choice(len(windows), N, replace=False))]


DATA = {"mixture": mixture, "patches (real)": patches}


def ours(x, seed):
    found = kmeans(torch.from_numpy(x), K, seed)
    return found.prototypes.numpy(), sum(n * passes for n, passes in found.passes.items()) / len(x)


def theirs(x, seed):
    from sklearn.cluster import KMeans
    found = KMeans(K, n_init=1, algorithm="lloyd", random_state=seed).fit(x)
    return found.cluster_centers_, found.n_iter_


METHODS = {"ours": ours, "scikit-learn": theirs}


def one_fit(method, path, seed, threads):
    "Fit in this process and print what it took as JSON. A small fit first loads what every fit needs."
    torch.set_num_threads(threads)
    with threadpool_limits(threads):
        rng = np.random.default_rng(0)
        small = rng.normal(size=(3000, m)).astype(np.float32)
        kmeans(torch.from_numpy(small), 8) if method == "ours" else __import__("sklearn.cluster").cluster.KMeans(8, n_init=1).fit(small)
        before, x = peak_so_far(), np.load(path)
        wall, cpu = time.perf_counter(), time.process_time()
        prototypes, passes = METHODS[method](x, seed)
        row = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "passes": float(passes)}
        row |= {"peak_bytes": peak_so_far() - before, "data_bytes": x.nbytes}
        row["inertia"] = float(one_pass(torch.from_numpy(x), torch.from_numpy(prototypes.astype(np.float32))).inertia)
    print(json.dumps(row))


def rows(options, found):
    "One row for each data set, seed and method, written as soon as it is there."
    plan = [(name, seed) for name in DATA for seed in range(options.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        for name, seed in track(plan, "fits", console=Console(stderr=True)):
            missing = [method for method in METHODS if options.only in (None, method) and not any((r["data"], r["seed"], r["method"]) == (name, seed, method) for r in found)]
            if missing:
                np.save(path := Path(folder) / "tokens.npy", DATA[name](seed))
            for method in missing:
                load = os.getloadavg()[0]
                command = [sys.executable, __file__, "--fit", method, str(path), str(seed), "--threads", str(options.threads)]
                row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
                found.append({"data": name, "N": N, "m": m, "K": K, "seed": seed, "method": method, "threads": options.threads} | row | {"load_before": load})
                yield found


def summary(found):
    "Medians over the seeds that both methods have, and the worst ratio of inertia."
    out = []
    for name in DATA:
        pairs = [[next((r for r in found if (r["data"], r["seed"], r["method"]) == (name, seed, method)), None) for method in METHODS] for seed in sorted({r["seed"] for r in found})]
        pairs = [pair for pair in pairs if all(pair)]
        if pairs:
            ratio = lambda key: [b[key] / a[key] for a, b in pairs]
            out.append({"data": name, "seeds": len(pairs), "times_faster": statistics.median(ratio("seconds")), "times_less_cpu": statistics.median(ratio("cpu_seconds")),
                        "inertia_ratio": statistics.median(1 / r for r in ratio("inertia")), "worst_inertia_ratio": max(1 / r for r in ratio("inertia")),
                        "peak_over_data": max(a["peak_bytes"] / a["data_bytes"] for a, _ in pairs), "peak_over_data_sklearn": max(b["peak_bytes"] / b["data_bytes"] for _, b in pairs)})
    return out


def table(lines):
    shown = Table("data", "seeds", "times faster", "times less CPU", "inertia ratio (worst)", "peak / data, ours", "scikit-learn", title="kmeans against KMeans(n_init=1): medians over seeds")
    for line in lines:
        shown.add_row(line["data"], str(line["seeds"]), f"{line['times_faster']:.1f}", f"{line['times_less_cpu']:.1f}", f"{line['inertia_ratio']:.4f} ({line['worst_inertia_ratio']:.4f})",
                      f"{line['peak_over_data']:.2f}", f"{line['peak_over_data_sklearn']:.2f}")
    return shown


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=METHODS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "bench" / "kmeans.json")
    parser.add_argument("--fit", nargs=3, metavar=("METHOD", "FILE", "SEED"), help="one fit, printed as JSON")
    options = parser.parse_args()
    if options.fit:
        one_fit(options.fit[0], options.fit[1], int(options.fit[2]), options.threads)
        return
    about = provenance() | {"dtype": "float32", "device": "cpu", "threads": options.threads}
    found = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for found in rows(options, found):
        write_text(options.out, json.dumps({"about": about, "summary": summary(found), "rows": found}, indent=1) + "\n")
    Console().print(table(summary(found)))


if __name__ == "__main__":
    main()
