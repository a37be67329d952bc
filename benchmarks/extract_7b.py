"""Measure time and memory of `peft-graft extract`, against merely reading both files.

    python benchmarks/extract_7b.py --scale 0.125                                               # 2 x 2.1 GB, to try
    python benchmarks/extract_7b.py --out benchmarks/results/speed/extract_7b.csv               # 2 x 13.5 GB
    python benchmarks/extract_7b.py --scale 0.25 --exact --differ 0.1                           # a donor of RL

The script writes a base and a donor of Llama 7B's shapes in bfloat16, in shards of up to 4.9 GB, and removes them
afterwards. Every round runs two things:

- the reference: read all files from the first byte to the last, in blocks of 8 MB, as one stream and as one stream per
  side at the same time; the faster of the two counts;
- `peft-graft extract` as a process of its own, imports included.

Before each of them the kernel drops the files from its page cache (posix_fadvise DONTNEED), so that all of them read
the disk; `--warm` leaves the files there. Peak RSS and CPU seconds are those of that process alone (wait4).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
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

from flags import Flags

LAYERS, WIDTH, INNER, VOCAB = 32, 4096, 11008, 32000
SHARD = 4.9e9
POOL = 1 << 24
BLOCK = 8 << 20


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor, in the order of checkpoints."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(layers):
        root = f"model.layers.{layer}"
        found |= {f"{root}.self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        found |= {f"{root}.mlp.{part}_proj.weight": (INNER, WIDTH) for part in ("gate", "up")}
        found |= {f"{root}.mlp.down_proj.weight": (WIDTH, INNER)}
        found |= {f"{root}.{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


def write_pair(directory: Path, layers: int, seed: int, differ: float) -> None:
    """Write `base` and `donor`: weights ~ N(0, 0.02) and deltas with a heavy tail, both cut from pools of numbers.

    With `differ` below 1, only that share of the entries differs, by deltas that are too large to be rounded away.
    """
    # Imported here, because this runs in a process of its own: a child process inherits the peak RSS of its parent.
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.randn(POOL, generator=generator) * 0.02).bfloat16()
    deltas = torch.randn(POOL, generator=generator).pow(3) * 1e-4
    if differ < 1:
        deltas = torch.where(torch.rand(POOL, generator=generator) < differ, deltas.sign() * 1e-2, 0.0)

    def tensor(number: int, shape: tuple[int, ...], donor: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        flat = torch.empty(math.prod(shape), dtype=torch.bfloat16)
        for part in flat.split(POOL // 2):
            one, other = torch.randint(POOL - part.numel() + 1, (2,), generator=generator).tolist()
            part.copy_(weights[one : one + part.numel()])
            if donor:
                part.copy_(part.float() + deltas[other : other + part.numel()])
        return flat.view(shape)

    names = shapes(layers)
    shards: list[list[str]] = [[]]
    for name in names:
        if sum(2 * math.prod(names[each]) for each in [*shards[-1], name]) > SHARD:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    order = {name: number for number, name in enumerate(names)}
    for side in ("base", "donor"):
        path = directory / side
        config.save_pretrained(path)
        for file, held in zip(files, shards, strict=True):
            tensors = {name: tensor(order[name], names[name], side == "donor") for name in held}
            save_file(tensors, path / file, {"format": "pt"})
            print(f"wrote {path / file}", file=sys.stderr)
        weight_map = {name: file for file, held in zip(files, shards, strict=True) for name in held}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weights(directory: Path, side: str = "*") -> list[Path]:
    """Return the shards of both sides, or of one."""
    return sorted(directory.glob(f"{side}/*.safetensors"))


def forget(directory: Path) -> None:
    """Drop the files from the kernel's page cache."""
    for file in weights(directory):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path]) -> int:
    """Read files from the first byte to the last, and return the number of bytes."""
    buffer, total = memoryview(bytearray(BLOCK)), 0
    for file in files:
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                total += count
    return total


def timed(work: Any, *args: Any) -> dict[str, float]:
    """Return the wall-clock and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(*args)
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def read_both_sides(directory: Path) -> None:
    """Read the base in one thread and the donor in another."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda side: read(weights(directory, side)), ("base", "donor")))


def run(command: list[str], directory: Path, threads: int | None) -> dict[str, float]:
    """Run a process, and return its seconds, CPU seconds and peak RSS."""
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
    extract = ["-m", "peft_graft", "extract", "base", "donor", "--output-dir", "out", "--overwrite", *args.budget]
    for name, contender in {
        "read, one stream": lambda: timed(read, weights(directory)),
        "read, one stream a side": lambda: timed(read_both_sides, directory),
        "extract": lambda: run(extract, directory, args.threads),
        "imports alone": lambda: run(["-c", "import peft_graft.workflows.extract"], directory, args.threads),
    }.items():
        if not args.warm:
            forget(directory)
        found[name] = contender()
        print(name, {key: round(value, 2) for key, value in found[name].items()}, file=sys.stderr)
    return found


def rows(rounds: list[dict[str, dict[str, float]]], nbytes: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return medians and quartiles, and the speed relative to the faster way to read in the same round."""
    made = []
    for name in rounds[0]:
        row: dict[str, Any] = {"what": name, "GB": round(nbytes / 1e9, 2), "cache": "warm" if args.warm else "cold"}
        row |= {"adapter_bytes": args.adapter_bytes} if name == "extract" else {}
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
            "rounds": len(rounds), "budget": " ".join(args.budget), "differ": args.differ, "layers": args.layers,
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1), "processor": processor(), "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "peft")},
        }  # fmt: skip
        made.append(row)
    return made


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()


def main() -> None:
    """Write the pair, measure, and remove it."""
    parser = Flags(__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the 32 layers")
    parser.add_argument("--directory", type=Path, default=Path("extract_7b_files"), help="where to write the files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch threads of extract; default: torch's own choice")
    parser.add_argument("--density", default="1e-3")
    parser.add_argument("--exact", action="store_true", help="measure --exact instead of a density")
    parser.add_argument("--differ", type=float, default=1.0, help="share of the donor's entries that differ")
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--keep", action="store_true", help="keep the files, and reuse them in the next run")
    parser.add_argument("--write-only", action="store_true", help="write the files and stop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="csv file to write; printed in any case")
    args = parser.parse_args()
    args.layers = max(1, round(args.scale * LAYERS))
    args.budget = ["--exact"] if args.exact else ["--density", args.density]
    directory = args.directory.resolve()
    if args.write_only:
        write_pair(directory, args.layers, args.seed, args.differ)
        return
    needed = 2 * sum(2 * math.prod(shape) for shape in shapes(args.layers).values())
    free = shutil.disk_usage(directory.parent).free
    if not weights(directory) and free < needed + 5e9:
        raise SystemExit(f"disk must have {(needed + 5e9) / 1e9:.0f} GB free, got {free / 1e9:.0f} GB. Use --scale.")
    try:
        if not weights(directory):
            subprocess.run([sys.executable, *sys.argv, "--write-only"], check=True)
        nbytes = sum(file.stat().st_size for file in weights(directory))
        if not needed <= nbytes < needed + 1e8:
            raise SystemExit(f"{directory} must hold a pair of this scale, got {nbytes} bytes. Remove it.")
        if args.warm:
            read(weights(directory))
        rounds = [one_round(directory, args) for _ in range(args.rounds)]
        args.adapter_bytes = (directory / "out" / "adapter_model.safetensors").stat().st_size
        made = rows(rounds, nbytes, args)
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
