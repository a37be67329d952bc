"""Measure lossless patches of whole donors: bytes, and the speed of encoding and decoding on one core.

    pip install zstandard
    python benchmarks/lossless.py --base path/to/SmolLM2-135M-Instruct --donors donors/* \\
        --out benchmarks/results/size/lossless.csv

`benchmarks/lossless_donors.py` makes the donors. For each of them, over all tensors of the files:

- `steps`: the adapter of `extract --exact`, in which each tensor is coded as steps from the base's bits. `bytes` are
  those of the adapter's two files; the speed is that of the codec, with the checksum of every block.
- `indices`: the entries that differ as coded indices and values, which `--exact` wrote before.
- `zstd of XOR`: zstd, level 19, of donor XOR base.
- `planes of XOR`: the same, each byte of a number apart, with zstd at level 3, as ZipNN does for single models.

`entropy` is the least that a code can take which knows, tensor by tensor, how often each step occurs beside each
exponent of the base. MB/s are of the donor's bytes and of the process's CPU time; `sha256` is the speed of hashing in
the same run, to compare machines with. All codecs are lossless: every tensor is decoded and compared.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors import safe_open

import timing
from peft_graft import extract
from peft_graft.patch.packing import pack_tensor, unpack_tensor
from peft_graft.patch.patch import TensorPatch
from peft_graft.patch.step_codec import bits_of
from peft_graft.patch.step_tensor import StepTensor


@dataclass
class Codec:
    """A way to store a tensor of a donor, given the base's.

    Args:
        encode: Function (base, donor), both flat -> the code and its bytes.
        decode: Function (code, base) -> the donor.
    """

    encode: Callable[[torch.Tensor, torch.Tensor], tuple[Any, int]]
    decode: Callable[[Any, torch.Tensor], torch.Tensor]
    nbytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"encode": 0.0, "decode": 0.0})

    def run(self, base: torch.Tensor, donor: torch.Tensor) -> None:
        """Encode, decode and compare."""
        times = [time.process_time()]
        code, nbytes = self.encode(base, donor)
        times.append(time.process_time())
        decoded = self.decode(code, base)
        times.append(time.process_time())
        if not np.array_equal(bits_of(decoded), bits_of(donor)):
            raise RuntimeError("decoded tensor must be the donor's")
        self.nbytes += nbytes
        self.seconds["encode"] += times[1] - times[0]
        self.seconds["decode"] += times[2] - times[1]


def steps() -> Codec:
    """Return the codec of `extract --exact`."""

    def encode(base: torch.Tensor, donor: torch.Tensor) -> tuple[StepTensor, int]:
        part = StepTensor.encode(base, donor)
        return part, part.data.numel()

    return Codec(encode, lambda code, base: code.decode_whole(base))


def indices() -> Codec:
    """Return the codec of indices and values."""

    def encode(base: torch.Tensor, donor: torch.Tensor) -> tuple[Any, int]:
        where = torch.from_numpy(np.flatnonzero(bits_of(base) != bits_of(donor)))
        packed = pack_tensor(TensorPatch(where, donor[where]))
        return packed, packed.data.numel()

    def decode(code: Any, base: torch.Tensor) -> torch.Tensor:
        part = unpack_tensor(code, base.numel(), "")
        return base.index_copy(0, part.indices, part.values)

    return Codec(encode, decode)


def zstd_of_xor(level: int, planes: bool) -> Codec:
    """Return a codec that compresses donor XOR base, byte by byte or each byte of a number apart."""
    compressor, decompressor = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()

    def encode(base: torch.Tensor, donor: torch.Tensor) -> tuple[bytes, int]:
        xor = (bits_of(base) ^ bits_of(donor)).view(np.uint8)
        code = compressor.compress(np.ascontiguousarray(xor.reshape(-1, 2).T if planes else xor).data)
        return code, len(code)

    def decode(code: bytes, base: torch.Tensor) -> torch.Tensor:
        xor = np.frombuffer(decompressor.decompress(code), np.uint8)
        xor = np.ascontiguousarray(xor.reshape(2, -1).T).reshape(-1) if planes else xor
        bits = xor.view(np.uint16) ^ bits_of(base)
        return torch.from_numpy(bits.view(np.int16)).view(base.dtype)

    return Codec(encode, decode)


def conditional_entropy(base: torch.Tensor, donor: torch.Tensor) -> float:
    """Return the bytes of a bfloat16 tensor's steps in an ideal code that knows their shares beside each exponent."""
    ours, theirs = bits_of(base), bits_of(donor)
    exponents = (ours >> 7) & 255
    _, joint = np.unique(exponents.astype(np.uint32) << 16 | (theirs - ours), return_counts=True)
    _, alone = np.unique(exponents, return_counts=True)
    return float((alone * np.log2(alone)).sum() - (joint * np.log2(joint)).sum()) / 8


def measure(base: Path, donor: Path, args: Any) -> list[dict[str, Any]]:
    """Return a row for each codec."""
    codecs = {"steps": steps(), "indices": indices(), "planes of XOR": zstd_of_xor(3, True)}
    if args.zstd:
        codecs["zstd of XOR"] = zstd_of_xor(19, False)
    total = changed = 0
    entropy = hashing = 0.0
    with safe_open(base / "model.safetensors", "pt") as ours, safe_open(donor / "model.safetensors", "pt") as theirs:
        for name in sorted(ours.keys()):
            sides = ours.get_tensor(name).flatten(), theirs.get_tensor(name).flatten()
            total += sides[0].numel()
            changed += int((bits_of(sides[0]) != bits_of(sides[1])).sum())
            entropy += conditional_entropy(*sides)
            began = time.process_time()
            hashlib.sha256(bits_of(sides[0]).data)
            hashing += time.process_time() - began
            for codec in codecs.values():
                codec.run(*sides)
    with tempfile.TemporaryDirectory() as folder:
        extract(base, donor, folder, exact=True)
        adapter = sum(
            (Path(folder) / name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json")
        )
    codecs["steps"].nbytes = adapter
    size = 2 * total
    rows = []
    for name, codec in codecs.items():
        speeds = {f"{way}_MB_s": f"{size / 1e6 / seconds:.0f}" for way, seconds in codec.seconds.items()}
        about = {"donor": donor.name, "codec": name, "donor_bytes": size, "changed": f"{changed / total:.4f}"}
        about |= {"bytes": codec.nbytes, "ratio": f"{size / codec.nbytes:.2f}", "entropy": round(entropy)}
        about |= {"over_entropy": f"{codec.nbytes / entropy:.4f}", **speeds}
        rows.append(about | {"sha256_MB_s": f"{size / 1e6 / hashing:.0f}"})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure every donor."""
    parser = timing.parser(__doc__, rounds=1)
    parser.add_argument("--base", type=Path, required=True, help="directory of the base, in bfloat16")
    parser.add_argument("--donors", type=Path, nargs="+", required=True, help="directories of donors in bfloat16")
    parser.add_argument(
        "--no-zstd", dest="zstd", action="store_false", help="leave zstd at level 19 out, which is slow"
    )
    args = parser.parse_args()
    args.dtype = "bfloat16"
    timing.start(args)
    rows = [row for donor in args.donors for row in measure(args.base, donor, args)]
    timing.write_csv(args.out, [row | timing.facts(args) for row in rows])


if __name__ == "__main__":
    main()
