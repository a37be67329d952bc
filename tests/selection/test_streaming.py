"""The selection from files takes exactly what the selection from memory takes, however large the budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from peft_graft import RULES, DonorError, SelectionError
from peft_graft.checkpoints import block_reader
from peft_graft.checkpoints.block_reader import Pairs
from peft_graft.checkpoints.donor import CheckpointDonor
from peft_graft.checkpoints.pairing import stream
from peft_graft.selection.rules import Evidence, select
from peft_graft.selection.streaming import Sieve

RULE_NAMES = sorted(name for name, rule in RULES.items() if rule.needs == "weights")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(block_reader, "BLOCK", 16)
    monkeypatch.setattr(block_reader, "PIECE", 5)
    yield
    torch.set_num_threads(1)


def checkpoints(tmp_path: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[Pairs, Tensors, Tensors]:
    """For even seeds few different deltas, so that there are ties everywhere; for odd ones many."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"l.0.a": (4, 9), "l.0.b": (11,), "l.1.a": (4, 9), "l.1.b": (3,), "norm": (2, 2)}
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    donor = {}
    for name, before in base.items():
        steps = torch.randint(-2, 3, before.shape, generator=generator) * 0.5
        if seed % 2:
            steps = torch.randn(before.shape, generator=generator) * 1e-2
        donor[name] = (before.float() + steps).to(dtype)
    files = []
    for role, tensors in (("base", base), ("donor", donor)):
        save_file(tensors, tmp_path / f"{role}.safetensors")
        file = CheckpointDonor(tmp_path / f"{role}.safetensors", role=role)
        files.append({name: [file.extent(name)] for name in tensors})
    return Pairs(*files), base, donor


def in_memory(base: Tensors, donor: Tensors, rule: str, seed: int, **options: Any) -> dict[str, list[int]]:
    """What `select` takes of whole tensors."""

    class InMemory:
        name = "donor"

        def names(self) -> list[str]:
            return sorted(donor)

        def shape(self, name: str) -> tuple[int, ...]:
            return tuple(donor[name].shape)

        def get(self, name: str) -> torch.Tensor:
            return donor[name]

    scored = (
        (name, RULES[rule].score(Evidence(name, before, after.float() - before.float(), seed=seed)))
        for name, before, after in stream(base, InMemory())
    )
    chosen = select(scored, {name: tensor.numel() for name, tensor in base.items()}, **options)
    return {name: index.tolist() for name, index in chosen.items()}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 3),
    rule=st.sampled_from(RULE_NAMES),
    density=st.sampled_from([0.05, 0.3, 0.7, 1.0]),
    scope_and_granularity=st.sampled_from(
        [("global", "entry"), ("tensor", "entry"), ("global", "tensor"), ("global", "layer")]
    ),
    held=st.sampled_from([1, 10, 1000]),
    threads=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_files_give_what_memory_gives(
    tmp_path: Path,
    seed: int,
    rule: str,
    density: float,
    scope_and_granularity: tuple[Any, Any],
    held: int,
    threads: int,
    dtype: torch.dtype,
) -> None:
    torch.set_num_threads(threads)
    scope, granularity = scope_and_granularity
    pairs, base, donor = checkpoints(tmp_path, seed, dtype)
    options: dict[str, Any] = {"density": density, "scope": scope, "granularity": granularity}
    try:
        expected = in_memory(base, donor, rule, seed, **options)
    except SelectionError as error:
        with pytest.raises(SelectionError, match="must"):
            list(Sieve(pairs, RULES[rule], seed=seed, held=held, **options).taken())
        assert "granularity" in str(error)
        return
    read = []
    pairs.progress = read.append
    sieve = Sieve(pairs, RULES[rule], seed=seed, held=held, **options)
    taken = list(sieve.taken())
    assert {part.name: part.indices.tolist() for part in taken} == expected
    for part in taken:
        assert torch.equal(part.base, base[part.name].flatten()[part.indices])
        assert torch.equal(part.donor, donor[part.name].flatten()[part.indices])
        assert part.base.dtype == part.donor.dtype == dtype
    assert sieve.differs
    assert torch.get_num_threads() == threads
    assert sum(read) <= sieve.passes * sum(pairs.nbytes)


def test_a_budget_that_fits_takes_one_pass_and_a_larger_one_three(tmp_path: Path) -> None:
    pairs, _, _ = checkpoints(tmp_path)
    for held, passes in ((30, 1), (29, 3)):
        read: list[int] = []
        pairs.progress = read.append
        sieve = Sieve(pairs, RULES["magnitude"], num_params=30, held=held)
        assert sum(part.indices.numel() for part in sieve.taken()) == 30
        assert sum(read) == passes * sum(pairs.nbytes) == sieve.passes * sum(pairs.nbytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_without_a_rule_every_entry_whose_bits_differ_is_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    base = {"x": torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=dtype), "y": torch.ones(6, dtype=dtype)}
    donor = {"x": torch.tensor([-0.0, 1.0, 2.5, 3.0], dtype=dtype), "y": torch.ones(6, dtype=dtype)}
    for name, tensors in (("base", base), ("donor", donor)):
        save_file(tensors, tmp_path / name)
    files = [CheckpointDonor(tmp_path / name) for name in ("base", "donor")]
    pairs = Pairs(*({name: [file.extent(name)] for name in file.names()} for file in files))
    (only,) = Sieve(pairs, None).taken()
    assert (only.name, only.indices.tolist()) == ("x", [0, 2])  # also a zero that only changed its sign
    assert torch.signbit(only.donor[0])


@pytest.mark.parametrize("rule", [*RULE_NAMES, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_donor_that_is_not_finite_is_refused(tmp_path: Path, rule: str | None, bad: float) -> None:
    _, base, donor = checkpoints(tmp_path)
    donor["l.1.a"][2, 3] = bad
    save_file(donor, tmp_path / "donor.safetensors")
    files = [CheckpointDonor(tmp_path / f"{role}.safetensors") for role in ("base", "donor")]
    pairs = Pairs(*({name: [file.extent(name)] for name in file.names()} for file in files))
    sieve = Sieve(pairs, None if rule is None else RULES[rule], density=None if rule is None else 0.1)
    with pytest.raises(DonorError, match=r"donor tensors must be finite, got 1 NaN or Inf in 'l\.1\.a'"):
        list(sieve.taken())


def test_equal_checkpoints_are_noticed(tmp_path: Path) -> None:
    _, base, _ = checkpoints(tmp_path)
    file = CheckpointDonor(tmp_path / "base.safetensors")
    extents = {name: [file.extent(name)] for name in base}
    sieve = Sieve(Pairs(extents, extents), RULES["random"], density=0.1)
    assert list(sieve.taken()) and not sieve.differs


def test_a_density_that_rounds_to_nothing_everywhere_is_refused(tmp_path: Path) -> None:
    pairs, _, _ = checkpoints(tmp_path)
    with pytest.raises(SelectionError, match="at least one entry in some tensor"):
        list(Sieve(pairs, RULES["magnitude"], density=0.012, scope="tensor").taken())
