"""Measure a step of mask training, against full fine-tuning, LoRA and SHiRA.

    python benchmarks/mask_step.py --shapes bert gpt2 llama --out benchmarks/results/speed/mask_step.csv

A step is forward and backward from a fixed upstream gradient; `step` excludes the optimizer, `whole` includes AdamW.
Full fine-tuning trains what a graft may patch, all but the embeddings. In all models the gradient runs down to the
output of the embeddings. The mask's logits change at every step, so the time to find the exact mask is included.
PEFT's SHiRA does not support Conv1D, and so not GPT-2.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn

import timing
from peft_graft import GraftConfig

FACTOR = 10  # candidates per entry of the budget


def stepper(model: nn.Module, ids: torch.Tensor, upstream: torch.Tensor, device: str) -> Callable[[], dict[str, float]]:
    """Return a training step that returns its own times, with and without the optimizer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> dict[str, float]:
        began = timing.clock(device)
        model(input_ids=ids).last_hidden_state.backward(upstream)
        passed = timing.clock(device)
        optimizer.step()
        optimizer.zero_grad()
        return {"step": passed - began, "whole": timing.clock(device) - began}

    return step


def contenders(shape: str, args: argparse.Namespace) -> dict[str, nn.Module]:
    """Return the models to compare, ready to train, by name."""
    base = timing.build(shape, args.layers or timing.LAYERS[shape], args)
    donor = timing.donor_of(base)
    models = {"full": copy.deepcopy(base)}
    for density in args.candidates:
        config = GraftConfig(donor=donor, density=density / FACTOR, candidate_ratio=FACTOR, selection="learned")
        models[f"graft {density:g}"] = get_peft_model(copy.deepcopy(base), config)
    linears = timing.LINEARS[shape]
    models["lora r=8"] = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=linears))
    if shape != "gpt2":
        models["shira r=8"] = get_peft_model(copy.deepcopy(base), ShiraConfig(r=8, target_modules=linears))
    for name, model in models.items():
        embeddings = model.get_input_embeddings()
        if name == "full":
            timing.freeze_embeddings(model)
        embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        model.train()
    return models


def main() -> None:
    """Measure every shape and write one row per contender."""
    args = timing.parser_of_training(__doc__, rounds=15).parse_args()
    rows = []
    for shape in args.shapes:
        timing.start(args)
        models = contenders(shape, args)
        ids = timing.tokens(args.batch, args.length, args.device)
        with torch.no_grad():
            upstream = torch.randn_like(models["full"](input_ids=ids).last_hidden_state)
        steps = {name: stepper(model, ids, upstream, args.device) for name, model in models.items()}
        about = {"shape": shape, "layers": args.layers or timing.LAYERS[shape], "tokens": f"{args.batch}x{args.length}"}
        found = timing.table(timing.race(steps, args.rounds, args.seed, args.device), reference="full")
        rows += [about | row | timing.facts(args) for row in found]
    timing.write_csv(args.out, rows)


if __name__ == "__main__":
    main()
