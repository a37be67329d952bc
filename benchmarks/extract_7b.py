"""How fast `peft-graft extract` is beside merely reading both files, and how much memory it takes.

    python benchmarks/extract_7b.py --scale 0.125 --out trial.csv      # a seventh of the layers' bytes, for a first look
    python benchmarks/extract_7b.py --out benchmarks/results/speed/extract_7b.csv                       # 2 x 13.5 GB

Writes a base and a donor of Llama 7B's shapes in bfloat16, in shards of up to 9.9 GB as on the Hub, and removes them
afterwards. In every round, one process reads all files of both from the first byte to the last and does nothing else
(blocks of 8 MB, as one stream, and as one stream a side at the same time: the faster one is the reference), and then
`peft-graft extract` runs as a process of its own, from its start to its end, imports included. Before each of them, the
kernel is told to forget the files (posix_fadvise DONTNEED), so that all of them read the disk. Peak RSS and CPU seconds
are the kernel's, of that one process (wait4). `--warm` leaves the files in the page cache, where they fit.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

LAYERS, WIDTH, INNER, VOCAB = 32, 4096, 11008, 32000
SHARD = 9.9e9
POOL = 1 << 24
BLOCK = 8 << 20


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, in the order in which checkpoints have them."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(layers):
        root = f"model.layers.{layer}"
        found |= {f"{root}.self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        found |= {f"{root}.mlp.{part}_proj.weight": (INNER, WIDTH) for part in ("gate", "up")}
        found |= {f"{root}.mlp.down_proj.weight": (WIDTH, INNER)}
        found |= {f"{root}.{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


class Values:
    """Weights ~ N(0, 0.02) and a donor's, whose deltas are of many sizes, cut from pools of random numbers."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.base = (torch.randn(POOL, generator=generator) * 0.02).bfloat16()
        # Cubes of a normal number: a heavy tail, as fine-tuning leaves it.
        self.deltas = torch.randn(POOL, generator=generator).pow(3) * 1e-4

    def tensor(self, shape: tuple[int, ...], number: int, donor: bool) -> torch.Tensor:
        """The tensor of this number; a donor's differs from the base's by a piece of the deltas."""
        generator = torch.Generator().manual_seed(number)
        flat = torch.empty(torch.Size(shape).numel(), dtype=torch.bfloat16)
        for part in flat.split(POOL // 2):
            one, other = torch.randint(POOL - part.numel() + 1, (2,), generator=generator).tolist()
            part.copy_(self.base[one : one + part.numel()])
            if donor:
                part.copy_(part.float() + self.deltas[other : other + part.numel()])
        return flat.view(shape)


def write_pair(directory: Path, layers: int, seed: int) -> int:
    """Write `base` and `donor`; return how many bytes both are."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    values, names = Values(seed), shapes(layers)
    for side in ("base", "donor"):
        path = directory / side
        config.save_pretrained(path)
        shards: list[list[str]] = [[]]
        for name in names:
            if sum(2 * torch.Size(names[each]).numel() for each in [*shards[-1], name]) > SHARD:
                shards.append([])
            shards[-1].append(name)
        files = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
        order = {name: number for number, name in enumerate(names)}
        for file, held in zip(files, shards, strict=True):
            tensors = {name: values.tensor(names[name], order[name], side == "donor") for name in held}
            save_file(tensors, path / file, {"format": "pt"})
            print(f"wrote {path / file}", file=sys.stderr)
        weight_map = {name: file for file, held in zip(files, shards, strict=True) for name in held}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(file.stat().st_size for file in weights(directory))


def weights(directory: Path, side: str = "*") -> list[Path]:
    """The shards of both sides, or of one."""
    return sorted(directory.glob(f"{side}/*.safetensors"))


def forget(directory: Path) -> None:
    """Have the kernel drop the files from its page cache."""
    for file in weights(directory):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path]) -> int:
    """Read files from the first byte to the last and forget what they hold."""
    buffer, total = memoryview(bytearray(BLOCK)), 0
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                total += count
    return total


def timed(work: Any, *args: Any) -> dict[str, float]:
    """Wall-clock and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(*args)
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def read_both_sides(directory: Path) -> None:
    """Read the base in one thread and the donor in another."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda side: read(weights(directory, side)), ("base", "donor")))


def run(command: list[str], directory: Path, threads: int | None) -> dict[str, float]:
    """Seconds, CPU seconds and peak RSS of a process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=directory, env=environment, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} stopped with code {process.returncode}")
    # Kilobytes on Linux, bytes on macOS.
    rss = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": time.perf_counter() - began, "cpu": usage.ru_utime + usage.ru_stime, "rss": rss}


