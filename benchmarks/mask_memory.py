"""Measure the peak memory of mask training, against the smallest memory that its arithmetic needs.

    python benchmarks/mask_memory.py --shapes bert gpt2 llama --out benchmarks/results/speed/mask_memory.csv

There are two references, both without an optimizer. `to inputs` runs the base forward and backward to its inputs. `to
weights` also computes every weight's gradient and drops it at once, so that its peak is base, activations (including
the inputs of linear layers) and one weight gradient. `extra` is the memory of a step with AdamW beyond `to weights`.
LoRA and full fine-tuning are measured in the same way. Counted are the bytes of all tensors that exist before the
step, and those that are allocated during it.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

import timing
from peft_graft import GraftConfig

FACTOR = 10  # candidates per entry of the budget


def live() -> int:
    """Return the bytes of all tensors in this process."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when they are looked at
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def peak(run: Callable[[], Any], device: str) -> int:
    """Return the bytes of the tensors that are alive at the peak of a call."""
    before = live()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return before + highest


def step(model: nn.Module, ids: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """Run forward, backward and, if there is an optimizer, its step."""
    model(input_ids=ids).last_hidden_state.sum().backward()
    if optimizer:
        optimizer.step()
        optimizer.zero_grad()


def measure(model: nn.Module, ids: torch.Tensor, device: str, optimize: bool) -> int:
    """Return the bytes at the peak of a training step."""
    model.train().get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if optimize else None
    for parameter in () if optimize else trained:
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    for _ in range(2):
        step(model, ids, optimizer)
    return peak(lambda: step(model, ids, optimizer), device)


def graft(base: nn.Module, density: float) -> nn.Module:
    """Return a grafted copy with a mask to learn, without a reference to its donor."""
    donor = timing.donor_of(base)
    config = GraftConfig(donor=donor, density=density / FACTOR, candidate_ratio=FACTOR, selection="learned")
    model = get_peft_model(copy.deepcopy(base), config)
    model.base_model.donors.clear()
    model.peft_config["default"].donor = config.donor = None
    return model


def make(name: str, base: nn.Module, shape: str) -> nn.Module:
    """Return the model of this name."""
    method, _, density = name.partition(" ")
    if method == "graft":
        return graft(base, float(density))
    if method == "lora":
        return get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=timing.LINEARS[shape]))
    model = copy.deepcopy(base)
    return model.requires_grad_(False) if name == "to inputs" else timing.freeze_embeddings(model)


def main() -> None:
    """Measure every shape and write one row per contender."""
    args = timing.parser_of_training(__doc__, rounds=1).parse_args()
    rows = []
    for shape in args.shapes:
        timing.start(args)
        base = timing.build(shape, args.layers or timing.LAYERS[shape], args)
        ids = timing.tokens(args.batch, args.length, args.device)
        about = {"shape": shape, "layers": args.layers or timing.LAYERS[shape], "tokens": f"{args.batch}x{args.length}"}
        names = ["to inputs", "to weights", *(f"graft {each:g}" for each in args.candidates), "lora r=8", "full"]
        peaks: dict[str, int] = {}
        for name in names:
            model = make(name, base, shape)
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            own = sum(parameter.nbytes for parameter in base.parameters())  # is alive beside the measured model
            peaks[name] = measure(model, ids, args.device, optimize=not name.startswith("to ")) - own
            del model
            row: dict[str, Any] = {"contender": name, "trained": trained, "peak": peaks[name]}
            if "to weights" in peaks:
                row["extra"] = peaks[name] - peaks["to weights"]
                row["extra_per_trained"] = f"{row['extra'] / trained:.2f}"
                row["peak_over_to_weights"] = f"{peaks[name] / peaks['to weights']:.4f}"
            rows.append(about | row | timing.facts(args))
    timing.write_csv(args.out, rows)


if __name__ == "__main__":
    main()
