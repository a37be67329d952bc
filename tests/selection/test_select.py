"""One selector: memory and files give the same entries, which are those of a dense sort, however large the budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from peft_graft import RULES, DonorError, SelectionError
from peft_graft.checkpoints import block_reader
from peft_graft.checkpoints.block_reader import PairedReader
from peft_graft.checkpoints.donor import CheckpointDonor
from peft_graft.checkpoints.pairing import Block, PairedTensors, Span
from peft_graft.selection import select
from peft_graft.selection.budget import Budget, unit_of
from peft_graft.selection.rules import Evidence, Rule
from peft_graft.selection.select import Selector

Tensors = dict[str, torch.Tensor]
DATA_FREE = sorted(name for name, rule in RULES.items() if rule.kind == "data_free")
# Few distinct values, so that ties are everywhere.
SCORES = st.lists(st.integers(-2, 2).map(float), min_size=0, max_size=12)
MODELS = st.lists(SCORES, min_size=1, max_size=5).filter(lambda tensors: sum(map(len, tensors)) > 0)
GIVEN = Rule("given", lambda evidence: evidence.delta, "the scores of the source, as they are")


class Scores:
    """A source of raw scores: its deltas, in blocks of a few entries, all of which differ from the base."""

    whole_tensors = True
    with_unchanged_nan: frozenset[str] = frozenset()

    def __init__(self, tensors: Iterable[tuple[str, Any]], block: int = 5) -> None:
        self.tensors = {name: torch.as_tensor(values) for name, values in tensors}
        self.sizes = {name: scores.numel() for name, scores in self.tensors.items()}
        self.block = block

    def map(
        self, work: Callable[[Block], Any], names: Iterable[str] | None = None, workers: int | None = None
    ) -> Iterator[tuple[Span, Any]]:
        for name in self.sizes if names is None else names:
            for start in range(0, self.sizes[name], self.block):
                part = self.tensors[name].flatten()[start : start + self.block]
                yield Span(name, start, part.numel()), work(Block(name, start, torch.full_like(part, -99), part))

    def delta(self, block: Block) -> torch.Tensor:
        return block.donor


class Donor:
    """A donor in memory."""

    name = "donor"

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def named(tensors: list[list[float]]) -> list[tuple[str, torch.Tensor]]:
    return [(f"t{i}", torch.tensor(values)) for i, values in enumerate(tensors)]


def of_scores(scored: Iterable[tuple[str, Any]], *, held_at_once: int | None = None, **budget: Any) -> dict[str, Any]:
    """The indices selected of raw scores."""
    found = Selector(Scores(scored), GIVEN, Budget(**budget), held_at_once=held_at_once).indices()
    return {name: index.tolist() for name, index in found.items()}


def dense_top_k(
    scored: Iterable[tuple[str, torch.Tensor]], k: int, differs: Tensors | None = None
) -> dict[str, list[int]]:
    """The k best of everything that differs, sorted by falling score, then name, then flat index."""
    entries = [
        (-float(s), name, i)
        for name, scores in scored
        for i, s in enumerate(scores.flatten())
        if differs is None or differs[name].flatten()[i]
    ]
    found: dict[str, list[int]] = {}
    for _, name, i in sorted(entries)[:k]:
        found.setdefault(name, []).append(i)
    return {name: sorted(found[name]) for name in sorted(found)}


def dense(
    scored: list[tuple[str, torch.Tensor]], budget: Budget, differs: Tensors | None = None
) -> dict[str, list[int]]:
    """The entries that a budget takes, by sorting everything at once; none if not one unit fits."""
    sizes = {name: scores.numel() for name, scores in scored}
    count = budget.resolve(sizes)
    if isinstance(count, dict):
        found = [dense_top_k([(name, scores)], count[name], differs) for name, scores in sorted(scored)]
        return {name: indices for each in found for name, indices in each.items()}
    if budget.granularity == "entry":
        return dense_top_k(scored, count, differs)
    units: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, scores in scored:
        if scores.numel():
            units.setdefault(unit_of(name, budget.granularity), []).append((name, scores.flatten().double()))
    means = {unit: float(torch.cat([part for _, part in parts]).mean()) for unit, parts in units.items()}
    if differs is not None:
        units = {unit: parts for unit, parts in units.items() if any(differs[name].any() for name, _ in parts)}
    taken: dict[str, list[int]] = {}
    for unit in sorted(units, key=lambda unit: (-means[unit], unit)):
        size = sum(part.numel() for _, part in units[unit])
        if size <= count:
            count -= size
            taken |= {name: list(range(part.numel())) for name, part in units[unit]}
    return dict(sorted(taken.items()))


# Raw scores


@settings(max_examples=300)
@given(tensors=MODELS, held_at_once=st.sampled_from([1, 4, 100]), data=st.data())
def test_the_top_k_is_that_of_a_dense_sort(tensors: list[list[float]], held_at_once: int, data: st.DataObject) -> None:
    scored = named(tensors)
    k = data.draw(st.integers(1, sum(map(len, tensors))))
    assert of_scores(scored, num_params=k, held_at_once=held_at_once) == dense_top_k(scored, k)


@given(tensors=MODELS, density=st.floats(0.01, 1), held_at_once=st.sampled_from([1, 4, 100]))
def test_a_budget_per_tensor_takes_the_same_density_in_each(
    tensors: list[list[float]], density: float, held_at_once: int
) -> None:
    scored = named(tensors)
    budget = Budget(density, budget_scope="tensor")
    if not any(round(density * len(scores)) for scores in tensors):
        with pytest.raises(SelectionError, match="density must give at least one entry"):
            of_scores(scored, density=density, budget_scope="tensor")
        return
    found = of_scores(scored, density=density, budget_scope="tensor", held_at_once=held_at_once)
    assert found == dense(scored, budget)


def test_infinite_scores_are_ordinary_ones() -> None:
    scored = named([[float("-inf"), 0.0], [float("inf"), float("-inf")]])
    for held_at_once in (1, 3):
        assert of_scores(scored, num_params=3, held_at_once=held_at_once) == {"t0": [0, 1], "t1": [0]}


@pytest.mark.parametrize("held_at_once", [1, None])
@pytest.mark.parametrize("granularity", ["entry", "tensor"])
@pytest.mark.parametrize("num_params", [2, 3])
def test_a_nan_score_is_refused_by_name(held_at_once: int | None, granularity: str, num_params: int) -> None:
    scored = named([[1.0], [float("nan"), 1.0]])
    with pytest.raises(SelectionError, match="scores must not be NaN, got NaN in 't1'"):
        of_scores(scored, num_params=num_params, granularity=granularity, held_at_once=held_at_once)


def test_names_must_come_in_order() -> None:
    with pytest.raises(SelectionError, match="increasing order, got 'a' after 'b'"):
        of_scores([("b", torch.ones(1)), ("a", torch.ones(1))], num_params=1)


def test_whole_tensors_are_taken_by_falling_mean_while_they_fit() -> None:
    scored = named([[1.0, 1.0], [9.0, 0.0, 0.0], [2.0], [4.0, 4.0, 4.0, 4.0]])  # means 1, 3, 2, 4
    assert of_scores(scored, num_params=6, granularity="tensor") == {"t2": [0], "t3": [0, 1, 2, 3]}  # t1 does not fit


def test_a_layer_is_taken_as_a_whole() -> None:
    scored = [
        ("h.0.a", torch.tensor([5.0, 5.0])),
        ("h.0.b", torch.tensor([0.0])),
        ("h.1.a", torch.tensor([4.0])),
        ("h.1.b", torch.tensor([[4.0], [4.0]])),
        ("norm", torch.zeros(0)),
    ]
    assert of_scores(scored, num_params=3, granularity="layer") == {"h.1.a": [0], "h.1.b": [0, 1]}


def test_units_of_equal_mean_are_taken_by_name() -> None:
    assert of_scores(named([[1.0], [1.0], [1.0]]), num_params=2, granularity="tensor") == {"t0": [0], "t1": [0]}


def test_a_budget_below_every_unit_is_refused() -> None:
    with pytest.raises(SelectionError, match="at least one tensor, got 2 entries for units of 3 or more"):
        of_scores(named([[1.0] * 4, [1.0] * 3]), num_params=2, granularity="tensor")


def test_candidates_come_with_the_budget_they_are_for() -> None:
    source = Scores(named([[3.0, 1.0, 2.0, 0.0], [0.5, 0.1]]))
    selector = Selector(source, GIVEN, Budget(num_params=2), candidate_ratio=2)
    chosen = selector.indices()
    assert {name: index.tolist() for name, index in chosen.items()} == {"t0": [0, 1, 2], "t1": [0]}
    assert selector.budget_of(chosen) == 2
    selector = Selector(source, GIVEN, Budget(0.25, budget_scope="tensor"), candidate_ratio=2)
    chosen = selector.indices()
    assert {name: index.tolist() for name, index in chosen.items()} == {"t0": [0, 2], "t1": [0]}
    assert selector.budget_of(chosen) == {"t0": 1, "t1": 0}


# Memory and files


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(block_reader, "READ_ENTRIES", 16)
    monkeypatch.setattr(block_reader, "BLOCK_ENTRIES", 5)
    yield
    torch.set_num_threads(1)


def checkpoints(tmp_path: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensors, Tensors]:
    """For even seeds few different deltas, so that there are ties everywhere; for odd ones many."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"l.0.a": (4, 9), "l.0.b": (11,), "l.0.c": (), "l.1.a": (4, 9), "l.1.b": (3,), "l.1.c": (0, 3)}
    shapes |= {"norm": (2, 2), "z": (0,)}
    base = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    donor = {}
    for name, before in base.items():
        steps = torch.randint(-2, 3, before.shape, generator=generator) * 0.5
        if seed % 2:
            steps = torch.randn(before.shape, generator=generator) * 1e-2
        donor[name] = (before.float() + steps).to(dtype)
    for role, tensors in (("base", base), ("donor", donor)):
        names = sorted(tensors)
        for shard in range(2):
            save_file({name: tensors[name] for name in names[shard::2]}, tmp_path / f"{role}-{shard}.safetensors")
    return base, donor


