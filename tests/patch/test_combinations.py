"""The registry of combinations: what it refuses, and a combination of a user's own from `stitch` to a saved adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from grafts import MLP, graft
from models import perturbed
from peft_graft import GraftConfig
from peft_graft.patch.combinations import COMBINATIONS, register_combination
from peft_graft.patch.combine import stitch
from peft_graft.patch.patch import Patch, TensorPatch

BASE = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0])}


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Forget what a test registers."""
    before = dict(COMBINATIONS)
    yield
    COMBINATIONS.clear()
    COMBINATIONS.update(before)


def patch_of(*entries: tuple[int, float]) -> Patch:
    indices, values = zip(*entries, strict=True)
    return Patch({"w": TensorPatch(torch.tensor(indices), torch.tensor(values))}, {"w": (4,)})


def agreeing(deltas: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """Votes where no two deltas have opposite signs."""
    return taken & ~((deltas > 0).any(0) & (deltas < 0).any(0))


def test_every_row_says_what_it_is() -> None:
    assert list(COMBINATIONS) == ["linear", "mean", "disjoint", "ties"]
    for name, row in COMBINATIONS.items():
        assert row.name == name and row.reduce in ("sum", "mean") and "\n" not in row.summary


@pytest.mark.parametrize(("reduce", "value"), [("sum", 1 + 1 + 2), ("mean", 1 + 1.5)])
def test_a_combination_of_ones_own(reduce: Any, value: float) -> None:
    assert register_combination("agreeing", "base + the deltas of one sign", reduce=reduce)(agreeing) is agreeing
    patches = [patch_of((0, 2.0), (1, 2.0), (2, 5.0)), patch_of((0, 3.0), (1, 0.0))]
    found = stitch(patches, combination_type="agreeing", base=BASE).tensors["w"]
    assert (found.indices.tolist(), found.values.tolist()) == ([0, 2], [value, 5.0])


def test_deltas_are_weighted_and_0_where_nothing_is_taken() -> None:
    seen = []

    @register_combination("watched", "what union does")
    def watch(deltas: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        seen.append((deltas.tolist(), taken.tolist()))
        return taken

    stitch([patch_of((0, 2.0)), patch_of((3, 5.0))], [1.0, 0.5], "watched", base=BASE)
    assert seen == [([[1.0, 0.0], [0.0, 2.0]], [[True, False], [False, True]])]


def test_a_model_takes_it_and_the_adapter_says_so(tmp_path: Path) -> None:
    register_combination("agreeing", "base + the deltas of one sign")(agreeing)
    base = MLP()
    model = graft(base, perturbed(base, seed=1), adapter_name="x", density=0.5)
    model.add_adapter("y", GraftConfig(donor=perturbed(base, seed=2), density=0.5))
    patches = [model.base_model.patch(name) for name in "xy"]
    model.base_model.add_weighted_adapter(["x", "y"], [1.0, 0.5], "new", combination_type="agreeing")
    tensors = {name: value.detach() for name, value in base.named_parameters()}
    wanted, found = stitch(patches, [1.0, 0.5], "agreeing", base=tensors), model.base_model.patch("new")
    assert 0 < found.num_params < sum(patch.num_params for patch in patches)
    for name, part in wanted.tensors.items():
        assert torch.equal(part.indices, found.tensors[name].indices)
        assert torch.equal(part.values, found.tensors[name].values)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["record"]["provenance"]["combination_type"] == "agreeing"
    assert "combined (`agreeing`)" in (tmp_path / "new" / "README.md").read_text()


def test_all_that_is_wrong_with_a_row_is_said_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        register_combination("ties", " ", reduce="median")  # type: ignore[arg-type]
    for words in (
        "name must be new, got 'ties'. Registered are ['disjoint', 'linear', 'mean', 'ties']",
        "summary must say in one line what an entry becomes, got ' '",
        "reduce must be one of ['sum', 'mean'], got 'median'",
    ):
        assert words in str(caught.value)
    for name in ("", "My Own", "-x", None):
        with pytest.raises(ValueError, match="name must be lower-case letters, digits and underscores"):
            register_combination(name, "a row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="summary must say in one line"):
        register_combination("own", "two\nlines")
    with pytest.raises(TypeError, match="votes of combination_type 'own' must be a function, got 3"):
        register_combination("own", "a row")(3)  # type: ignore[arg-type]
    assert list(COMBINATIONS) == ["linear", "mean", "disjoint", "ties"]


@pytest.mark.parametrize(
    ("votes", "message"),
    [
        (lambda deltas, taken: deltas, r"a bool tensor of shape \(2, 2\), got torch.float64 of shape \(2, 2\)"),
        (lambda deltas, taken: taken[0], r"a bool tensor of shape \(2, 2\), got torch.bool of shape \(2,\)"),
        (lambda deltas, taken: None, "a bool tensor .*, got None"),
        (lambda deltas, taken: torch.ones_like(taken), "must come from patches that take the entry, got 2 others"),
    ],
)
def test_votes_are_checked(votes: Any, message: str) -> None:
    register_combination("own", "a row")(votes)
    with pytest.raises(ValueError, match=f"votes of combination_type 'own' must (be )?{message.removeprefix('must ')}"):
        stitch([patch_of((0, 2.0)), patch_of((3, 5.0))], combination_type="own", base=BASE)
