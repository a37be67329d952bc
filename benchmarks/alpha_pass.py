"""Measure one pass of an alpha fit against the base's evaluation of the same batches.

    python benchmarks/alpha_pass.py --shapes bert gpt2 llama --out benchmarks/results/speed/alpha_pass.csv
    python benchmarks/alpha_pass.py --shapes pretrained --pretrained path/to/SmolLM2-135M-Instruct

`fit` is `peft_graft.fit_alpha`, its seconds divided by the number of its passes over the batches; `base` runs the
same batches through the base in evaluation mode. Every alpha that the fit tries is written into the base once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

import timing
from peft_graft import GraftConfig, fit_alpha

Batch = Mapping[str, torch.Tensor]


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return a number that every layer has a part in: the mean square of the model's first output."""
    return model(**batch)[0].float().square().mean()


def contenders(shape: str, batches: list[Batch], args: Any) -> dict[str, Callable[[], dict[str, float]]]:
    """Return the functions to time, by name."""
    base = timing.build(shape, args.layers or timing.LAYERS[shape], args).eval()
    config = GraftConfig(donor=timing.donor_of(base), density=args.density, alpha="auto")
    model = get_peft_model(copy.deepcopy(base), config).eval()

    def run_base() -> dict[str, float]:
        began = timing.clock(args.device)
        with torch.no_grad():
            for batch in batches:
                loss_of(base, batch)
        return {"seconds": timing.clock(args.device) - began}

    def run_fit() -> dict[str, float]:
        began = timing.clock(args.device)
        fit = fit_alpha(model, batches, loss_fn=loss_of, show_progress_bar=False)
        return {"seconds": (timing.clock(args.device) - began) / fit.passes}

    return {"base": run_base, "fit": run_fit}


def main() -> None:
    """Measure every shape and number of tokens, and write one row per contender."""
    parser = timing.parser_of_shapes(__doc__, rounds=7)
    parser.add_argument("--tokens", nargs="+", default=["8x128", "8x32"], help="batch x length")
    parser.add_argument("--density", type=float, default=1e-3, help="density of the patch")
    parser.add_argument("--batches", type=int, default=8, help="batches of one pass")
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        timing.start(args)
        for tokens in args.tokens:
            batch, length = map(int, tokens.split("x"))
            batches = [{"input_ids": timing.tokens(batch, length, args.device)} for _ in range(args.batches)]
            runs = contenders(shape, batches, args)
            about = {"shape": shape, "tokens": tokens, "batches": args.batches, "density": args.density}
            found = timing.table(timing.race(runs, args.rounds, args.seed, args.device), reference="base")
            rows += [about | row | timing.facts(args) for row in found]
    timing.write_csv(args.out, rows)


if __name__ == "__main__":
    main()
