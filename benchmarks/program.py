"""Time and memory of `ddcl fit` on an array of ten million rows, and its inertia beside a fit that has all rows in memory.

    python benchmarks/program.py [--rows 10000000] [--width 64] [--k 20] [--threads 2] [--folder DIR] [--out results/bench/program.json]

The array, 300 uneven clouds in float32, is written to a temporary folder (2.6 GB for the default), and removed at the end. `ddcl fit` runs in a process of
its own, whose time and highest resident memory are measured; `ddcl predict` then does. For the comparison of inertia, `DDCLClusterer.fit` sees all
rows of a smaller file, of which `ddcl fit` samples one in fifty."""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.table import Table

from ddcl_nb import fitted
from ddcl_nb.estimators import DDCLClusterer
from ddcl_nb.experiments.registry import provenance
from ddcl_nb.storage import write_text


def clouds(path, N, m, seed):
    "Write rows of 300 clouds of uneven size, width and spectrum, in no order, block by block."
    random, spectrum = np.random.default_rng(seed), np.arange(1, m + 1) ** -0.7
    centres, widths, sizes = random.normal(size=(300, m)) * spectrum * 2, random.uniform(0.3, 1.2, 300), random.dirichlet(np.full(300, 0.5))
    with open(path, "wb") as file:  # no memory map: what this process has touched would be counted for its children
        np.lib.format.write_array_header_2_0(file, {"descr": "<f4", "fortran_order": False, "shape": (N, m)})
        for start in range(0, N, 100_000):
            cloud = random.choice(300, min(100_000, N - start), p=sizes)
            rows = centres[cloud] + random.standard_normal((len(cloud), m), np.float32) * (spectrum * widths[cloud, None])
            rows.astype(np.float32).tofile(file)


def measured(*arguments, threads):
    "Seconds, peak resident memory in bytes and standard output of `ddcl` in a process of its own."
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "ddcl_nb", *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"ddcl {' '.join(arguments)} failed")
    return {"seconds": time.perf_counter() - start, "peak_bytes": usage.ru_maxrss * 1024, "cpu_seconds": usage.ru_utime + usage.ru_stime}, output


def large(folder, N, m, k, threads):
    "`ddcl fit` and `ddcl predict` on the large array."
    data, out = folder / "large.npy", folder / "model"
    clouds(data, N, m, 0)
    fit, said = measured("fit", str(data), "--k", str(k), "--out", str(out), "--json", threads=threads)
    predict, _ = measured("predict", str(out), str(data), "--out", str(folder / "predicted.parquet"), "--json", threads=threads)
    size = data.stat().st_size
    data.unlink()
    return {"rows": N, "width": m, "k": k, "bytes": size, "fit": fit, "predict": predict, "says": {name: value for name, value in json.loads(said).items() if name != "out"}}


def beside_full(folder, k, seed):
    "Inertia of a fit by sample and steps, as a multiple of that of a fit that sees all rows."
    N, m, data = 100_000, 64, folder / "small.npy"
    clouds(data, N, m, seed)
    full = DDCLClusterer(k, random_state=0).fit(np.load(data)).inertia_
    with patch.object(fitted, "SAMPLE_ROWS", N // 50), patch.object(fitted, "SAMPLE_PER_PROTOTYPE", 1):
        model = fitted.fit_model(fitted.FitPlan(data, folder / f"small-{k}-{seed}", k=k))
    return {"rows": N, "width": m, "k": k, "seed": seed, "sample": model.config["data"]["sample"], "steps": model.config["data"]["steps"], "inertia_ratio": model.clusterer.inertia_ / full}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "bench" / "program.json")
    options = parser.parse_args()
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        big = large(Path(folder), options.rows, options.width, options.k, options.threads)
        load.append(os.getloadavg()[0])
        ratios = [beside_full(Path(folder), k, seed) for k in (20, 64) for seed in range(options.seeds)]
    about = provenance() | {"threads": options.threads, "load_before_and_after": load}  # more than the number of cores: other work disturbed the times
    write_text(options.out, json.dumps({"about": about, "large": big, "beside_full": ratios}, indent=1) + "\n")
    shown = Table("command", "seconds", "peak memory, MB", title=f"{options.rows:,} x {options.width} in float32 ({big['bytes'] / 1e9:.1f} GB), k = {options.k}")
    for name in ("fit", "predict"):
        shown.add_row(name, f"{big[name]['seconds']:.0f}", f"{big[name]['peak_bytes'] / 1e6:.0f}")
    Console().print(shown)
    Console().print("inertia / full fit:", ", ".join(f"{row['inertia_ratio']:.4f}" for row in ratios))


if __name__ == "__main__":
    main()
