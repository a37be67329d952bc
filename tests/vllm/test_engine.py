"""The engine writes a skill into a model that packs and shards its weights, and takes it out again bit for bit."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import vllm_stand_in
from grafts import assert_same, parameters
from models import perturbed
from packed_llama import PackedLlama, engine_config
from peft_graft import PatchError
from peft_graft.checkpoints.pairing import DonorError
from peft_graft.vllm.routes import Route
from peft_graft.workflows.export import export
from peft_graft.workflows.extract import extract

SKILLS = {"one": 0.05, "two": 0.3, "all": 1.0}


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.slow)])
def vllm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """vLLM's modules, and the engine registered with them."""
    with monkeypatch.context() as patch:
        vllm_stand_in.forget(patch)
        {"stand-in": vllm_stand_in.install_stand_in, "real": vllm_stand_in.install_real}[request.param](patch)
        import _peft_graft_vllm

        _peft_graft_vllm.register()
        _peft_graft_vllm.register()  # vLLM allows itself to
        yield request.param
        vllm_stand_in.forget(patch)


def llama(tied: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).bfloat16()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and for each skill an adapter, its export and the merged checkpoint; `one` has a whole head."""
    root = tmp_path_factory.mktemp("skills")
    base = llama()
    base.save_pretrained(root / "base", max_shard_size="8KB")
    for number, (name, density) in enumerate(SKILLS.items()):
        donor = perturbed(base, seed=number)
        donor.save_pretrained(root / f"{name}-donor")
        options: dict[str, Any] = {"modules_to_save": ["lm_head"]} if name == "one" else {}
        extract(root / "base", root / f"{name}-donor", root / name, density=density, seed=number, **options)
        export(root / name, "checkpoint", root / f"{name}-merged")
        export(root / name, "vllm", root / f"{name}-patch")
    return root


def loaded(directory: Path, **options: Any) -> PackedLlama:
    """What an engine that starts with a checkpoint holds."""
    model = PackedLlama(engine_config(directory), **options)
    for file in sorted(directory.glob("*.safetensors")):
        model.load_weights(load_file(file).items())
    return model


class Engine:
    """An engine of one worker, started with a base."""

    def __init__(self, base: Path, quantization: str | None = None, **options: Any) -> None:
        self.model = loaded(base, **options)
        config = SimpleNamespace(model=str(base), revision=None, trust_remote_code=False, quantization=quantization)
        vllm_config = SimpleNamespace(model_config=config, parallel_config=None)
        factory = sys.modules[vllm_stand_in.FACTORY].WeightTransferEngineFactory
        self.worker = factory.create_engine(
            SimpleNamespace(backend="peft_graft"), vllm_config, torch.device("cpu"), self.model
        )

    def update(self, adapter: Path | str | None, **options: Any) -> None:
        self.worker.start_weight_update()
        self.worker.update_weights({"adapter": adapter if adapter is None else os.fspath(adapter), **options})
        self.worker.finish_weight_update()

    def weights(self) -> dict[str, torch.Tensor]:
        return parameters(self.model)


@pytest.fixture
def start(vllm: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    # vLLM waits for the accelerator after every update; there is none here.
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: None)
    return Engine


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("form", ["", "-patch"])
def test_skills_are_switched_and_reverted_bit_for_bit(
    start: Callable[..., Engine], saved: Path, form: str, rank: int, size: int
) -> None:
    options = {"rank": rank, "size": size}
    engine = start(saved / "base", **options)
    before = engine.weights()
    for name in ["one", "two", "one", "all", "two", "two"]:
        engine.update(saved / f"{name}{form}")
        assert_same(engine.weights(), parameters(loaded(saved / f"{name}-merged", **options)))
    engine.update(None)
    assert_same(engine.weights(), before)
    engine.update(None)
    assert_same(engine.weights(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_an_engine_in_another_dtype_than_its_files_is_reverted_too(
    start: Callable[..., Engine], saved: Path, dtype: torch.dtype
) -> None:
    engine = start(saved / "base", dtype=dtype)
    before = engine.weights()
    engine.update(saved / "two")
    assert_same(engine.weights(), parameters(loaded(saved / "two-merged", dtype=dtype)))
    engine.update(None)
    assert_same(engine.weights(), before)


def test_a_failed_update_is_undone_by_the_next(
    start: Callable[..., Engine], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(saved / "base")
    before = engine.weights()
    engine.update(saved / "one")
    write, calls = Route.write, []

    def break_off(route: Route, edit: Any) -> None:
        calls.append(route)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        write(route, edit)

    with monkeypatch.context() as patch:
        patch.setattr(Route, "write", break_off)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.update(saved / "two")
    engine.update(None)
    assert_same(engine.weights(), before)


class Computing(PackedLlama):
    """A model whose loader computes what it writes into the norms."""

    def load_weights(self, weights: Any) -> set[str]:
        return super().load_weights((name, tensor * 1 if "norm" in name else tensor) for name, tensor in weights)


@pytest.mark.parametrize("kind", [PackedLlama, Computing])
def test_vllms_loader_is_used_where_entries_cannot_be_followed(
    kind: type[PackedLlama], start: Callable[..., Engine], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(saved / "base")
    engine.model.__class__ = kind
    module, calls = sys.modules["peft_graft.vllm.engine"], []
    load = module.load_checkpoint_weight_patches

    def note(model: Any, patches: Any, **options: Any) -> Any:
        calls.extend(patch.name for patch in patches)
        return load(model, patches, **options)

    monkeypatch.setattr(module, "load_checkpoint_weight_patches", note)
    before = engine.weights()
    engine.update(saved / "all")
    assert_same(engine.weights(), parameters(loaded(saved / "all-merged")))
    engine.update(None)
    assert_same(engine.weights(), before)
    assert bool(calls) == (kind is Computing) and all("norm" in name for name in calls)


def test_parameters_that_were_replaced_are_found_again(start: Callable[..., Engine], saved: Path) -> None:
    engine = start(saved / "base")
    before = engine.weights()
    engine.update(saved / "two")
    engine.update(None)
    for parameter in engine.model.parameters():
        parameter.data = parameter.data.clone()
    engine.update(saved / "two")
    assert_same(engine.weights(), parameters(loaded(saved / "two-merged")))
    engine.update(None)
    assert_same(engine.weights(), before)


@pytest.mark.parametrize("form", ["", "-patch"])
def test_a_skill_of_another_base_is_refused(
    start: Callable[..., Engine], saved: Path, form: str, tmp_path: Path
) -> None:
    perturbed(LlamaForCausalLM.from_pretrained(saved / "base"), seed=9).save_pretrained(tmp_path / "other")
    engine = start(tmp_path / "other")
    before = engine.weights()
    with pytest.raises(PatchError, match="base must be the model that this patch was made for"):
        engine.update(saved / f"two{form}")
    assert_same(engine.weights(), before)


@pytest.mark.parametrize("form", ["", "-patch"])
def test_a_head_that_the_bases_files_lack_is_refused(start: Callable[..., Engine], form: str, tmp_path: Path) -> None:
    """A tied head has no tensor of its own: vLLM would pass over it in silence."""
    base = llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    donor = perturbed(base)
    donor.config.tie_word_embeddings = False
    donor.save_pretrained(tmp_path / "donor")
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", density=0.1, modules_to_save=["lm_head"])
    done = export(tmp_path / "skill", "vllm", tmp_path / "skill-patch")
    assert "the base has no lm_head.weight" in done.notes[-1]
    engine = start(tmp_path / "base")
    with pytest.raises(PatchError, match=r"every tensor of the patch must stand in the base's files.*lm_head\.weight"):
        engine.update(tmp_path / f"skill{form}")


def test_a_quantized_engine_is_refused(start: Callable[..., Engine], saved: Path) -> None:
    with pytest.raises(ValueError, match="not quantized, got quantization='fp8'"):
        start(saved / "base", quantization="fp8").update(saved / "two")


def test_what_is_no_skill_is_refused(start: Callable[..., Engine], saved: Path, tmp_path: Path) -> None:
    engine = start(saved / "base")
    before = engine.weights()
    with pytest.raises(FileNotFoundError, match="adapter must be an existing directory or a Hub id"):
        engine.update(tmp_path / "missing")
    with pytest.raises(PatchError, match="adapter must be a finished graft"):
        engine.update(saved / "base")
    with pytest.raises(ValueError, match="(?i)invalid update_info"):
        engine.update(saved / "two", colour="blue")
    shutil.copytree(saved / "two-patch", tmp_path / "patch")
    engine.worker.model_config.model = str(tmp_path)
    with pytest.raises(DonorError):
        engine.update(tmp_path / "patch")
    assert_same(engine.weights(), before)


def test_a_skill_is_read_once_until_its_files_change(
    start: Callable[..., Engine], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(saved / "base")
    module = sys.modules["peft_graft.vllm.engine"]
    read, calls = module.read_patch, []

    def count(adapter: str, *args: Any, **options: Any) -> Any:
        calls.append(Path(adapter).name)
        return read(adapter, *args, **options)

    monkeypatch.setattr(module, "read_patch", count)
    monkeypatch.setattr(module, "MAX_CACHED", 2)
    shutil.copytree(saved / "one-patch", tmp_path / "mine")
    for skill in [tmp_path / "mine", saved / "two", tmp_path / "mine", saved / "two"]:
        engine.update(skill)
    assert calls == ["mine", "two"]
    shutil.copy(saved / "two-patch" / "checkpoint_patch.safetensors", tmp_path / "mine")
    engine.update(tmp_path / "mine")
    assert calls == ["mine", "two", "mine"]
    assert_same(engine.weights(), parameters(loaded(saved / "two-merged")))
    engine.update(saved / "all")
    engine.update(saved / "two")
    assert calls == ["mine", "two", "mine", "all", "two"]
    engine.worker.shutdown()
    engine.update(saved / "two")
    assert calls[5:] == ["two"]
