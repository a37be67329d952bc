"""Files from strangers: each loads to exactly what it says, or raises PatchError; no crash, no hang, no memory.

`python tests/patch/test_hostile.py --files 100000 --seed 0` runs the mutation alone and prints what came out; a failure
prints the command that repeats it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from peft_graft.patch.index_codec import encode_indices
from peft_graft.patch.patch import CodedTensor, Patch, PatchError, TensorPatch, file_key
from peft_graft.patch.value_codes import VALUE_CODES, encode_values

SHAPES = {
    "l.weight": (3, 4),
    "l.bias": (3,),
    "zeros.weight": (40, 100),
    "runs.weight": (3000,),
    "far.weight": (1 << 20,),
}
HEADROOM = 64 << 20  # bytes that loading a file of a few KB may take on top of the interpreter
WORDS = (b"9", b"0", b"-1", b"1", b",", b"]", b'"', b"F64", b"U8", b"I64", b"1e18", b"4294967296", b"../", b"null")
SLOWEST = 5.0  # seconds; a hang would be far more


def seeds() -> list[bytes]:
    """Valid files with every codec, several dtypes, values left out, and nothing at all."""
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(4000, generator=generator)[:60].sort().values
    runs = (torch.arange(20)[:, None] * 150 + torch.arange(8)).reshape(-1)
    far = torch.randperm(1 << 20, generator=generator)[:30].sort().values
    parts = {
        "l.weight": TensorPatch(torch.tensor([1, 2, 7, 10]), torch.randn(4, generator=generator).bfloat16()),
        "l.bias": TensorPatch(torch.arange(3), torch.randn(3, generator=generator)),
        "zeros.weight": TensorPatch(some, torch.zeros(60)),
        "runs.weight": TensorPatch(runs, torch.randn(160, generator=generator).half()),
        "far.weight": TensorPatch(far, torch.randn(30, generator=generator).double()),
    }
    coded = {
        name: encode_values(part.indices, part.values, torch.zeros(part.count), VALUE_CODES[code])[0]
        for (name, part), code in zip(parts.items(), ("sign", "int4", "int8", "int4", "sign"), strict=True)
    }
    patches = [Patch(parts), Patch(coded), Patch({}), *(Patch({name: part}) for name, part in (parts | coded).items())]
    files = [save(patch.to_tensors()) for patch in patches]
    apart = {}  # as version 1 wrote them
    for name, part in parts.items():
        module, _, param = name.rpartition(".")
        apart[file_key(module, param, "indices")] = encode_indices(part.indices)
        apart[file_key(module, param, "values")] = part.values
    return [*files, save(apart)]


def mutated(good: bytes, source: random.Random) -> bytes:
    """Damage a file in one to three places: bytes, lengths, the header's text, or whole regions."""
    data = bytearray(good)
    header = int.from_bytes(good[:8], "little") + 8
    for _ in range(source.randint(1, 3)):
        kind = source.random()
        at = source.randrange(min(len(data), header) if source.random() < 0.5 else len(data)) if data else 0
        if kind < 0.45 and data:
            data[at] = source.randrange(256)
        elif kind < 0.55:
            data[at:at] = bytes(source.choices(range(256), k=source.randint(1, 9)))
        elif kind < 0.65:
            del data[at : at + source.randint(1, 9)]
        elif kind < 0.70:
            del data[at:]
        elif kind < 0.75:
            data[:8] = struct.pack("<Q", source.choice([0, 1, header, 2**31, 2**63, 2**64 - 1]))
        elif kind < 0.95:
            data[at : at + source.randint(0, 3)] = source.choice(WORDS)
        else:
            other = source.randrange(len(data) + 1)
            data[at : at + 16] = data[other : other + 16]
    return bytes(data)


