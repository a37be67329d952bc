"""Reading two checkpoints side by side: every entry once, in order, whatever the sizes and dtypes."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_graft import DonorError
from peft_graft.checkpoints import block_reader
from peft_graft.checkpoints.block_reader import Pairs, in_order
from peft_graft.checkpoints.donor import CheckpointDonor


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny tensors have several, and none of them divides evenly."""
    monkeypatch.setattr(block_reader, "BLOCK", 7)
    monkeypatch.setattr(block_reader, "PIECE", 3)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> CheckpointDonor:
    save_file(tensors, path)
    return CheckpointDonor(path)


def pair(tmp_path: Path, base: dict[str, torch.Tensor], donor: dict[str, torch.Tensor] | None, **options) -> Pairs:
    ours = write(tmp_path / "base.safetensors", base)
    theirs = None if donor is None else write(tmp_path / "donor.safetensors", donor)
    return Pairs(
        {name: [ours.extent(name)] for name in base},
        None if theirs is None else {name: [theirs.extent(name)] for name in base},
        **options,
    )


def collect(pairs: Pairs, names: list[str] | None = None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for piece in pairs.pieces(names):
        held = parts.setdefault(piece.name, [])
        assert piece.start == sum(base.numel() for base, _ in held)
        assert 0 < piece.base.numel() <= 3
        held.append((piece.base.clone(), piece.donor.clone()))
    return {name: tuple(map(torch.cat, zip(*held, strict=True))) for name, held in parts.items()}


def tensors(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b": (5, 10), "a": (1,), "c": (7,), "scalar": (), "empty": (0, 4), "d": (2, 3, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("donor_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_entry_comes_once_and_in_order(tmp_path: Path, donor_dtype: torch.dtype) -> None:
    base, donor = tensors(torch.bfloat16), tensors(donor_dtype, seed=1)
    pairs = pair(tmp_path, base, donor)
    found = collect(pairs)
    assert list(found) == ["a", "b", "c", "d", "scalar"]  # nothing to read in the empty one
    for name, (before, after) in found.items():
        assert torch.equal(before, base[name].flatten()) and before.dtype == torch.bfloat16
        assert torch.equal(after, donor[name].flatten()) and after.dtype == donor_dtype
        assert pairs.dtype(name, donor=True) == donor_dtype
    assert pairs.sizes == {"a": 1, "b": 50, "c": 7, "d": 24, "empty": 0, "scalar": 1}


def test_only_the_named_tensors_are_read(tmp_path: Path) -> None:
    base = tensors(torch.float32)
    pairs, read = pair(tmp_path, base, tensors(torch.float16)), []
    pairs.progress = read.append
    assert list(collect(pairs, ["b", "d"])) == ["b", "d"]
    assert sum(read) == (50 + 24) * (4 + 2)
    assert pairs.nbytes == (83 * 4, 83 * 2)


def test_a_tensor_may_stand_in_several_places(tmp_path: Path) -> None:
    base, donor = (write(tmp_path / f"{seed}.safetensors", tensors(torch.float32, seed)) for seed in (0, 1))
    order = ["c", "b", "a", "d"]
    pairs = Pairs({"x": [base.extent(name) for name in order]}, {"x": [donor.extent(name) for name in order]})
    before, after = collect(pairs)["x"]
    assert torch.equal(before, torch.cat([base.get(name).flatten() for name in order]))
    assert torch.equal(after, torch.cat([donor.get(name).flatten() for name in order]))


def test_the_base_has_the_dtype_it_is_loaded_in_and_zeros_have_it_too(tmp_path: Path) -> None:
    base = tensors(torch.float32)
    pairs = pair(tmp_path, base, None, dtypes={"b": torch.bfloat16})
    found = collect(pairs)
    assert torch.equal(found["b"][0], base["b"].flatten().bfloat16())
    assert found["a"][0].dtype == torch.float32
    for name, (before, after) in found.items():
        assert after.dtype == before.dtype == pairs.dtype(name, donor=True) and not after.any()
    assert pairs.nbytes[1] == 0


@pytest.mark.parametrize("role", ["base", "donor"])
def test_quantized_tensors_are_refused(tmp_path: Path, role: str) -> None:
    plain, coded = {"x": torch.zeros(3)}, {"x": torch.zeros(3, dtype=torch.int8)}
    with pytest.raises(DonorError, match=f"{role} tensors must be float64.*got I8 in 'x'"):
        pair(tmp_path, coded if role == "base" else plain, coded if role == "donor" else plain)


def test_a_file_that_shrinks_is_refused(tmp_path: Path) -> None:
    pairs = pair(tmp_path, tensors(torch.float32), tensors(torch.float32))
    with (tmp_path / "donor.safetensors").open("r+b") as file:
        file.truncate((tmp_path / "donor.safetensors").stat().st_size - 8)
    with pytest.raises(DonorError, match=r"donor.safetensors' must stay as it is while it is read"):
        collect(pairs)


def test_reading_can_stop_half_way(tmp_path: Path) -> None:
    stream = pair(tmp_path, tensors(torch.float32), tensors(torch.float32)).pieces()
    next(stream)
    stream.close()  # neither hangs nor warns of files left open


def test_no_more_than_a_few_threads_work_however_many_cores_there_are(tmp_path: Path) -> None:
    """Each holds blocks of both sides: on a large machine they would take gigabytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(64)
    try:
        pairs, at_work, most = pair(tmp_path, {"x": torch.zeros(7 * 200)}, None), [], []

        def work(piece: block_reader.Piece) -> None:
            at_work.append(piece.start)
            most.append(len(at_work))
            time.sleep(1e-3)
            at_work.remove(piece.start)

        list(pairs.map(work))
        assert torch.get_num_threads() == 64
    finally:
        torch.set_num_threads(before)
    assert 1 < max(most) <= 8


def test_large_items_wait_for_those_before() -> None:
    sizes, begun, done, most = [3, 4, 2, 20, 1, 1, 1], [], [], []

    def size(number: int) -> int:
        begun.append(number)
        return sizes[number]

    with ThreadPoolExecutor(4) as pool:
        for number in in_order(pool, lambda number: number, range(len(sizes)), 3, size, room=6):
            most.append(sum(sizes[each] for each in begun[:-1] if each not in done))  # without the one just begun
            done.append(number)
    assert done == list(range(len(sizes)))
    assert most[3] == 20 and all(size <= 6 for number, size in zip(done, most, strict=True) if number != 3)
