"""Measure loading an adapter onto a model of 1.1B parameters, against reading its file and against PEFT's LoRA.

    python benchmarks/load.py --out benchmarks/results/speed/load.csv

`read` reads the tensors of the file (from the page cache), `decode` checks them and makes a patch of them, and `load`
is all of `PeftModel.from_pretrained`, which also wraps the modules and compares the base with the patch's fingerprint.
`lora r=8 load` is the same call for a LoRA on all linear layers. Wall-clock time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import timing
from peft_graft import GraftConfig, Patch

FILE = "adapter_model.safetensors"


def saved(args: argparse.Namespace, base: nn.Module, folder: Path) -> dict[str, Path]:
    """Save one adapter per method, leave the base unchanged, and return the directories."""
    config = GraftConfig(donor=timing.donor_of(base), density=args.density, selection="random")
    configs = {"graft": config, "lora": LoraConfig(r=8, target_modules=timing.LINEARS[args.shape])}
    paths = {}
    for method, config in configs.items():
        model = get_peft_model(base, config)
        model.save_pretrained(folder / method)
        model.unload()
        paths[method] = folder / method
    return paths


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Return the wall-clock seconds of a call."""
    began = time.perf_counter()
    run()
    return {"seconds": time.perf_counter() - began}


def main() -> None:
    """Measure and write one row per step."""
    args = timing.parser_of_one(__doc__, rounds=9).parse_args()
    timing.start(args)
    base = timing.build(args.shape, args.layers, args).eval()
    with tempfile.TemporaryDirectory() as folder:
        paths = saved(args, base, Path(folder))

        def load(method: str) -> dict[str, float]:
            models = []
            seconds = timed(lambda: models.append(PeftModel.from_pretrained(base, paths[method])))
            models.pop().unload()
            return seconds

        runs = {
            "read": lambda: timed(lambda: load_file(paths["graft"] / FILE)),
            "decode": lambda: timed(lambda: Patch.load(paths["graft"] / FILE)),
            "load": lambda: load("graft"),
            "lora r=8 load": lambda: load("lora"),
        }
        times = timing.race(runs, args.rounds, args.seed, args.device)
        size = (paths["graft"] / FILE).stat().st_size
    about = {"shape": args.shape, "layers": args.layers, "density": args.density, "bytes": size}
    found = timing.table(times, reference="read")
    timing.write_csv(args.out, [about | row | timing.facts(args) for row in found])


if __name__ == "__main__":
    main()
