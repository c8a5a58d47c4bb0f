"""Time and inertia of `DDCLClusterer` beside scikit-learn's k-means with ten restarts.

    python benchmarks/clusterer.py [--seeds 5] [--threads 2] [--out results/bench/clusterer.json]

Every seed draws new data, and both methods fit them one after the other in one process after a small warm-up. Ratios are
ours / k-means for each seed, so below 1 is in our favour. `DATA` says what is clustered: clouds that are far apart, clouds
that overlap, and 200 clouds of unequal size, width and shape for 64 clusters, where no partition is obvious."""
import argparse
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from threadpoolctl import threadpool_limits

from ddcl_nb.data import load_digits
from ddcl_nb.estimators import DDCLClusterer
from ddcl_nb.experiments.registry import provenance
from ddcl_nb.storage import write_text

N, m, K = 100_000, 64, 64


def clouds(width):
    "As many round clouds as clusters."
    def draw(seed):
        return make_blobs(N, m, centers=K, cluster_std=width, random_state=seed)[0].astype(np.float32), K
    return draw


def uneven(seed):
    "Two hundred clouds whose sizes, widths and spectra differ: no number of clusters fits, as in embeddings."
    random, spectrum = np.random.default_rng(seed), np.arange(1, m + 1) ** -0.7
    sizes = random.multinomial(N, random.dirichlet(np.full(200, 0.5)))
    parts = [random.normal(size=(n, m)) * spectrum * random.uniform(0.3, 1.2) + random.normal(size=m) * spectrum * 2 for n in sizes]
    return np.concatenate(parts).astype(np.float32), K


def digits(seed):
    "Real and small: 1,797 handwritten digits."
    return load_digits().inputs, 10


DATA = {"clouds far apart": clouds(1.0), "clouds that overlap": clouds(4.0), "200 uneven clouds": uneven, "digits (real)": digits}

METHODS = {"k-means": lambda K, seed: KMeans(K, n_init=10, random_state=seed), "ddcl": lambda K, seed: DDCLClusterer(K, random_state=seed)}


def timed(model, X):
    "Seconds of one fit, and its inertia by one common rule in float64."
    start = time.perf_counter()
    model.fit(X)
    seconds = time.perf_counter() - start
    nearest = model.cluster_centers_[model.labels_].astype(float)
    return seconds, float(np.square(X - nearest).sum())


def rows(seeds):
    "One row for each data set and seed."
    for model in METHODS.values():
        timed(model(4, 0), np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32))
    found = []
    for name, seed in track([(name, seed) for name in DATA for seed in range(seeds)], "fits", console=Console(stderr=True)):
        X, k = DATA[name](seed)
        row = {"data": name, "N": X.shape[0], "m": X.shape[1], "K": k, "seed": seed}
        for method in list(METHODS)[::1 if seed % 2 else -1]:
            row[f"{method}_seconds"], row[f"{method}_inertia"] = timed(METHODS[method](k, seed), X)
        found.append(row | {"time_ratio": row["ddcl_seconds"] / row["k-means_seconds"], "inertia_ratio": row["ddcl_inertia"] / row["k-means_inertia"]})
    return found


def summary(found):
    "Medians over seeds, and the worst ratio of inertia."
    out = []
    for name in DATA:
        mine = [row for row in found if row["data"] == name]
        median = lambda key: statistics.median(row[key] for row in mine)
        out.append({"data": name} | {key: median(key) for key in ("k-means_seconds", "ddcl_seconds", "time_ratio", "inertia_ratio")}
                   | {"worst_time_ratio": max(row["time_ratio"] for row in mine), "worst_inertia_ratio": max(row["inertia_ratio"] for row in mine)})
    return out


def table(lines):
    shown = Table("data", "k-means, s", "ddcl, s", "time ratio (worst)", "inertia ratio (worst)", title="KMeans(n_init=10) and DDCLClusterer: medians over seeds")
    for line in lines:
        shown.add_row(line["data"], f"{line['k-means_seconds']:.2f}", f"{line['ddcl_seconds']:.2f}", f"{line['time_ratio']:.3f} ({line['worst_time_ratio']:.3f})",
                      f"{line['inertia_ratio']:.4f} ({line['worst_inertia_ratio']:.4f})")
    return shown


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "bench" / "clusterer.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = provenance() | {"dtype": "float32", "device": "cpu", "seeds": options.seeds, "threads": options.threads}
    load = [os.getloadavg()[0]]
    with threadpool_limits(options.threads):
        found = rows(options.seeds)
    about["load_before_and_after"] = [*load, os.getloadavg()[0]]  # more than the number of cores: other work disturbed the times
    lines = summary(found)
    write_text(options.out, json.dumps({"about": about, "summary": lines, "rows": found}, indent=1) + "\n")
    Console().print(table(lines))


if __name__ == "__main__":
    main()
