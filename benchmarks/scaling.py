"""Compare the formulas of docs/scaling.md with measurements at three sizes, and extrapolate them to 70B and 400B.

    python benchmarks/scaling.py --out benchmarks/results/scaling/step.csv      # measures steps, then prints all tables

Steps of mask training are measured here, on one layer of three widths (Llama's shapes), against the base's forward pass
in the same run. Sizes of adapters and seconds of extractions come from the csv files of `bytes_per_entry.py` and
`extract_7b.py` in `benchmarks/results/`. With `--no-measure` the steps come from the csv file as well.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections.abc import Callable
from math import log2
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaModel

import timing
from peft_graft import GraftConfig
from peft_graft.selection.select import HELD_AT_ONCE

RESULTS = Path(__file__).parent / "results"
WIDTHS = {768: 2048, 2048: 5632, 4096: 11008}  # hidden size -> inner size; heads of 128 entries
CANDIDATES = 1e-3
# Cost of a candidate's gradient relative to an entry in a dense product (tuner/apply/sparse_grad.py, float32, CPU).
SAMPLED = 0.07 / 0.0094
HEADER = 240  # bytes that the header of the file has for a patched tensor, with names of usual length
# Seconds of an extraction in which Python imports torch and transformers.
START = 3.4


# Formulas: n eligible entries, k entries taken, c candidates, b bytes of an entry in the files, v of a value


def adapter_bytes(n: float, k: float, tensors: int, v: float = 2) -> float:
    """Return the size of an adapter's file: the entropy of the positions, the values, and a header for each tensor."""
    return k * ((log2(n / k) + 1.44) / 8 + v) + HEADER * tensors


def step_flops(n: float, c: float, tokens: float, sampled: float = SAMPLED) -> float:
    """Return the operations of a mask step: as in full fine-tuning, but weight gradients only at the candidates."""
    return (4 * n + 2 * min(sampled * c, n)) * tokens


def full_flops(n: float, tokens: float) -> float:
    """Return the operations of a step of full fine-tuning."""
    return 6 * n * tokens


def mask_bytes(c: float, v: float = 2) -> float:
    """Return the bytes of c candidates: logit, gradient and moments (16), index (8), two values (2 v), mask (1)."""
    return c * (16 + 8 + 2 * v + 1)


def extract_seconds(n: float, b: float, disk: float, cpu: float, passes: int = 1) -> float:
    """Return the seconds of an extraction, at the speed of the disk or of the processor, whichever is lower."""
    return passes * 2 * n * b / min(disk, cpu) + START


# Measured


def one_layer(width: int) -> nn.Module:
    """Return one layer of Llama's shape, without dropout."""
    heads = width // 128
    return LlamaModel(
        LlamaConfig(
            vocab_size=64, hidden_size=width, intermediate_size=WIDTHS[width], num_hidden_layers=1,
            num_attention_heads=heads, num_key_value_heads=heads,
        )
    )  # fmt: skip


def steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure forward passes and steps at three widths."""
    rows = []
    for width in WIDTHS:
        timing.start(args)
        base = one_layer(width)
        config = GraftConfig(
            donor=timing.donor_of(base), density=CANDIDATES / 10, candidate_ratio=10, selection="learned"
        )
        graft = get_peft_model(copy.deepcopy(base), config)
        full = copy.deepcopy(base)
        full.get_input_embeddings().requires_grad_(False)
        ids = torch.randint(0, 64, (args.batch, args.length))
        upstream = torch.randn(args.batch, args.length, width)
        for model in (graft, full):
            model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_())

        def backward(
            model: nn.Module, ids: torch.Tensor = ids, upstream: torch.Tensor = upstream
        ) -> Callable[[], None]:
            def run() -> None:
                model(input_ids=ids).last_hidden_state.backward(upstream)
                for name, parameter in model.named_parameters():
                    parameter.grad = None
                    if name.endswith("_logits"):  # as after a step of an optimizer: the mask is found anew
                        torch.autograd.graph.increment_version(parameter)

            return run

        def forward(base: nn.Module = base, ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                base(input_ids=ids)

        runs = {"forward": forward, "full": backward(full), "graft": backward(graft)}
        n = sum(parameter.numel() for name, parameter in base.named_parameters() if "embed" not in name)
        found = timing.table(timing.race(runs, args.rounds, args.seed, "cpu"), reference="full")
        about = {"width": width, "n": n, "tokens": args.batch * args.length, "candidates": CANDIDATES}
        rows += [about | row | timing.facts(args) for row in found]
    return rows


def show(title: str, head: list[str], body: list[list[str]]) -> None:
    """Print a table in Markdown."""
    print(f"\n**{title}**\n")
    for line in (head, ["---"] * len(head), *body):
        print("| " + " | ".join(line) + " |")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a csv file; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def check_steps(rows: list[dict[str, Any]]) -> None:
    """Compare the steps with the formula; its only measured input is the speed of the base's forward pass."""
    body = []
    for width in WIDTHS:
        held = {row["contender"]: row for row in rows if int(row["width"]) == width}
        n, tokens = (float(held["graft"][key]) for key in ("n", "tokens"))
        seconds = {name: float(row["seconds_median"]) for name, row in held.items()}
        speed = 2 * n * tokens / seconds["forward"]
        law = {"full": full_flops(n, tokens) / speed, "graft": step_flops(n, CANDIDATES * n, tokens) / speed}
        ratio = float(held["graft"]["seconds_ratio_median"])
        both = [f"{law[name]:.3f} s / {seconds[name]:.3f} s" for name in ("full", "graft")]
        ratios = f"{law['graft'] / law['full']:.2f} / {ratio:.2f}"
        body.append([f"{n / 1e6:.1f}M", f"{speed / 1e9:.0f} GFLOP/s", *both, ratios])
    head = ["entries", "speed of the forward pass", "full step: formula / measured", "mask step", "ratio"]
    show("A step of mask training, candidates 1e-3", head, body)


