"""Measure the bytes of an entry in an adapter's file, against the entropy bound and stock SHiRA.

    python benchmarks/bytes_per_entry.py --out benchmarks/results/size/bytes_per_entry.csv

The model has the shapes of GPT-2 small (124M parameters), in bfloat16. Entries are taken at random positions, so no
code can be shorter than `bound`: the entropy of a position, (log2(1/d) + 1.44) / 8 bytes, and the 16, 1, 4 or 8 bits of
the value. (The deltas are random too, so the scales of the code "sign" fit badly here; their bytes are the same.)

- `bytes_per_entry` is all in: `adapter_model.safetensors`, header included, and `adapter_config.json`.
- `targets` names the eligible modules: all but the embeddings (the default), or all.
- SHiRA is the adapter that `peft-graft export --to shira` writes. It pads every layer to r(m + n) entries; its bytes
  are divided by the entries of the patch that it holds.
"""

from __future__ import annotations

import tempfile
from itertools import product
from math import log2
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

import timing
from peft_graft import GraftConfig, export, extract, inspect

DENSITIES = (1e-4, 1e-3, 1e-2, 1e-1)
BITS = {"donor": 16, "sign": 1, "int4": 4, "int8": 8}
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def bound(density: float, values: str) -> float:
    """Return the smallest possible bytes of an entry at a random position: index and value."""
    return (log2(1 / density) + 1.44 + BITS[values]) / 8


def row(name: str, adapter: Path, targets: str, density: float, values: str = "donor") -> dict[str, Any]:
    """Return one row of the csv file: the bytes of an adapter by part."""
    found = inspect(adapter)
    config = (adapter / CONFIG).stat().st_size
    size = (adapter / FILE).stat().st_size + config
    parts = {part: f"{count / found.entries:.4f}" for part, count in [*found.nbytes.items(), ("config", config)]}
    smallest = bound(density, values)
    limits = {"bound": f"{smallest:.4f}", "over_bound": f"{size / found.entries / smallest:.4f}"}
    about = {
        "model": name,
        "targets": targets,
        "density": density,
        "code": values,
        "entries": found.entries,
        "bytes": size,
        "tensors": found.tensors,
    }
    return about | {"bytes_per_entry": f"{size / found.entries:.4f}"} | limits | parts


def gpt2(args: Any, folder: Path) -> list[dict[str, Any]]:
    """Measure the shapes of GPT-2 small, 124M parameters."""
    base = GPT2Model(GPT2Config()).to(torch.bfloat16)
    donor = timing.donor_of(base)
    rows = []
    for targets in (None, "all"):
        for density, values in product(DENSITIES, BITS):
            config = GraftConfig(
                donor=donor,
                density=density,
                selection="random",
                target_modules=targets,
                values=values,
                task_type="FEATURE_EXTRACTION",
                base_model_name_or_path="openai-community/gpt2",
                seed=args.seed,
            )
            model = get_peft_model(base, config)
            model.save_pretrained(folder / "adapter")
            model.unload()
            rows.append(row("gpt2", folder / "adapter", targets or "default", density, values))
    return rows


def shira(args: Any, folder: Path) -> dict[str, Any]:
    """Measure stock SHiRA for the same entries, on a model of Linear layers."""
    sizes = {"vocab_size": 512, "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16}
    base = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=8)).to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    timing.donor_of(base).save_pretrained(folder / "donor")
    extract(folder / "base", folder / "donor", folder / "skill", density=1e-3, selection="random")
    done = export(folder / "skill", "shira", folder / "shira")
    ours = row("llama", folder / "skill", "default", 1e-3)
    theirs = (folder / "shira" / FILE).stat().st_size
    return ours | {"shira_bytes_per_entry": f"{theirs / done.carried:.4f}"}


def main() -> None:
    """Write the adapters, and a row for each."""
    parser = timing.parser(__doc__, rounds=1)
    args = parser.parse_args()
    args.dtype = "bfloat16"
    timing.start(args)
    with tempfile.TemporaryDirectory() as folder:
        rows = [*gpt2(args, Path(folder)), shira(args, Path(folder))]
    timing.write_csv(args.out, [each | timing.facts(args) for each in rows])


if __name__ == "__main__":
    main()
