"""Measure switching the skill of a vLLM worker, against loading another merged checkpoint into it.

    pip download --no-deps vllm==0.33.0 && unzip -q vllm-*.whl -d vllm-wheel && pip install --no-deps pyzmq pybase64
    python benchmarks/serve.py --vllm vllm-wheel --base SmolLM2-135M --donors sft-one sft-two --out serve.csv

vLLM's weight updates are its own: the factory, the base class of weight transfer engines and the loader of checkpoint
patches, imported from its wheel. The model is a stand-in (`tests/packed_llama.py`), which packs and shards its weights
as vLLM's Llama does. Everything runs on the CPU, in one process: no scheduler, no messages between processes.

- `load merged checkpoint`: give `load_weights` all tensors of a merged checkpoint, read from the page cache;
- `switch`: from one skill to the other, and `revert`: to the base, when the worker has read both skills before;
- `switch, vLLM's patch loader`: the same entries through `load_checkpoint_weight_patches`;
- `first time, export` and `first time, adapter`: a skill that the worker has not read.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open

import timing
from peft_graft import export, extract
from peft_graft.vllm import checkpoint_weight_patches, plan, read_patch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from packed_llama import PackedLlama, engine_config
from vllm_stand_in import FACTORY, PATCHES, real_packages


def load(model: PackedLlama, directory: Path) -> None:
    """Load a whole checkpoint."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


def worker_of(model: PackedLlama, base: Path) -> Any:
    """Return vLLM's weight transfer engine `peft_graft` for a model."""
    import _peft_graft_vllm

    _peft_graft_vllm.register()
    config = SimpleNamespace(model=str(base), revision=None, trust_remote_code=False, quantization=None)
    return sys.modules[FACTORY].WeightTransferEngineFactory.create_engine(  # type: ignore[attr-defined]
        SimpleNamespace(backend="peft_graft"),
        SimpleNamespace(model_config=config, parallel_config=None),
        torch.device("cpu"),
        model,
    )


def contenders(args: argparse.Namespace, root: Path) -> dict[str, Callable[[], Any]]:
    """Return the ways to change the skill, by name."""
    skills = [root / f"skill{number}" for number, _ in enumerate(args.donors)]
    for skill, donor in zip(skills, args.donors, strict=True):
        extract(args.base, donor, skill, density=args.density)
        export(skill, "vllm", f"{skill}-patch")
        export(skill, "checkpoint", f"{skill}-merged")
    model = PackedLlama(engine_config(args.base), args.rank, args.ranks)
    load(model, args.base)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    worker = worker_of(model, args.base)

    def to(adapter: str | None) -> None:
        worker.receive_weights(worker.parse_update_info({"adapter": adapter}))

    def timed(prepare: str | None, adapter: str | None, forget: bool = False) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            to(prepare)
            if forget:
                worker.shutdown()
            began = timing.clock("cpu")
            to(adapter)
            return {"seconds": timing.clock("cpu") - began}

        return run

    def by_vllm() -> dict[str, float]:
        loader = sys.modules[PATCHES].load_checkpoint_weight_patches  # type: ignore[attr-defined]
        first, second = (read_patch(adapter) for adapter in (one, two))
        to(one)
        there, back = (checkpoint_weight_patches(plan([old], new)) for old, new in ((first, second), (second, first)))
        began = timing.clock("cpu")
        loader(model, there, validate_unique_indices=False)
        seconds = timing.clock("cpu") - began
        loader(model, back, validate_unique_indices=False)
        return {"seconds": seconds}

    one, two = (f"{skill}-patch" for skill in skills[:2])
    for adapter in (one, two, None):
        to(adapter)
    if not all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True)):
        raise RuntimeError("the revert must give the base's bits")
    return {
        "load merged checkpoint": lambda: load(PackedLlama(engine_config(args.base)), Path(f"{skills[0]}-merged")),
        "switch": timed(one, two),
        "switch, vLLM's patch loader": by_vllm,
        "revert": timed(one, None),
        "first time, export": timed(None, one, forget=True),
        "first time, adapter": timed(None, os.fspath(skills[0]), forget=True),
    }


def main() -> None:
    """Measure and write one row per way."""
    parser = timing.parser(__doc__, rounds=7)
    parser.add_argument("--vllm", required=True, help="directory of an unpacked wheel of vLLM 0.33 or newer")
    parser.add_argument("--base", required=True, type=Path, help="directory of a Llama in bfloat16")
    parser.add_argument("--donors", required=True, nargs=2, help="directories of two fine-tuned models")
    parser.set_defaults(dtype="bfloat16")
    parser.add_argument("--density", type=float, default=1e-3, help="density of each patch")
    parser.add_argument("--rank", type=int, default=0, help="rank of the worker")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks; it divides the heads")
    args = parser.parse_args()
    timing.start(args)
    sys.modules.update(real_packages(args.vllm))
    with torch.no_grad(), tempfile.TemporaryDirectory() as root:
        times = timing.race(contenders(args, Path(root)), args.rounds, args.seed, args.device)
    about = {"base": args.base.name, "density": args.density, "rank": args.rank, "ranks": args.ranks}
    found = timing.table(times, reference="load merged checkpoint")
    timing.write_csv(args.out, [about | row | timing.facts(args) for row in found])


if __name__ == "__main__":
    main()
