"""Time and memory of the layer beside ten alternatives and floors, and of the program from end to end: the same as `ddcl bench`.

    python benchmarks/speed.py [--only layer|whole] [--quick] [--runs 5] [--out results] [--fresh]

How it is measured is in `nbs/library/11e_benchmark.ipynb` and `11f_costs.ipynb`; results go to `results/bench/`."""
import sys

from ddcl_nb.cli import app

if __name__ == "__main__":
    app(["bench", *sys.argv[1:]], prog_name="speed.py")
