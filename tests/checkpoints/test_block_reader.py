"""Reading two checkpoints side by side: every entry once, in order, whatever the sizes and dtypes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_graft import DonorError
from peft_graft.checkpoints import block_reader
from peft_graft.checkpoints.block_reader import PairedReader, map_in_order, worker_pool
from peft_graft.checkpoints.donor import CheckpointDonor
from peft_graft.checkpoints.pairing import Block


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tiny tensors have several, and none of them divides evenly."""
    monkeypatch.setattr(block_reader, "READ_ENTRIES", 7)
    monkeypatch.setattr(block_reader, "BLOCK_ENTRIES", 3)


def write(path: Path, tensors: dict[str, torch.Tensor]) -> CheckpointDonor:
    save_file(tensors, path)
    return CheckpointDonor(path)


def pair(
    tmp_path: Path, base: dict[str, torch.Tensor], donor: dict[str, torch.Tensor] | None, **options
) -> PairedReader:
    ours = write(tmp_path / "base.safetensors", base)
    theirs = None if donor is None else write(tmp_path / "donor.safetensors", donor)
    return PairedReader(
        {name: [ours.extent(name)] for name in base},
        None if theirs is None else {name: [theirs.extent(name)] for name in base},
        **options,
    )


def collect(reader: PairedReader, names: list[str] | None = None) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for span, (base, donor) in reader.map(lambda block: (block.base.clone(), block.donor.clone()), names):
        held = parts.setdefault(span.name, [])
        assert span.start == sum(base.numel() for base, _ in held)
        assert 0 < base.numel() == donor.numel() == span.size <= 3
        held.append((base, donor))
    return {name: tuple(map(torch.cat, zip(*held, strict=True))) for name, held in parts.items()}


