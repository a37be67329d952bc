"""Compressing a saved adapter gives what the code gives when the adapter is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from grafts import output, same_bits
from models import inputs, perturbed, tiny_bert
from old_patches import load_apart
from peft_graft import PatchError, compress, extract
from peft_graft.patch.value_codes import VALUE_CODES

FILES = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A directory with `base`, `donor`, and `skill`, a graft with a head and a card that somebody edited."""
    base = tiny_bert(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    perturbed(base).save_pretrained(tmp_path / "donor")
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", density=0.1, alpha=3.0)
    with (tmp_path / "skill" / "README.md").open("a") as card:
        card.write("\nA line of mine.\n")
    return tmp_path


@pytest.mark.parametrize("code", sorted(VALUE_CODES))
def test_the_result_is_that_of_extracting_with_the_code(code: str, pair: Path) -> None:
    done = compress(pair / "skill", pair / "small", values=code)
    extract(pair / "base", pair / "donor", pair / "wanted", density=0.1, alpha=3.0, values=code)
    configs = [json.loads((pair / name / FILES[0]).read_text()) for name in ("small", "wanted")]
    assert configs[0] == configs[1]
    tensors = [load_file(pair / name / FILES[1]) for name in ("small", "wanted")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(same_bits(tensor, tensors[1][key]) for key, tensor in tensors[0].items())
    assert "A line of mine." in (pair / "small" / "README.md").read_text()
    assert done.nbytes == (pair / "small" / FILES[1]).stat().st_size < done.nbytes_before
    assert done.nbytes_before == (pair / "skill" / FILES[1]).stat().st_size
    assert done.entries == configs[0]["record"]["entries"]
    assert done.values_error == configs[0]["record"]["provenance"]["values_error"] > 0
    base = tiny_bert(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, pair / "small")
    assert loaded.peft_config["default"].values == code and output(loaded, inputs(base)).isfinite().all()


def test_an_older_file_is_packed_without_its_base(pair: Path) -> None:
    new = (pair / "skill" / FILES[1]).read_bytes()
    save_file(load_apart(pair / "skill" / FILES[1]), pair / "skill" / FILES[1], {"format": "pt"})
    (pair / "base").rename(pair / "elsewhere")
    done = compress(pair / "skill", pair / "small", values="donor")
    assert (pair / "small" / FILES[1]).read_bytes() == new and done.values_error == 0
    assert done.nbytes == len(new) < done.nbytes_before


def test_in_its_own_place_with_overwrite(pair: Path) -> None:
    with pytest.raises(FileExistsError):
        compress(pair / "skill", pair / "skill", overwrite=True)


def test_another_base_and_what_is_no_graft_are_refused(pair: Path) -> None:
    with pytest.raises(ValueError, match=r"values must be one of \['donor', 'sign', 'int4', 'int8'\], got 'bits'"):
        compress(pair / "skill", pair / "small", values="bits")
    with pytest.raises(PatchError, match="base must be the model that this patch was made for"):
        compress(pair / "skill", pair / "small", base=pair / "donor")
    with pytest.raises(PatchError, match="adapter must be a finished graft"):
        compress(pair / "base", pair / "small")
    assert not (pair / "small").exists()