def outcome(path: Path, shapes: dict[str, tuple[int, ...]] | None) -> str:
    """Load a file; what comes out must be a patch that says what the file says.

    Returns:
        "loaded" or "refused".
    """
    try:
        patch = Patch.load(path, shapes)
    except PatchError as error:
        if not str(error):
            raise ValueError("an error must say something") from error
        return "refused"
    with safe_open(path, framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name, part in patch.tensors.items():
        numel = int(torch.tensor(shapes[name]).prod()) if shapes else 1 << 48
        indices = part.indices
        ordered = bool((indices[1:] > indices[:-1]).all())
        inside = indices.numel() == 0 or (int(indices[0]) >= 0 and int(indices[-1]) < numel)
        plain = part.decode(torch.zeros(numel)) if isinstance(part, CodedTensor) and numel < 1 << 21 else part
        sound = not isinstance(plain, TensorPatch) or bool(plain.values.isfinite().all())
        module, _, param = name.rpartition(".")
        keys = [f"{prefix}{module}{'.' if module else ''}graft_patch.{param}" for prefix in ("", "base_model.model.")]
        for raw in (stored[f"{key}_values"] for key in keys if f"{key}_values" in stored):
            sound = sound and torch.equal(plain.values, raw if raw.dim() == 1 else raw.new_zeros(raw.shape[0]))
        if not (ordered and inside and sound):
            raise ValueError(f"{name} was loaded to something else than the file says")
    written = patch.to_tensors()
    again = Patch.from_tensors(written, shapes)
    if any(not torch.equal(tensor, again.to_tensors()[key]) for key, tensor in written.items()):
        raise ValueError("what was written is not what it was read as")
    if any(not torch.equal(again.tensors[name].indices, part.indices) for name, part in patch.tensors.items()):
        raise ValueError("what was loaded does not survive being written")
    return "loaded"


def fuzz(count: int, seed: int) -> tuple[Counter[str], float]:
    """Load `count` mutated files, half of them without knowing the base's shapes, under a limit of memory."""
    source, good = random.Random(seed), seeds()
    found: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "mutated.safetensors"
        path.write_bytes(good[0])
        outcome(path, SHAPES)  # whatever is imported or allocated once
        size = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + HEADROOM, resource.RLIM_INFINITY))
        for number in range(count):
            path.write_bytes(mutated(source.choice(good), source))
            started = time.perf_counter()
            found[outcome(path, SHAPES if number % 2 else None)] += 1
            slowest = max(slowest, time.perf_counter() - started)
    return found, slowest


def run_fuzz(count: int, seed: int) -> None:
    again = f"again: python tests/patch/test_hostile.py --files {count} --seed {seed}"
    command = [sys.executable, "-W", "ignore", __file__, "--files", str(count), "--seed", str(seed)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stderr[-3000:]}\n{again}"
    report: dict[str, float] = json.loads(result.stdout)
    assert report["refused"] + report["loaded"] == count, again
    assert report["loaded"] > 0 and report["refused"] > count / 10, again  # neither side is vacuous
    assert report["slowest"] < SLOWEST, again


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_mutated_files_load_to_what_they_say_or_are_refused() -> None:
    run_fuzz(2000, seed=int(time.time()))


def test_a_failure_says_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")  # a command that fails, in the place of the interpreter
    with pytest.raises(AssertionError, match=r"again: python tests/patch/test_hostile.py --files 5 --seed 123456"):
        run_fuzz(5, seed=123456)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_hundred_thousand_mutated_files() -> None:
    run_fuzz(100_000, seed=0)


# A corpus of what an attacker would write. (what is wrong, entries: key -> tensor, part of the error)

