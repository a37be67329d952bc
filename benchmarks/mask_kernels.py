"""Measure the kernels that compute a weight's gradient at its candidates, against the dense product.

    python benchmarks/mask_kernels.py --out benchmarks/results/speed/mask_kernels.csv

The product is gy^T x, for several shapes and densities; times are relative to the dense kernel, and `chosen` marks the
kernel that `choose_kernel` takes. At the end the script prints the costs per token that fit the measured times best;
the constants in `peft_graft/tuner/apply/sparse_grad.py` come from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch

import timing
from peft_graft.tuner.apply.sparse_grad import Kernel, choose_kernel, product_at

DENSITIES = (1e-4, 1e-3, 3e-3, 1e-2, 5e-2, 1e-1, 2e-1)
SHAPES = ((768, 768), (3072, 768), (2048, 2048), (5632, 2048))
COPIES = 4  # of the factors, in turns, so that they come from memory as in a model


def runner(lefts: list[torch.Tensor], rights: list[torch.Tensor], indices: torch.Tensor, kernel: Kernel) -> Any:
    """Return a function that runs a kernel on the next copy of the factors."""
    turns = iter(range(10**9))

    def run() -> None:
        turn = next(turns) % len(lefts)
        product_at(lefts[turn], rights[turn], indices, kernel)

    return run


def fit(rows: list[dict[str, Any]], tokens: int) -> str:
    """Fit the costs per token, in nanoseconds, by least squares of the relative errors."""
    costs = {}
    for kernel in get_args(Kernel):
        points, times = [], []
        for row in rows:
            if row["contender"] == kernel:
                m, n, k = row["rows"], row["columns"], row["candidates"]
                terms = {"dense": [m * n], "gathered": [k], "sampled": [m + n, k]}[kernel]
                time = float(row["seconds_median"]) / tokens * 1e9
                points.append([term / time for term in terms])
                times.append(1.0)
        costs[kernel] = np.linalg.lstsq(np.array(points), np.array(times), rcond=None)[0].round(5).tolist()
    return str(costs)


def main() -> None:
    """Measure, write one row per kernel, shape and density, and print the fitted costs."""
    parser = timing.parser(__doc__, rounds=9)
    parser.add_argument("--tokens", type=int, default=1024, help="rows of both factors")
    args = parser.parse_args()
    timing.start(args)
    dtype, rows = getattr(torch, args.dtype), []
    for m, n in SHAPES:
        lefts = [torch.randn(args.tokens, m, device=args.device).to(dtype) for _ in range(COPIES)]
        rights = [torch.randn(args.tokens, n, device=args.device).to(dtype) for _ in range(COPIES)]
        for density in DENSITIES:
            indices = torch.randperm(m * n)[: round(density * m * n)].sort().values.to(args.device)
            kernels = [kernel for kernel in get_args(Kernel) if not (kernel == "gathered" and density > 1e-2)]
            runs: dict[str, Callable[[], Any]] = {kernel: runner(lefts, rights, indices, kernel) for kernel in kernels}
            chosen = choose_kernel(len(indices), (m, n), lefts[0].device, dtype)
            about = {"rows": m, "columns": n, "tokens": args.tokens, "density": density, "candidates": len(indices)}
            found = timing.table(timing.race(runs, args.rounds, args.seed, args.device), reference="dense")
            rows += [about | {"chosen": row["contender"] == chosen} | row | timing.facts(args) for row in found]
    timing.write_csv(args.out, rows)
    print("nanoseconds per token:", fit(rows, args.tokens))


if __name__ == "__main__":
    main()