def in_files(tmp_path: Path) -> PairedReader:
    sides = []
    for role in ("base", "donor"):
        shards = [CheckpointDonor(tmp_path / f"{role}-{shard}.safetensors", role=role) for shard in range(2)]
        sides.append({name: [shard.extent(name)] for shard in shards for name in shard.names()})
    return PairedReader(*sides)


def in_memory(base: Tensors, donor: Tensors) -> PairedTensors:
    sizes = {name: tensor.numel() for name, tensor in base.items()}
    return PairedTensors(base, Donor(donor), {name: name for name in base}, sizes)


@pytest.mark.usefixtures("_small_blocks")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 3),
    rule=st.sampled_from(DATA_FREE),
    density=st.sampled_from([0.05, 0.3, 0.7, 1.0]),
    scope_and_granularity=st.sampled_from(
        [("global", "entry"), ("tensor", "entry"), ("global", "tensor"), ("global", "layer")]
    ),
    held_at_once=st.sampled_from([1, 10, 1000]),
    threads=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_memory_files_and_a_dense_sort_give_the_same_mask(
    tmp_path: Path,
    seed: int,
    rule: str,
    density: float,
    scope_and_granularity: tuple[str, str],
    held_at_once: int,
    threads: int,
    dtype: torch.dtype,
) -> None:
    torch.set_num_threads(threads)
    base, donor = checkpoints(tmp_path, seed, dtype)
    budget = Budget(density, None, *scope_and_granularity)
    score = RULES[rule].score
    scored = [
        (name, score(Evidence(name, base[name], donor[name].float() - base[name].float(), seed=seed)))
        for name in sorted(base)
    ]
    expected = dense(scored, budget, {name: base[name] != donor[name] for name in base})
    for source in (in_memory(base, donor), in_files(tmp_path)):
        selector = Selector(source, RULES[rule], budget, seed=seed, held_at_once=held_at_once)
        if not expected:
            with pytest.raises(SelectionError, match="granularity"):
                selector.indices()
            continue
        assert {name: index.tolist() for name, index in selector.indices().items()} == expected
        selected = list(selector.entries())
        assert {part.name: part.indices.tolist() for part in selected} == expected
        for part in selected:
            assert torch.equal(part.base, base[part.name].flatten()[part.indices])
            assert torch.equal(part.donor, donor[part.name].flatten()[part.indices])
            assert part.base.dtype == part.donor.dtype == dtype
        assert selector.differs
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("budget_scope", ["global", "tensor"])
@pytest.mark.parametrize("held_at_once", [3, 10, 1000])
def test_the_passes_over_the_files_are_those_that_were_said(
    tmp_path: Path, budget_scope: str, held_at_once: int
) -> None:
    checkpoints(tmp_path)
    reader, read = in_files(tmp_path), []
    reader.on_read = read.append
    budget = Budget(0.3, budget_scope=budget_scope)
    selector = Selector(reader, RULES["magnitude"], budget, held_at_once=held_at_once)
    list(selector.entries())
    assert 0 < sum(read) <= selector.passes * sum(reader.nbytes)