ONE = encode_indices(torch.tensor([1]))
CORPUS = {
    "unsorted": ({"l.graft_patch.weight": (b"\x02" + b"junk", torch.ones(2))}, "deflated|zlib|stream"),
    "out of range": ({"l.graft_patch.weight": (encode_indices(torch.tensor([12])), torch.ones(1))}, "below 12"),
    "more entries than the tensor": ({"l.graft_patch.bias": (ONE, torch.ones(4))}, "at most 3"),
    "fewer codes than values": ({"l.graft_patch.weight": (b"\x01\x00\x80", torch.ones(2))}, "Rice codes of 2"),
    "integer values": ({"l.graft_patch.weight": (ONE, torch.ones(1, dtype=torch.int64))}, "floating-point"),
    "eight-bit floats": ({"l.graft_patch.weight": (ONE, torch.ones(1).to(torch.float8_e4m3fn))}, "floating-point"),
    "NaN": ({"l.graft_patch.weight": (ONE, torch.tensor([torch.nan]))}, "1 NaN or Inf"),
    "infinity": ({"l.graft_patch.weight": (ONE, torch.tensor([torch.inf]))}, "1 NaN or Inf"),
    "matrix of values": ({"l.graft_patch.weight": (ONE, torch.ones(1, 1))}, r"of shape \(n,\)"),
    "no indices": ({"l.graft_patch.weight": (b"", torch.ones(0))}, "non-empty"),
    "unknown codec": ({"l.graft_patch.weight": (b"\x07\x00", torch.ones(1))}, "codec"),
    "a billion zeros of one byte": ({"zeros.graft_patch.weight": (b"\x00", torch.ones(10**9, 0))}, "at most 8"),
    "an inflating bomb": ({"zeros.graft_patch.weight": (None, torch.ones(4))}, "at most"),
    "a tensor that is not there": ({"other.graft_patch.weight": (ONE, torch.ones(1))}, "one that the base has"),
    "a path": ({"../../etc.graft_patch.weight": (ONE, torch.ones(1))}, "one that the base has"),
    "an absolute path": ({"/etc/passwd.graft_patch.weight": (ONE, torch.ones(1))}, "one that the base has"),
    "dunder attributes": ({"l.__class__.graft_patch.weight": (ONE, torch.ones(1))}, "one that the base has"),
    "given twice": (
        {"l.graft_patch.weight": (ONE, torch.ones(1)), "base_model.model.l.graft_patch.weight": (ONE, torch.ones(1))},
        "given once",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CORPUS)
def test_the_corpus_is_refused(case: str, tmp_path: Path) -> None:
    entries, message = CORPUS[case]
    state = {}
    for key, (blob, values) in entries.items():
        if blob is None:  # 64 MiB of zeros, deflated
            import zlib

            blob = b"\x02" + zlib.compress(bytes(64 << 20), 9)
        coded = blob.clone() if isinstance(blob, torch.Tensor) else torch.tensor(list(blob), dtype=torch.uint8)
        state |= {f"{key}_indices": coded, f"{key}_values": values}
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(save(state))
    before = path.read_bytes()
    with pytest.raises(PatchError, match=message):
        Patch.load(path, SHAPES)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


# (what is wrong, the table, the packed bytes, part of the error)
TABLES = {
    "no JSON": (b"{", b"", "JSON that names everything once"),
    "no UTF-8": (b"\xff\xfe\xfd", b"", "JSON that names everything once"),
    "deep nesting": (b"[" * 100_000, b"", "JSON that names everything once"),
    "a list": (b"[]", b"", "an object of JSON"),
    "an unknown code": (b'{"F8":{}}', b"", "code of values must be one of"),
    "a code without rows": (b'{"F32":3}', b"", "an object of JSON"),
    "a name twice": (b'{"F32":{"l.bias":[1,2],"l.bias":[1,2]}}', b"", "names everything once"),
    "a code twice": (b'{"F32":{},"F32":{}}', b"", "names everything once"),
    "a tensor in two codes": (b'{"F32":{"l.bias":[1,2]},"F16":{"l.bias":[1,2]}}', b"", "given once.*'l.bias'"),
    "numbers without a star": (b'{"F32":{"l.bias":{"0":[1,2]}}}', b"", "one with a star"),
    "a short row": (b'{"F32":{"l.bias":[1]}}', b"", "2 whole numbers.*'l.bias'"),
    "a fraction": (b'{"F32":{"l.bias":[1.0,2]}}', b"", "2 whole numbers.*'l.bias'"),
    "a truth": (b'{"F32":{"l.bias":[true,2]}}', b"", "2 whole numbers.*'l.bias'"),
    "a negative number": (b'{"F32":{"l.bias":[-1,2]}}', b"", "numbers in .*'l.bias'"),
    "a huge number": (b'{"F32":{"l.bias":[1,' + b"9" * 5000 + b"]}}", b"", "names everything once|numbers in"),
    "more entries than bytes": (b'{"sign":{"l.bias":[281474976710656,2]}}', bytes(6), "packed bytes must be uint8"),
    "bytes left over": (b'{"F32":{"l.bias":[1,2]}}', bytes(7), "packed bytes must be uint8"),
    "bits left over": (b'{"sign":{"l.bias":[1,2]}}', b"\0\0" + bytes(4) + b"\xc0", "bits after the levels.*'l.bias'"),
    "half a byte left over": (b'{"int4":{"l.bias":[1,2]}}', b"\0\0" + bytes(4) + b"\x11", "bits after the levels"),
    "a level too low": (b'{"int8":{"l.bias":[1,2]}}', b"\0\0" + bytes(4) + b"\x80", "levels must be those of 'int8'"),
    "a negative scale": (b'{"sign":{"l.bias":[1,2]}}', b"\0\0" + b"\0\0\x80\xbf" + b"\0", "finite and not negative"),
    "an infinite scale": (b'{"sign":{"l.bias":[1,2]}}', b"\0\0" + b"\0\0\x80\x7f" + b"\0", "finite and not negative"),
    "a path": (b'{"F32":{"../../etc":[1,2]}}', bytes(6), "one that the base has"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_hostile_tables_are_refused(case: str, tmp_path: Path) -> None:
    table, packed, message = TABLES[case]
    found = {"table": table, "packed": packed}
    state = {f"graft_patch.{kind}": torch.tensor(list(data), dtype=torch.uint8) for kind, data in found.items()}
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(save(state))
    with pytest.raises(PatchError, match=message):
        Patch.load(path, SHAPES)


def test_half_a_packed_patch_is_refused() -> None:
    with pytest.raises(PatchError, match=r"given as table and packed, got only \['table'\]"):
        Patch.from_tensors({"graft_patch.table": torch.tensor([123, 125], dtype=torch.uint8)})


HEADERS = {
    "overlapping": {"a": [0, 4], "b": [2, 6]},
    "beyond the file": {"a": [0, 10**15]},
    "backwards": {"a": [4, 0]},
    "negative": {"a": [-4, 0]},
    "a hole": {"a": [0, 4], "b": [8, 12]},
}


@pytest.mark.parametrize("case", HEADERS)
def test_lying_headers_are_refused(case: str, tmp_path: Path) -> None:
    header = {
        f"l.graft_patch.{name}_indices": {"dtype": "U8", "shape": [abs(ends[1] - ends[0])], "data_offsets": ends}
        for name, ends in HEADERS[case].items()
    }
    text = json.dumps(header).encode()
    path = tmp_path / "lying.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(6))
    with pytest.raises(PatchError, match="whole safetensors"):
        Patch.load(path, SHAPES)


def test_an_old_pickle_is_not_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "exploded",)  # type: ignore[return-value]

    path = tmp_path / "adapter_model.safetensors"
    torch.save({"l.graft_patch.weight_values": Bomb()}, path)
    with pytest.raises(PatchError, match="whole safetensors"):
        Patch.load(path, SHAPES)
    assert not (tmp_path / "exploded").exists()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000, help="mutated files to load")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    counts, longest = fuzz(flags.files, flags.seed)
    print(json.dumps({"loaded": counts["loaded"], "refused": counts["refused"], "slowest": longest}))
