"""Measure switching from one loaded skill to another, against merging and unmerging a LoRA (1.1B parameters).

    python benchmarks/switch.py --out benchmarks/results/speed/switch.csv

The reference is the cost of serving merged LoRAs (r=8, all linear layers): merge one, and unmerge it before the next.
`graft merged` unmerges one skill and merges the other; `graft active` only calls `set_adapter`, unmerged. A graft reads
and writes its patch, a LoRA every weight.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import timing
from peft_graft import GraftConfig


def grafted(args: argparse.Namespace) -> nn.Module:
    """Return a model with the skills "one" and "two", without references to their donors."""
    base = timing.build(args.shape, args.layers, args)
    base.requires_grad_(False)
    donors = {name: timing.donor_of(base) for name in ("one", "two")}
    options = {"density": args.density, "selection": "random"}
    configs = {name: GraftConfig(donor=donors[name], seed=seed, **options) for seed, name in enumerate(donors)}
    model = get_peft_model(base, configs["one"], adapter_name="one")
    model.add_adapter("two", configs["two"])
    for config in [*configs.values(), *model.peft_config.values()]:
        config.donor = None
    model.base_model.donors.clear()
    return model.eval()


def contenders(args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return the ways to switch, by name."""
    graft = grafted(args)
    lora = get_peft_model(
        timing.build(args.shape, args.layers, args), LoraConfig(r=8, target_modules=timing.LINEARS[args.shape])
    ).eval()
    nn.init.normal_(next(value for name, value in lora.named_parameters() if "lora_B" in name))
    other = {"one": "two", "two": "one"}

    def active() -> None:
        graft.set_adapter(other[graft.active_adapter])

    def merged() -> dict[str, float]:
        graft.merge_adapter()
        began = timing.clock(args.device)
        graft.unmerge_adapter()
        active()
        graft.merge_adapter()
        seconds = timing.clock(args.device) - began
        graft.unmerge_adapter()
        return {"seconds": seconds}

    def reference() -> None:
        lora.merge_adapter()
        lora.unmerge_adapter()

    return {"lora r=8 merge + unmerge": reference, "graft merged": merged, "graft active": active}


def main() -> None:
    """Measure and write one row per way to switch."""
    args = timing.parser_of_one(__doc__, rounds=9).parse_args()
    timing.start(args)
    with torch.no_grad():
        runs = contenders(args)
        times = timing.race(runs, args.rounds, args.seed, args.device)
    about = {"shape": args.shape, "layers": args.layers, "density": args.density}
    found = timing.table(times, reference="lora r=8 merge + unmerge")
    timing.write_csv(args.out, [about | row | timing.facts(args) for row in found])


if __name__ == "__main__":
    main()
