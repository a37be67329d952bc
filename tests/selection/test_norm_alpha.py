"""The scale estimated from norms alone: the law, the same number in memory and from files, and where it is refused."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

import models
from grafts import graft
from models import perturbed
from peft_graft import GraftConfig, extract
from peft_graft.selection import select
from peft_graft.selection.norm_alpha import EXPONENT, norm_alpha


@pytest.mark.parametrize(
    ("ratio", "fitted"),
    [
        (2.26, (1.8, 2.05)),
        (11.8, (6.5, 9)),
        (78, (30, 43)),
        (578, (55, 165)),
        (1.35, (1.2, 1.79)),
        (2.02, (1.58, 2.05)),
    ],
)
def test_the_law_gives_about_the_scales_that_were_fitted(ratio: float, fitted: tuple[float, float]) -> None:
    """Ratios and fitted scales of AdamW and SGD donors of a sentence task at densities from 1e-1 to 1e-4."""
    assert fitted[0] <= norm_alpha(ratio, 1.0) <= fitted[1]


def test_a_patch_of_everything_has_the_scale_one() -> None:
    assert norm_alpha(3.0, 3.0) == 1.0
    model = graft(models.tiny_llama(), perturbed(models.tiny_llama()), density=1.0, alpha="norm")
    assert model.peft_config["default"].alpha == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("passes", ["one pass", "three passes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_same_in_memory_and_from_files(
    dtype: torch.dtype, passes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if passes == "three passes":
        monkeypatch.setattr(select, "HELD_AT_ONCE", 10)
    base = models.tiny_llama(dtype)
    donor = perturbed(base)
    base.save_pretrained(tmp_path / "base")
    donor.save_pretrained(tmp_path / "donor")
    with caplog.at_level(logging.WARNING, "peft_graft"):
        extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", density=0.01, alpha="norm")
    found = GraftConfig.from_pretrained(tmp_path / "out").alpha
    assert f"alpha={found:.3g}, estimated from the norms of the delta" in caplog.text
    config = GraftConfig(donor=donor, density=0.01, alpha="norm")
    model = get_peft_model(copy.deepcopy(base), config)
    assert model.peft_config["default"].alpha == pytest.approx(found, rel=1e-5)
    # ||delta||^2 over what may be grafted, and over what is
    targets = model.base_model.targets("default")
    before, after = base.state_dict(), donor.state_dict()
    deltas = {name: (after[name].float() - before[name].float()).double() for name in targets}
    patch = model.base_model.patch("default").tensors
    taken = sum(float(deltas[name].flatten()[part.indices].square().sum()) for name, part in patch.items())
    energy = sum(float(delta.square().sum()) for delta in deltas.values())
    assert found == pytest.approx((energy / taken) ** EXPONENT, rel=1e-5) and found > 5
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    assert loaded.peft_config["default"].alpha == found


@pytest.mark.parametrize("options", [{"selection": "random"}, {"selection": "learned"}, {"alpha_scope": "tensor"}])
def test_it_is_refused_where_it_does_not_hold(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"one scale of a magnitude mask, got 'norm' with"):
        GraftConfig(donor="path", density=0.1, alpha="norm", **options)
