"""A plan leaves exactly one patch, whatever was applied before: compared with a slow loop over entries."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_graft.vllm.switch import Switch, plan, positions
from peft_graft.workflows.checkpoint_patch import CheckpointEdit, CheckpointPatch

SIZES = {"a": 6, "b": 4}
BASE = {name: torch.arange(1.0, size + 1) for name, size in SIZES.items()}


@st.composite
def patches(draw: st.DrawFn) -> CheckpointPatch:
    edits = {}
    for name, size in SIZES.items():
        chosen = sorted(draw(st.sets(st.integers(0, size - 1))))
        whole = draw(st.booleans())
        count = size if whole else len(chosen)
        values = torch.tensor(draw(st.lists(st.integers(-9, -1), min_size=count, max_size=count)), dtype=torch.float32)
        if whole:
            edits[name] = CheckpointEdit((size,), values, BASE[name].clone())
        elif chosen:
            indices = torch.tensor(chosen)
            edits[name] = CheckpointEdit((size,), values, BASE[name][indices], indices)
    return CheckpointPatch(edits, "base")


def written(model: dict[str, torch.Tensor], patch: CheckpointPatch | None) -> dict[str, torch.Tensor]:
    """The slow way: entry by entry."""
    after = {name: tensor.clone() for name, tensor in model.items()}
    for name, edit in (patch.edits if patch else {}).items():
        for place, value in zip(positions(edit).tolist(), edit.values.tolist(), strict=True):
            after[name][place] = value
    return after


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), patches()), max_size=5))
def test_after_any_switches_the_model_is_the_base_with_the_last_patch(steps: list[CheckpointPatch | None]) -> None:
    model = {name: tensor.clone() for name, tensor in BASE.items()}

    def write(edits: dict[str, CheckpointEdit]) -> None:
        for name, edit in edits.items():
            edit.validate(name)
        model.update(written(model, CheckpointPatch(edits, "")))

    switch = Switch(write)
    for step in [*steps, None]:
        switch.to(step)
        assert switch.applied is step
        expected = written(BASE, step)
        assert all(torch.equal(model[name], expected[name]) for name in SIZES)


@settings(deadline=None)
@given(patches(), patches())
def test_a_switch_writes_the_entries_of_the_two_patches_only(one: CheckpointPatch, two: CheckpointPatch) -> None:
    for name, edit in plan([one], two).items():
        allowed = {
            place for patch in (one, two) if name in patch.edits for place in positions(patch.edits[name]).tolist()
        }
        assert {*positions(edit).tolist()} == allowed


def test_a_base_in_a_narrower_dtype_than_the_head_keeps_both_values_exactly() -> None:
    base = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    head = CheckpointEdit((2,), torch.tensor([1.0001, 3.0]), base)
    entry = CheckpointEdit((2,), torch.tensor([5.0], dtype=torch.bfloat16), base[1:], torch.tensor([1]))
    (edit,) = plan([CheckpointPatch({"h": head}, "")], CheckpointPatch({"h": entry}, "")).values()
    assert edit.indices is None and edit.values.tolist() == [1.0, 5.0]
    (edit,) = plan([CheckpointPatch({"h": entry}, "")], CheckpointPatch({"h": head}, "")).values()
    assert torch.equal(edit.values, head.values)