def tensors(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b": (5, 10), "a": (1,), "c": (7,), "scalar": (), "empty": (0, 4), "d": (2, 3, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("donor_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_entry_comes_once_and_in_order(tmp_path: Path, donor_dtype: torch.dtype) -> None:
    base, donor = tensors(torch.bfloat16), tensors(donor_dtype, seed=1)
    reader = pair(tmp_path, base, donor)
    found = collect(reader)
    assert list(found) == ["a", "b", "c", "d", "scalar"]  # nothing to read in the empty one
    for name, (before, after) in found.items():
        assert torch.equal(before, base[name].flatten()) and before.dtype == torch.bfloat16
        assert torch.equal(after, donor[name].flatten()) and after.dtype == donor_dtype
        assert reader.dtype(name, donor=True) == donor_dtype
    assert reader.sizes == {"a": 1, "b": 50, "c": 7, "d": 24, "empty": 0, "scalar": 1}


def test_only_the_named_tensors_are_read(tmp_path: Path) -> None:
    base = tensors(torch.float32)
    reader, read = pair(tmp_path, base, tensors(torch.float16)), []
    reader.on_read = read.append
    assert list(collect(reader, ["b", "d"])) == ["b", "d"]
    assert sum(read) == (50 + 24) * (4 + 2)
    assert reader.nbytes == (83 * 4, 83 * 2)


def test_a_tensor_may_stand_in_several_places(tmp_path: Path) -> None:
    base, donor = (write(tmp_path / f"{seed}.safetensors", tensors(torch.float32, seed)) for seed in (0, 1))
    order = ["c", "b", "a", "d"]
    reader = PairedReader({"x": [base.extent(name) for name in order]}, {"x": [donor.extent(name) for name in order]})
    before, after = collect(reader)["x"]
    assert torch.equal(before, torch.cat([base.get(name).flatten() for name in order]))
    assert torch.equal(after, torch.cat([donor.get(name).flatten() for name in order]))


def test_the_base_has_the_dtype_it_is_loaded_in_and_zeros_have_it_too(tmp_path: Path) -> None:
    base = tensors(torch.float32)
    reader = pair(tmp_path, base, None, dtypes={"b": torch.bfloat16})
    found = collect(reader)
    assert torch.equal(found["b"][0], base["b"].flatten().bfloat16())
    assert found["a"][0].dtype == torch.float32
    for name, (before, after) in found.items():
        assert after.dtype == before.dtype == reader.dtype(name, donor=True) and not after.any()
    assert reader.nbytes[1] == 0


@pytest.mark.parametrize("role", ["base", "donor"])
def test_quantized_tensors_are_refused(tmp_path: Path, role: str) -> None:
    plain, coded = {"x": torch.zeros(3)}, {"x": torch.zeros(3, dtype=torch.int8)}
    with pytest.raises(DonorError, match=f"{role} tensors must be float64.*got I8 in 'x'"):
        pair(tmp_path, coded if role == "base" else plain, coded if role == "donor" else plain)


def test_a_file_that_shrinks_is_refused(tmp_path: Path) -> None:
    reader = pair(tmp_path, tensors(torch.float32), tensors(torch.float32))
    with (tmp_path / "donor.safetensors").open("r+b") as file:
        file.truncate((tmp_path / "donor.safetensors").stat().st_size - 8)
    with pytest.raises(DonorError, match=r"donor.safetensors' must stay as it is while it is read"):
        collect(reader)


def test_reading_can_stop_half_way(tmp_path: Path) -> None:
    found = pair(tmp_path, tensors(torch.float32), tensors(torch.float32)).map(lambda block: block.start)
    next(found)
    found.close()  # neither hangs nor warns of files left open


def test_a_failure_in_a_worker_reaches_the_caller(tmp_path: Path) -> None:
    def work(block: Block) -> None:
        raise ValueError(block.name)

    with pytest.raises(ValueError, match="a"):
        list(pair(tmp_path, tensors(torch.float32), None).map(work))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_delta_is_float32_and_refuses_what_is_not_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    base, donor = tensors(dtype), tensors(dtype, seed=1)
    reader = pair(tmp_path, base, donor)
    found = torch.cat([delta for _, delta in reader.map(reader.delta, ["b"])])
    assert torch.equal(found, (donor["b"].float() - base["b"].float()).flatten())
    donor["b"][1, 2] = -torch.inf
    reader = pair(tmp_path, base, donor)
    with pytest.raises(DonorError, match="donor tensors must be finite, got 1 NaN or Inf in 'b'"):
        list(reader.map(reader.delta))


def in_new_thread(call: Callable[[], int]) -> int:
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_three_threads")
def test_the_callers_number_of_threads_stays_while_its_code_runs(tmp_path: Path) -> None:
    reader = pair(tmp_path, tensors(torch.float32), tensors(torch.float32))
    for _, inside in reader.map(lambda block: torch.get_num_threads()):
        assert inside == 1
        assert torch.get_num_threads() == 3
        assert in_new_thread(torch.get_num_threads) == 3  # also of threads that the caller starts
    assert torch.get_num_threads() == in_new_thread(torch.get_num_threads) == 3


@pytest.mark.usefixtures("_three_threads")
def test_an_abandoned_reader_leaves_the_number_of_threads_alone(tmp_path: Path) -> None:
    found = pair(tmp_path, tensors(torch.float32), tensors(torch.float32)).map(lambda block: None)
    next(found)
    assert torch.get_num_threads() == in_new_thread(torch.get_num_threads) == 3
    found.close()
    assert torch.get_num_threads() == in_new_thread(torch.get_num_threads) == 3


@pytest.mark.usefixtures("_three_threads")
def test_workers_keep_to_one_core_from_their_first_operation_to_the_last() -> None:
    with worker_pool(4) as pool:
        for _ in range(3):
            counts = list(pool.map(lambda _: (torch.rand(100_000).sum(), torch.get_num_threads())[1], range(16)))
            assert counts == [1] * 16


@pytest.mark.usefixtures("_three_threads")
def test_threads_that_cannot_be_started_are_an_error_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) == 4:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match="can't start"), worker_pool(8):
        pass
    monkeypatch.undo()
    assert torch.get_num_threads() == in_new_thread(torch.get_num_threads) == 3


def test_no_more_than_a_few_threads_work_however_many_cores_there_are(tmp_path: Path) -> None:
    """Each holds blocks of both sides: on a large machine they would take gigabytes."""
    before = torch.get_num_threads()
    torch.set_num_threads(64)
    try:
        reader, at_work, most = pair(tmp_path, {"x": torch.zeros(7 * 200)}, None), [], []

        def work(block: Block) -> None:
            at_work.append(block.start)
            most.append(len(at_work))
            time.sleep(1e-3)
            at_work.remove(block.start)

        list(reader.map(work))
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
        for number in map_in_order(pool, lambda number: number, range(len(sizes)), 3, size, room=6):
            most.append(sum(sizes[each] for each in begun[:-1] if each not in done))  # without the one just begun
            done.append(number)
    assert done == list(range(len(sizes)))
    assert most[3] == 20 and all(size <= 6 for number, size in zip(done, most, strict=True) if number != 3)
