"""Patches in vLLM's forms, and the calls of an engine that apply them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_stand_in
from models import perturbed, tiny_llama
from peft_graft import PatchError
from peft_graft.vllm import checkpoint_weight_patches, graft, plan, read_patch, sparse_weight_patches, ungraft
from peft_graft.workflows.checkpoint_patch import CheckpointEdit, CheckpointPatch
from peft_graft.workflows.extract import extract


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.slow)], autouse=True)
def vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_stand_in.forget(monkeypatch)
    {"stand-in": vllm_stand_in.install_stand_in, "real": vllm_stand_in.install_real}[request.param](monkeypatch)


PATCH = CheckpointPatch(
    {
        "a": CheckpointEdit((2, 3), torch.tensor([7.0, 8.0]), torch.tensor([1.0, 2.0]), torch.tensor([0, 4])),
        "head": CheckpointEdit((2,), torch.tensor([3.0, 4.0]), torch.tensor([0.0, -0.0])),
    },
    "base",
)


def test_every_tensor_is_given_with_its_indices() -> None:
    one, head = checkpoint_weight_patches(PATCH)
    assert (one.name, one.shape, one.dtype) == ("a", (2, 3), torch.float32)
    assert one.indices.tolist() == [0, 4] and one.values.tolist() == [7, 8]
    assert head.indices.tolist() == [0, 1] and head.values.tolist() == [3, 4]


def test_sparse_patches_have_narrow_indices_and_revert_as_well() -> None:
    one, head = sparse_weight_patches(PATCH)
    assert (one.name, one.full_shape) == ("a", (2, 3)) and one.values.tolist() == [7, 8]
    assert one.indices.dtype == head.indices.dtype == torch.int32 and head.indices.tolist() == [0, 1]
    back, _ = sparse_weight_patches(plan([PATCH]))
    assert back.indices.tolist() == [0, 4] and back.values.tolist() == [1, 2]


def test_indices_that_do_not_fit_are_refused() -> None:
    far = CheckpointEdit((2**31 + 1,), torch.ones(1), torch.zeros(1), torch.tensor([2**31]))
    with pytest.raises(PatchError, match=r"below 2\^31 .* got 2147483648 in 'x'"):
        sparse_weight_patches(CheckpointPatch({"x": far}, "base"))


class Engine:
    """An engine that notes its calls."""

    def __init__(self, busy: bool = False) -> None:
        self.busy = busy
        self.calls: list[Any] = []

    def start_weight_update(self) -> None:
        self.calls.append("start")

    def update_weights(self, request: dict[str, Any]) -> None:
        self.calls.append(request)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append(weight_version)

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return not self.busy


def test_an_engine_is_told_the_skill_and_forgets_what_it_cached() -> None:
    engine = Engine()
    graft(engine, Path("skills/one"), revision="v1")
    ungraft(engine)
    assert engine.calls == [
        "start",
        {"update_info": {"adapter": "skills/one", "revision": "v1"}},
        "skills/one",
        "reset",
        "start",
        {"update_info": {"adapter": None}},
        "base",
        "reset",
    ]


def test_a_request_that_runs_on_is_told() -> None:
    with pytest.raises(RuntimeError, match="blocks in use after the change to 'one'"):
        graft(Engine(busy=True), "one")


def test_an_adapter_is_read_on_the_base_that_it_names(tmp_path: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    perturbed(base).save_pretrained(tmp_path / "donor")
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", density=0.1)
    patch = read_patch(tmp_path / "skill")
    for name, edit in patch.edits.items():
        assert edit.indices is not None and edit.base_values is not None
        assert torch.equal(edit.base_values, base.get_parameter(name).flatten()[edit.indices])
