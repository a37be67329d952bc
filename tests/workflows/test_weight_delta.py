"""A weight delta turns the base's files into the merged ones, byte for byte, and shows when it did not."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import models
from grafts import assert_same
from models import perturbed
from peft_graft import PatchError
from peft_graft.workflows.export import export
from peft_graft.workflows.extract import extract

VERSION = "weight_v000001"
READER = "PEFT_GRAFT_SGLANG_READER"


def pull(local: Path, base: Path, source: Path) -> None:
    """Make `local` the base's files with the delta applied, as the readers of this form do."""
    import zstandard

    shutil.copytree(base, local)
    index = json.loads((source / VERSION / "model.safetensors.index.json").read_text())
    about = index["metadata"]
    assert (about["version"], about["base_version"]) == ("000001", "000000")
    assert (about["delta_encoding"], about["compression_format"], about["checksum_format"]) == (
        "xor",
        "zstd",
        "adler32",
    )
    places: dict[str, tuple[Path, int, int]] = {}
    for path in local.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                places[name] = (path, 8 + length + first, last - first)
    for shard in {*index["weight_map"].values()}:
        with safe_open(source / VERSION / shard, framework="pt") as file:
            checksums = file.metadata() or {}
            assert {*file.keys()} == {name for name, where in index["weight_map"].items() if where == shard}
            for name in file.keys():  # noqa: SIM118, it is no dict
                path, start, count = places[name]
                stream = file.get_tensor(name).numpy().tobytes()
                changed = zstandard.ZstdDecompressor().decompress(stream, max_output_size=count)
                assert len(changed) == count
                content = bytearray(path.read_bytes())
                after = bytes(a ^ b for a, b in zip(content[start : start + count], changed, strict=True))
                if f"{zlib.adler32(after):08x}" != checksums[name]:
                    raise RuntimeError(f"checksum mismatch in {name}")
                content[start : start + count] = after
                path.write_bytes(content)


def real_pull(local: Path, base: Path, source: Path) -> None:
    """Call SGLang's own reader."""
    path = os.environ.get(READER)
    if not path:
        pytest.skip(f"{READER} names no copy of SGLang's srt/weight_sync/local_checkpoint.py")
    spec = importlib.util.spec_from_file_location("local_checkpoint", path)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.pull(str(local), str(base), str(source), 1)


@pytest.fixture(params=[pull, pytest.param(real_pull, marks=pytest.mark.slow)], ids=["reference", "sglang"])
def read(request: pytest.FixtureRequest) -> Callable[[Path, Path, Path], None]:
    return request.param  # type: ignore[no-any-return]


def make(tmp_path: Path, family: str = "tiny_llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
    model = getattr(models, family)(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    perturbed(model).save_pretrained(tmp_path / "donor")
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", **{"density": 0.05, **options})


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mixtral", "tiny_bert"])
def test_a_delta_gives_the_merged_checkpoint(
    read: Callable[[Path, Path, Path], None], family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Heads that are stored whole are in it (BERT), and experts one by one (Mixtral)."""
    make(tmp_path, family, dtype, alpha=0.9)
    done = export(tmp_path / "skill", "weight_delta", tmp_path / "versions")
    assert done.carried == done.entries > 0
    assert [path.name for path in (tmp_path / "versions").iterdir()] == [VERSION]
    read(tmp_path / "local", tmp_path / "base", tmp_path / "versions")
    export(tmp_path / "skill", "checkpoint", tmp_path / "merged")
    assert_same(tensors_of(tmp_path / "local"), tensors_of(tmp_path / "merged"))


def test_a_delta_on_other_files_is_seen(read: Callable[[Path, Path, Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    export(tmp_path / "skill", "weight_delta", tmp_path / "versions")
    with pytest.raises(RuntimeError, match="checksum mismatch"):
        read(tmp_path / "local", tmp_path / "donor", tmp_path / "versions")


def test_tensors_that_do_not_change_are_left_out(tmp_path: Path) -> None:
    make(tmp_path, target_modules=["q_proj"])
    export(tmp_path / "skill", "weight_delta", tmp_path / "versions")
    (shard,) = (tmp_path / "versions" / VERSION).glob("*.safetensors")
    streams = load_file(shard)
    assert streams and all(".q_proj." in name and stream.dtype == torch.uint8 for name, stream in streams.items())
    index = json.loads((tmp_path / "versions" / VERSION / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == streams.keys()


def test_a_head_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    paths = [tmp_path / name for name in ("base", "donor", "skill")]
    extract(*paths, density=0.1, overwrite=True, modules_to_save=["lm_head"])
    state = {name: tensor.clone() for name, tensor in base.state_dict().items() if name != "lm_head.weight"}
    shutil.rmtree(tmp_path / "base")
    base.config.save_pretrained(tmp_path / "base")
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(PatchError, match=r"must stand in the base's files for a delta.*'lm_head\.weight'"):
        export(tmp_path / "skill", "weight_delta", tmp_path / "versions")
    assert not (tmp_path / "versions").exists()


def test_zstandard_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"pip install peft-graft\[serve\]"):
        export(tmp_path / "skill", "weight_delta", tmp_path / "versions")
    assert not (tmp_path / "versions").exists()