def check_sizes() -> None:
    """Compare the sizes of adapters with the formula."""
    body = []
    for row in read_csv(RESULTS / "size" / "bytes_per_entry.csv"):
        n = float(row["entries"]) / float(row["density"])
        law = adapter_bytes(n, float(row["entries"]), int(row["tensors"]))
        off = float(row["bytes"]) / law - 1
        body.append(
            [row["model"], f"{n / 1e6:.0f}M", row["density"], f"{law:,.0f}", f"{int(row['bytes']):,}", f"{off:+.1%}"]
        )
    show("Bytes of an adapter, bfloat16", ["model", "entries", "density", "formula", "measured", "error"], body)


def check_extractions() -> None:
    """Compare extractions with the formula; its measured inputs are the speeds of reading and computing alone."""
    body = []
    files = [read_csv(path) for path in (RESULTS / "speed").glob("extract_7b*.csv")]
    for file in sorted(files, key=lambda rows: float(rows[0]["GB"])):
        rows = {row["what"]: row for row in file}
        if "extract" not in rows or rows["extract"]["budget"] == "--exact":
            continue
        found = rows["extract"]
        gigabytes, seconds = float(found["GB"]), float(found["seconds_median"])
        reading = min(float(row["seconds_median"]) for name, row in rows.items() if name.startswith("read"))
        cpu = float(found["cpu_median"]) - float(rows["imports alone"]["cpu_median"])
        law = max(reading, cpu / int(found["cores"])) + float(rows["imports alone"]["seconds_median"])
        row = [
            f"{gigabytes / 4:.2f}B",
            found["cache"],
            f"{gigabytes / reading:.2f} GB/s",
            f"{gigabytes / cpu:.2f} GB/s",
        ]
        row += [f"{law:.1f} s", f"{seconds:.1f} s", f"{seconds / law - 1:+.0%}"]
        body.append([*row, f"{float(found['peak_rss_GB_median']):.2f} GB"])
    head = ["entries", "page cache", "reading alone", "one core computes", "formula", "measured", "error", "peak RSS"]
    show("An extraction at density 1e-3, both files in bfloat16", head, body)


def extrapolate(args: argparse.Namespace) -> None:
    """Extrapolate the formulas to larger models."""
    body, speed = [], args.gpus * args.tflops * 1e12
    for name, n, tensors in (("7B", 6.5e9, 291), ("70B", 68.5e9, 723), ("400B", 402e9, 1137)):
        for density in (1e-5, 1e-4, 1e-3):
            k, c = density * n, 10 * density * n
            seconds = extract_seconds(n, 2, args.disk * 1e9, args.cpu * 1e9, passes=1 if k <= HELD_AT_ONCE else 3)
            # Base, logits and their optimizer's state are shared by the GPUs, indices and values are not.
            each = (2 * n + 16 * c) / args.gpus + mask_bytes(c) - 16 * c
            # A GPU has no sampled product: it gathers below 1 / 7000, else it computes whole gradients.
            flops = step_flops(n, c, args.tokens, sampled=7000)
            row = [name, f"{density:g}", size(adapter_bytes(n, k, tensors)), size(4 * n), f"{seconds / 60:.1f} min"]
            row += [
                size(0.6e9 + 60 * k if k <= HELD_AT_ONCE else 1.1e9),
                size(each),
                size(4 * c),
                f"{flops / speed:.2f} s",
            ]
            body.append([*row, f"{full_flops(n, args.tokens) / speed:.2f} s"])
    head = ["model", "density", "adapter", "files to read", "extract", "memory of extract", "each GPU holds"]
    head += ["gradients between ranks", "mask step", "full step"]
    what = f"{args.gpus} GPUs of {args.tflops:.0f} TFLOP/s achieved, {args.tokens:,} tokens a step"
    show(f"Extrapolated: {what}, disk {args.disk:g} GB/s, processor {args.cpu:g} GB/s", head, body)


def size(count: float) -> str:
    """Return bytes as text with a unit."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def main() -> None:
    """Measure, check, extrapolate."""
    parser = timing.parser(__doc__, rounds=9)
    parser.add_argument("--no-measure", action="store_true", help="take the steps from the csv file")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=128, help="tokens of each")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs that share a model in the extrapolation")
    parser.add_argument(
        "--tflops", type=float, default=400, help="TFLOP/s of each GPU, e.g. 40%% of an H100's 989 in bf16"
    )
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of a step in the extrapolation")
    parser.add_argument("--disk", type=float, default=6, help="GB/s of the disk in the extrapolation")
    parser.add_argument("--cpu", type=float, default=10, help="GB/s that the processor computes, in the extrapolation")
    args = parser.parse_args()
    if not args.no_measure:
        timing.write_csv(args.out, steps(args))
    check_steps(read_csv(args.out or RESULTS / "scaling" / "step.csv"))
    check_sizes()
    check_extractions()
    extrapolate(args)


if __name__ == "__main__":
    main()
