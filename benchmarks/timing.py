"""Shared parts of the benchmarks: shapes of models, interleaved measurement, and csv files that name their origin.

    contenders = {"base": run_base, "graft": run_graft}
    write_csv("out.csv", table(race(contenders, rounds=20, seed=0, device="cpu"), reference="base"), facts)

Every round runs all contenders once, in a new random order, so that other load on the machine affects all of them
alike. On the CPU the time is that of the process (`time.process_time`) with one thread, without the time of other
processes.
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from flags import Flags

# The layers are those of the real models. They are few, and the vocabulary is small, so that they fit anywhere.
SHAPES: dict[str, Callable[[int], nn.Module]] = {
    "bert": lambda layers: BertModel(  # BERT base
        BertConfig(num_hidden_layers=layers, vocab_size=512), add_pooling_layer=False
    ),
    "gpt2": lambda layers: GPT2Model(GPT2Config(n_layer=layers, vocab_size=512)),  # GPT-2 small
    "llama": lambda layers: LlamaModel(  # TinyLlama 1.1B
        LlamaConfig(
            vocab_size=512,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=layers,
            num_attention_heads=32,
            num_key_value_heads=4,
        )
    ),
}
LINEARS = {
    "bert": ["query", "key", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LINEARS["pretrained"] = LINEARS["llama"]
LAYERS = {"bert": 4, "gpt2": 4, "llama": 2, "pretrained": 0}
VOCAB_SIZE = 512


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the flags that all benchmarks have."""
    made = Flags(doc)
    made.add_argument("--rounds", type=int, default=rounds, help="rounds to measure (one more warms up)")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--dtype", default="float32", help="dtype of the weights")
    made.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    made.add_argument(
        "--seed", type=int, default=0, help="seed of the weights, the data and the order of the contenders"
    )
    made.add_argument("--out", type=Path, help="csv file to write; the rows are printed in any case")
    return made


def parser_of_shapes(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser for benchmarks that measure several shapes, with a few layers of each."""
    made = parser(doc, rounds)
    made.add_argument(
        "--shapes", nargs="+", default=["bert"], choices=[*sorted(SHAPES), "pretrained"], help="models to build"
    )
    made.add_argument("--layers", type=int, help=f"layers of each (default: {LAYERS})")
    made.add_argument("--pretrained", help="directory of a Llama-like causal LM, for the shape `pretrained`")
    return made


def parser_of_training(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser for steps of mask training, at several shares of candidates."""
    made = parser_of_shapes(doc, rounds)
    made.add_argument("--batch", type=int, default=8, help="sequences")
    made.add_argument("--length", type=int, default=128, help="tokens of each")
    made.add_argument(
        "--candidates", nargs="+", type=float, default=[1e-4, 1e-3, 1e-2, 5e-2], help="candidates as shares"
    )
    return made


def parser_of_one(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return a parser for patches on one model of a real size, in half precision."""
    made = parser(doc, rounds)
    made.set_defaults(dtype="bfloat16")
    made.add_argument("--shape", default="llama", choices=sorted(SHAPES), help="model whose layers to build")
    made.add_argument("--layers", type=int, default=22, help="number of layers; TinyLlama has 22")
    made.add_argument("--density", type=float, default=1e-3, help="density of each patch")
    return made


def freeze_embeddings(model: nn.Module) -> nn.Module:
    """Freeze the embeddings of a model, which a graft does not patch by default, and return the model."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    return model


def start(args: argparse.Namespace) -> None:
    """Set the threads and the seed."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT asks by the old name
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def build(shape: str, layers: int, args: argparse.Namespace) -> nn.Module:
    """Return a model without dropout: of random weights, or the causal LM of `--pretrained` in its own dtype."""
    if shape == "pretrained":
        return AutoModelForCausalLM.from_pretrained(args.pretrained).to(args.device).eval()
    model = SHAPES[shape](layers).to(args.device, getattr(torch, args.dtype))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def donor_of(base: nn.Module, scale: float = 1e-2) -> nn.Module:
    """Return a copy with Gaussian noise on every parameter, so that its largest deltas are spread evenly."""
    donor = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter += torch.randn_like(parameter) * scale
    return donor


def tokens(batch: int, length: int, device: str) -> torch.Tensor:
    """Return random token ids, int64 [batch, length]."""
    return torch.randint(0, VOCAB_SIZE, (batch, length)).to(device)


def clock(device: str) -> float:
    """Return a time in seconds: the process's on the CPU; elsewhere wall-clock time, after the device has finished."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def race(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, seed: int, device: str
) -> dict[str, list[dict[str, float]]]:
    """Run the contenders in turns.

    Args:
        contenders: Functions by name. Each call is timed, unless it returns times of its own (seconds by name).
        rounds: Number of rounds that count, after one that warms up.
        seed: Seed of the order in each round.
        device: "cpu" or an accelerator, for `clock`.

    Returns:
        For each contender, one dictionary of seconds per round, with the key `"seconds"` if the call was timed here.
    """
    order, found = random.Random(seed), {name: [] for name in contenders}
    for turn in range(rounds + 1):
        names = list(contenders)
        order.shuffle(names)
        for name in names:
            began = clock(device)
            own = contenders[name]()
            seconds = own if isinstance(own, dict) else {"seconds": clock(device) - began}
            if turn:
                found[name].append(seconds)
    return found


def table(times: Mapping[str, list[dict[str, float]]], reference: str) -> list[dict[str, Any]]:
    """Return medians and quartiles of the seconds, and of the ratio to the reference in the same round."""
    rows = []
    for name, rounds in times.items():
        row: dict[str, Any] = {"contender": name, "rounds": len(rounds)}
        for what in rounds[0]:
            seconds = [one[what] for one in rounds]
            row |= {f"{what}_{key}": f"{value:.6g}" for key, value in quartiles(seconds).items()}
            if what in times[reference][0]:
                ratios = [one[what] / other[what] for one, other in zip(rounds, times[reference], strict=True)]
                row |= {f"{what}_ratio_{key}": f"{value:.4f}" for key, value in quartiles(ratios).items()}
        rows.append(row)
    return rows


def quartiles(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of some values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "q1": low, "q3": high}


def facts(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return the columns that are needed to repeat a row: dtype, device, threads, seed and versions."""
    device = torch.cuda.get_device_name() if args.device != "cpu" else _processor()
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        **more,
        "dtype": args.dtype,
        "device": device,
        "threads": args.threads,
        "seed": args.seed,
        "python": platform.python_version(),
        **versions,
    }


def _processor() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()
    return f"{name} ({capability})"


def write_csv(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Print the rows without quartiles, and write them to a csv file if there is a path."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items() if not key.endswith(("_q1", "_q3"))))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
