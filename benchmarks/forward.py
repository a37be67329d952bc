"""Measure the forward pass of a loaded patch, unmerged and merged, against the base without it.

    python benchmarks/forward.py --shapes bert gpt2 llama --out benchmarks/results/speed/forward.csv
    python benchmarks/forward.py --shapes pretrained --pretrained path/to/SmolLM2-135M-Instruct

`unmerged` runs the patch with alpha = 1, `scaled` with another alpha, `applied` inside of `with model.applied():`, and
`merged` after `merge_adapter()`; `lora r=8` is an unmerged LoRA of PEFT. All run without gradients. Tokens are batch x
length: 1x1 is one step of decoding.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import nullcontext

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import timing
from peft_graft import GraftConfig


def contenders(shape: str, args: argparse.Namespace) -> dict[str, nn.Module]:
    """Return the models to compare, in evaluation mode, by name."""
    base = timing.build(shape, args.layers or timing.LAYERS[shape], args)
    donor = timing.donor_of(base)
    models = {"base": base}
    for name, alpha in (("unmerged", 1.0), ("scaled", 2.5), ("merged", 1.0)):
        models[name] = get_peft_model(copy.deepcopy(base), GraftConfig(donor=donor, density=args.density, alpha=alpha))
    models["merged"].merge_adapter()
    models["applied"] = copy.deepcopy(models["unmerged"])
    models["lora r=8"] = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=timing.LINEARS[shape]))
    return {name: model.eval() for name, model in models.items()}


def runner(
    model: nn.Module, ids: torch.Tensor, repeat: int, device: str, applied: bool
) -> Callable[[], dict[str, float]]:
    """Return a function that runs the model `repeat` times and returns the seconds of one pass."""

    def run() -> dict[str, float]:
        with torch.no_grad(), model.applied() if applied else nullcontext():
            if applied:
                model(input_ids=ids)  # writes the patch, once for all that follow
            began = timing.clock(device)
            for _ in range(repeat):
                model(input_ids=ids)
        return {"seconds": (timing.clock(device) - began) / repeat}

    return run


def main() -> None:
    """Measure every shape and number of tokens, and write one row per contender."""
    parser = timing.parser_of_shapes(__doc__, rounds=21)
    parser.add_argument("--tokens", nargs="+", default=["8x128", "1x128", "1x1"], help="batch x length")
    parser.add_argument("--density", type=float, default=1e-3, help="density of the patch")
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        timing.start(args)
        models = contenders(shape, args)
        for tokens in args.tokens:
            batch, length = map(int, tokens.split("x"))
            ids, repeat = timing.tokens(batch, length, args.device), max(1, 256 // (batch * length))
            repeat = min(repeat, 20)
            runs = {
                name: runner(model, ids, repeat, args.device, applied=name == "applied")
                for name, model in models.items()
            }
            layers = args.layers or timing.LAYERS[shape]
            about = {"shape": shape, "layers": layers, "tokens": tokens, "density": args.density}
            found = timing.table(timing.race(runs, args.rounds, args.seed, args.device), reference="base")
            rows += [about | row | timing.facts(args) for row in found]
    timing.write_csv(args.out, rows)


if __name__ == "__main__":
    main()