def one_round(directory: Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run every contender once."""
    found = {}
    extract = ["-m", "peft_graft", "extract", "base", "donor", "--output_dir", "out", "--overwrite", *args.budget]
    for name, contender in {
        "read, one stream": lambda: timed(read, weights(directory)),
        "read, one stream a side": lambda: timed(read_both_sides, directory),
        "extract": lambda: run(extract, directory, args.threads),
        "imports alone": lambda: run(["-c", "import peft_graft.extract"], directory, args.threads),
    }.items():
        if not args.warm:
            forget(directory)
        found[name] = contender()
        print(name, {key: round(value, 2) for key, value in found[name].items()}, file=sys.stderr)
    return found


def rows(rounds: list[dict[str, dict[str, float]]], nbytes: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians and quartiles, and the speed beside the faster way to read in the same round."""
    made = []
    for name in rounds[0]:
        row: dict[str, Any] = {"what": name, "GB": round(nbytes / 1e9, 2), "cache": "warm" if args.warm else "cold"}
        columns = {key: [one[name][key] for one in rounds] for key in rounds[0][name]}
        references = [min(one[way]["seconds"] for way in one if way.startswith("read")) for one in rounds]
        columns["share_of_reading_speed"] = [r / s for r, s in zip(references, columns["seconds"], strict=True)]
        for key, values in columns.items():
            low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
            scale, digits = (1e-9, 3) if key == "rss" else (1, 3)
            label = "peak_rss_GB" if key == "rss" else key
            for part, value in (("median", middle), ("q1", low), ("q3", high)):
                row[f"{label}_{part}"] = round(value * scale, digits)
        row |= {
            "rounds": len(rounds), "budget": " ".join(args.budget), "layers": args.layers, "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1), "processor": processor(), "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "peft")},
        }  # fmt: skip
        made.append(row)
    return made


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def main() -> None:
    """Write the pair, measure, remove it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the 32 layers")
    parser.add_argument("--directory", type=Path, default=Path("extract_7b_files"), help="where to write the files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch in extract; default: its own")
    parser.add_argument("--density", default="1e-3")
    parser.add_argument("--exact", action="store_true", help="measure --exact instead of a density")
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--keep", action="store_true", help="leave the files for another run, which then takes them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="csv file to write; printed in any case")
    args = parser.parse_args()
    args.layers = max(1, round(args.scale * LAYERS))
    args.budget = ["--exact"] if args.exact else ["--density", args.density]
    directory = args.directory.resolve()
    needed = 2 * sum(2 * torch.Size(shape).numel() for shape in shapes(args.layers).values())
    there = sum(file.stat().st_size for file in weights(directory))
    free = shutil.disk_usage(directory.parent).free
    if not 0 <= there - needed < 1e7 and free < 1.1 * needed + 2e9:
        raise SystemExit(f"needs {(1.1 * needed + 2e9) / 1e9:.0f} GB of free disk for 2 files, got {free / 1e9:.0f} GB")
    try:
        nbytes = there if 0 <= there - needed < 1e7 else write_pair(directory, args.layers, args.seed)
        if args.warm:
            read(weights(directory))
        made = rows([one_round(directory, args) for _ in range(args.rounds)], nbytes, args)
    finally:
        if not args.keep:
            shutil.rmtree(directory, ignore_errors=True)
    for row in made:
        print("  ".join(f"{key}={value}" for key, value in row.items() if not key.endswith(("_q1", "_q3"))))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in made for key in row)))
            writer.writeheader()
            writer.writerows(made)


if __name__ == "__main__":
    main()