@pytest.mark.usefixtures("_small_blocks")
def test_a_budget_that_fits_takes_one_pass_and_a_larger_one_three(tmp_path: Path) -> None:
    checkpoints(tmp_path)
    for held_at_once, passes in ((30, 1), (29, 3)):
        reader, read = in_files(tmp_path), []
        reader.on_read = read.append
        selector = Selector(reader, RULES["magnitude"], Budget(num_params=30), held_at_once=held_at_once)
        assert sum(part.indices.numel() for part in selector.entries()) == 30
        assert sum(read) == passes * sum(reader.nbytes) == selector.passes * sum(reader.nbytes)


def test_only_selections_from_files_are_bounded_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "HELD_AT_ONCE", 29)
    base, donor = checkpoints(tmp_path)
    budget = Budget(num_params=30)
    assert Selector(in_files(tmp_path), RULES["magnitude"], budget).passes == 3
    assert Selector(in_memory(base, donor), RULES["magnitude"], budget).passes == 1


@pytest.mark.usefixtures("_small_blocks")
def test_a_measurement_is_broadcast_in_memory_and_missing_in_files(tmp_path: Path) -> None:
    base, donor = checkpoints(tmp_path, seed=1, dtype=torch.float32)
    norms = {name: torch.arange(1.0, 1 + tensor.shape[-1]) if tensor.ndim else None for name, tensor in base.items()}
    measured = {name: torch.ones(()) if norm is None else norm for name, norm in norms.items()}
    scored = [(name, (donor[name] - base[name]).abs() * measured[name]) for name in sorted(base)]
    selector = Selector(in_memory(base, donor), RULES["wanda"], Budget(num_params=20), measured=measured)
    assert {name: index.tolist() for name, index in selector.indices().items()} == dense_top_k(scored, 20)
    with pytest.raises(SelectionError, match="evidence must be measured on data"):
        Selector(in_files(tmp_path), RULES["wanda"], Budget(num_params=20)).indices()


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_without_a_rule_every_entry_whose_bits_differ_is_taken(tmp_path: Path, dtype: torch.dtype) -> None:
    base = {"x": torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=dtype), "y": torch.ones(6, dtype=dtype)}
    donor = {"x": torch.tensor([-0.0, 1.0, 2.5, 3.0], dtype=dtype), "y": torch.ones(6, dtype=dtype)}
    for name, tensors in (("base", base), ("donor", donor)):
        save_file(tensors, tmp_path / name)
    files = [CheckpointDonor(tmp_path / name) for name in ("base", "donor")]
    reader = PairedReader(*({name: [file.extent(name)] for name in file.names()} for file in files))
    for source in (reader, in_memory(base, donor)):
        (only,) = Selector(source, None).entries()
        assert (only.name, only.indices.tolist()) == ("x", [0, 2])  # also a zero that only changed its sign
        assert torch.signbit(only.donor[0])


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("rule", [*DATA_FREE, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_donor_that_is_not_finite_is_refused(tmp_path: Path, rule: str | None, bad: float) -> None:
    base, donor = checkpoints(tmp_path)
    donor["l.1.a"][2, 3] = bad
    names = sorted(donor)
    for shard in range(2):
        save_file({name: donor[name] for name in names[shard::2]}, tmp_path / f"donor-{shard}.safetensors")
    for source in (in_files(tmp_path), in_memory(base, donor)):
        budget = None if rule is None else Budget(0.1)
        selector = Selector(source, None if rule is None else RULES[rule], budget)
        with pytest.raises(DonorError, match=r"donor tensors must be finite, got 1 NaN or Inf .*'l\.1\.a'"):
            list(selector.entries())


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("held_at_once", [1, 1000])
def test_a_base_with_nan_is_refused_whatever_the_budget(tmp_path: Path, density: float, held_at_once: int) -> None:
    base, donor = checkpoints(tmp_path)
    base["l.1.a"][2, 3] = float("nan")
    names = sorted(base)
    for shard in range(2):
        save_file({name: base[name] for name in names[shard::2]}, tmp_path / f"base-{shard}.safetensors")
    for source in (in_files(tmp_path), in_memory(base, donor)):
        selector = Selector(source, RULES["magnitude"], Budget(density), held_at_once=held_at_once)
        with pytest.raises(SelectionError, match=r"scores must not be NaN, got NaN in 'l\.1\.a'"):
            list(selector.entries())


@pytest.mark.usefixtures("_small_blocks")
def test_equal_checkpoints_are_noticed(tmp_path: Path) -> None:
    base, _ = checkpoints(tmp_path)
    file = CheckpointDonor(tmp_path / "base-0.safetensors")
    extents = {name: [file.extent(name)] for name in file.names()}
    for source in (PairedReader(extents, extents), in_memory(base, base)):
        selector = Selector(source, RULES["random"], Budget(0.1))
        assert not selector.indices() and not selector.differs


# Budgets beyond what differs


def sparse(base: Tensors, differing: dict[str, list[int]]) -> Tensors:
    """A donor that differs at these entries, by 1."""
    donor = {name: tensor.clone() for name, tensor in base.items()}
    for name, indices in differing.items():
        donor[name].view(-1)[indices] += 1
    return donor


DIFFERING = {"a": [3], "c": [0, 2, 5]}
EQUAL = {name: torch.zeros(2, 3) for name in "abc"}


@pytest.mark.parametrize("rule", DATA_FREE)
@pytest.mark.parametrize("held_at_once", [1, 3, 100])
@pytest.mark.parametrize("budget", [Budget(1.0), Budget(0.5), Budget(num_params=4), Budget(0.5, budget_scope="tensor")])
def test_a_budget_beyond_what_differs_takes_what_differs(rule: str, held_at_once: int, budget: Budget) -> None:
    source = in_memory(EQUAL, sparse(EQUAL, DIFFERING))
    selector = Selector(source, RULES[rule], budget, held_at_once=held_at_once)
    assert {name: index.tolist() for name, index in selector.indices().items()} == DIFFERING
    assert selector.wanted >= 4


@pytest.mark.parametrize("rule", DATA_FREE)
def test_a_smaller_budget_takes_none_that_is_equal(rule: str) -> None:
    selector = Selector(in_memory(EQUAL, sparse(EQUAL, DIFFERING)), RULES[rule], Budget(num_params=3), held_at_once=1)
    chosen = {(name, index) for name, found in selector.indices().items() for index in found.tolist()}
    assert len(chosen) == 3 and chosen < {(name, index) for name, found in DIFFERING.items() for index in found}


def test_a_flipped_sign_of_zero_counts_as_a_difference() -> None:
    donor = {name: tensor.clone() for name, tensor in EQUAL.items()}
    donor["b"][1, 1], donor["c"][0, 0] = -0.0, 1.0
    found = Selector(in_memory(EQUAL, donor), RULES["magnitude"], Budget(0.5)).indices()
    assert {name: index.tolist() for name, index in found.items()} == {"b": [4], "c": [0]}


@pytest.mark.parametrize("granularity", ["tensor", "layer"])
def test_whole_units_in_which_nothing_differs_are_left_out(granularity: str) -> None:
    base = {f"h.{number}.w": torch.zeros(4) for number in range(3)}
    donor = sparse(base, {"h.1.w": [2]})
    found = Selector(in_memory(base, donor), RULES["magnitude"], Budget(1.0, granularity=granularity)).indices()
    assert {name: index.tolist() for name, index in found.items()} == {"h.1.w": [0, 1, 2, 3]}


def test_a_learned_mask_chooses_among_what_differs() -> None:
    source = in_memory(EQUAL, sparse(EQUAL, DIFFERING))
    selector = Selector(source, RULES["learned"], Budget(num_params=2), candidate_ratio=5)
    chosen = selector.indices()
    assert {name: index.tolist() for name, index in chosen.items()} == DIFFERING and selector.budget_of(chosen) == 2
    selector = Selector(source, RULES["learned"], Budget(num_params=6), candidate_ratio=2)
    assert selector.budget_of(selector.indices()) == 4
