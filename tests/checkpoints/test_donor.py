"""Donors from real files, the cache of the Hub and memory."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from models import tiny_llama
from peft_graft.checkpoints.donor import CheckpointDonor, Donor, DonorError, ModuleDonor, ZerosDonor, open_donor

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a.bias": torch.tensor([0.1, -0.2]),
    "b.weight": torch.arange(4, dtype=torch.float16).reshape(4, 1),
}


def write_shards(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    shards = {
        "model-00001-of-00002.safetensors": ["a.weight", "a.bias"],
        "model-00002-of-00002.safetensors": ["b.weight"],
    }
    for shard, names in shards.items():
        save_file({name: TENSORS[name] for name in names}, directory / shard)
    index = {"metadata": {}, "weight_map": {name: shard for shard, names in shards.items() for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_single(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(TENSORS, directory / "model.safetensors")
    return directory


def check_holds_tensors(donor: Donor) -> None:
    assert donor.names() == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        got = donor.get(name)
        assert donor.shape(name) == tuple(tensor.shape)
        assert got.dtype == tensor.dtype and torch.equal(got, tensor)


class TestCheckpointDonor:
    @pytest.mark.parametrize("write", [write_single, write_shards])
    def test_directory(self, tmp_path: Path, write) -> None:
        donor = CheckpointDonor(write(tmp_path / "donor"))
        check_holds_tensors(donor)
        assert donor.name == str(tmp_path / "donor") and donor.revision is None

    def test_single_file(self, tmp_path: Path) -> None:
        save_file(TENSORS, tmp_path / "any name.safetensors")
        check_holds_tensors(CheckpointDonor(str(tmp_path / "any name.safetensors")))

    def test_relative_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_single(tmp_path / "org" / "donor")
        monkeypatch.chdir(tmp_path)
        check_holds_tensors(CheckpointDonor("org/donor"))

    def test_reads_a_file_only_when_asked(self, tmp_path: Path) -> None:
        donor = CheckpointDonor(write_shards(tmp_path))
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        assert torch.equal(donor.get("a.bias"), TENSORS["a.bias"])
        assert donor.shape("b.weight") == (4, 1)
        with pytest.raises(DonorError, match="model-00002-of-00002.safetensors"):
            donor.get("b.weight")

    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"]
    )
    def test_refuses_pickles_in_a_directory(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"\x80")
        with pytest.raises(DonorError, match=rf"{name}.*safe_serialization=True"):
            CheckpointDonor(tmp_path)

    def test_prefers_safetensors_to_a_pickle_beside_it(self, tmp_path: Path) -> None:
        write_single(tmp_path)
        torch.save({"a.weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
        check_holds_tensors(CheckpointDonor(tmp_path))

    def test_refuses_a_pickle_by_path_without_reading_it(self, tmp_path: Path) -> None:
        (tmp_path / "model.pt").write_bytes(b"not even a pickle")
        with pytest.raises(DonorError, match=r"model\.pt.*safe_serialization=True"):
            CheckpointDonor(tmp_path / "model.pt")

    def test_missing_directory(self, tmp_path: Path) -> None:
        for source in (tmp_path / "nowhere", str(tmp_path / "nowhere"), "./nowhere"):
            with pytest.raises(DonorError, match="existing directory.*nowhere"):
                CheckpointDonor(source)

    def test_directory_without_weights(self, tmp_path: Path) -> None:
        with pytest.raises(DonorError, match="got 'nothing'|got nothing"):
            CheckpointDonor(tmp_path)
        (tmp_path / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(DonorError, match=r"must hold model\.safetensors.*adapter_model\.safetensors"):
            CheckpointDonor(tmp_path)

    def test_missing_shard(self, tmp_path: Path) -> None:
        write_shards(tmp_path)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(DonorError, match=r"no 'model-00002-of-00002\.safetensors'"):
            CheckpointDonor(tmp_path)

    def test_index_that_lies(self, tmp_path: Path) -> None:
        write_shards(tmp_path)
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("b.weight", "c.weight"))
        with pytest.raises(DonorError, match=r"model-00002-of-00002\.safetensors.*no 'c\.weight'"):
            CheckpointDonor(tmp_path)

    @pytest.mark.parametrize(
        "shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", "x.bin", ".."]
    )
    def test_index_that_points_elsewhere(self, tmp_path: Path, shard: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(DonorError, match="files beside it"):
            CheckpointDonor(tmp_path)

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\xff"])
    def test_malformed_index(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(DonorError, match=r"index\.json.*JSON index"):
            CheckpointDonor(tmp_path)

    def test_damaged_files(self, tmp_path: Path) -> None:
        whole = (write_single(tmp_path) / "model.safetensors").read_bytes()
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
        for damaged in (b"", whole[:4], whole[:40], whole[:-1], whole + b"\0", b"\xff" * 64, pointer):
            (tmp_path / "model.safetensors").write_bytes(damaged)
            with pytest.raises(DonorError, match=r"whole safetensors.*model\.safetensors"):
                CheckpointDonor(tmp_path)

    def test_tensor_of_a_dtype_that_torch_lacks(self, tmp_path: Path) -> None:
        header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
        with pytest.raises(DonorError, match=r"model\.safetensors"):
            CheckpointDonor(tmp_path).get("x")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of org/donor in a cache of the Hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    root = tmp_path / "hub" / "models--org--donor"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    (root / "snapshots" / COMMIT).mkdir(parents=True)
    return root / "snapshots" / COMMIT


class TestHubCache:
    """Hub ids, answered by a cache on disk while offline."""

    COMMIT = COMMIT

    @pytest.fixture
    def snapshot(self, hub_cache: Path) -> Path:
        return hub_cache

    @pytest.mark.parametrize("write", [write_single, write_shards])
    def test_cached(self, snapshot: Path, write) -> None:
        write(snapshot)
        donor = CheckpointDonor("org/donor")
        check_holds_tensors(donor)
        assert (donor.name, donor.revision) == ("org/donor", self.COMMIT)

    def test_revision(self, snapshot: Path) -> None:
        write_single(snapshot)
        other = "f" * 40
        write_single(snapshot.parent / other)
        save_file({"other": torch.ones(1)}, snapshot.parent / other / "model.safetensors")
        (snapshot.parent.parent / "refs" / "v2").write_text(other)
        assert CheckpointDonor("org/donor", revision="v2").names() == ["other"]
        assert CheckpointDonor("org/donor", revision=other).revision == other
        check_holds_tensors(open_donor("org/donor"))
        with pytest.raises(DonorError, match="reached or is cached"):
            CheckpointDonor("org/donor", revision="v3")

    def test_shards_come_from_the_commit_of_the_index(self, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from peft_graft.checkpoints import donor as donor_module

        write_shards(snapshot)
        asked = []
        fetch = donor_module.snapshot_download

        def spy(repo: str, revision: str, allow_patterns: list[str], **options) -> str:
            asked.append((revision, allow_patterns))
            return fetch(repo, revision=revision, allow_patterns=allow_patterns, **options)

        monkeypatch.setattr(donor_module, "snapshot_download", spy)
        CheckpointDonor("org/donor", revision="main")
        shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
        assert asked == [(self.COMMIT, shards)]  # those that the index names, and nothing else

    def test_shard_names_are_no_patterns(self, snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_shards(snapshot)
        index = snapshot / "model.safetensors.index.json"
        index.write_text(index.read_text().replace("model-00002-of-00002", "*"))
        asked = []
        monkeypatch.setattr(
            "peft_graft.checkpoints.donor.snapshot_download",
            lambda repo, revision, allow_patterns, **options: asked.extend(allow_patterns) or str(snapshot),
        )
        with pytest.raises(DonorError, match=r"no '\*\.safetensors'"):
            CheckpointDonor("org/donor")
        assert not any(fnmatch("another.safetensors", pattern) for pattern in asked)

    def test_shard_not_cached(self, snapshot: Path) -> None:
        write_shards(snapshot)
        (snapshot / "model-00001-of-00002.safetensors").unlink()
        with pytest.raises(DonorError, match=r"no 'model-00001-of-00002\.safetensors' in 'org/donor'"):
            CheckpointDonor("org/donor")

    def test_not_cached(self, snapshot: Path) -> None:
        with pytest.raises(DonorError, match="'org/other'.*offline"):
            CheckpointDonor("org/other")

    @pytest.mark.parametrize("name", ["a/b/c", "no spaces please", "org/--"])
    def test_neither_a_path_nor_an_id(self, snapshot: Path, name: str) -> None:
        with pytest.raises(DonorError, match="id of a Hub repository"):
            CheckpointDonor(name)

    def test_pickle_only_repository(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub.errors import EntryNotFoundError

        def absent(repo: str, name: str, **options) -> str:
            raise EntryNotFoundError(name)

        monkeypatch.setattr("peft_graft.checkpoints.donor.hf_hub_download", absent)
        monkeypatch.setattr(
            "peft_graft.checkpoints.donor.file_exists", lambda repo, name, **options: name == "pytorch_model.bin"
        )
        with pytest.raises(DonorError, match=r"pytorch_model\.bin.*safe_serialization"):
            CheckpointDonor("org/donor")
        monkeypatch.setattr("peft_graft.checkpoints.donor.file_exists", lambda repo, name, **options: False)
        with pytest.raises(DonorError, match="got neither"):
            CheckpointDonor("org/donor")


class TestModuleDonor:
    def test_holds_the_parameters_without_a_copy(self) -> None:
        module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        donor = ModuleDonor(module)
        assert donor.name == "Sequential"
        assert donor.names() == ["0.bias", "0.weight", "1.bias", "1.weight"]
        assert donor.shape("0.weight") == (2, 3)
        assert donor.get("0.weight").data_ptr() == module[0].weight.data_ptr()
        assert not donor.get("0.weight").requires_grad

    def test_names_tied_parameters_each(self) -> None:
        module = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
        module[1].weight = module[0].weight
        assert ModuleDonor(module).names() == ["0.weight", "1.weight"]

    def test_looks_through_wrappers(self) -> None:
        inner = nn.Sequential(nn.Linear(3, 2))
        for wrapped in (
            torch.compile(inner),
            nn.DataParallel(inner),
            nn.DataParallel(torch.compile(inner)),
            nn.Sequential(torch.compile(inner[0])),
        ):
            donor = ModuleDonor(wrapped)
            assert donor.names() == ["0.bias", "0.weight"] and donor.name == "Sequential"

    def test_refuses_the_meta_device(self) -> None:
        donor = ModuleDonor(nn.Linear(3, 2, device="meta"))
        with pytest.raises(DonorError, match="'bias' of Linear on the meta device"):
            donor.get("bias")


class TestOpenDonor:
    def test_each_kind(self, tmp_path: Path) -> None:
        assert isinstance(open_donor("zeros"), ZerosDonor)
        assert isinstance(open_donor(nn.Linear(2, 2)), ModuleDonor)
        assert isinstance(open_donor(write_single(tmp_path)), CheckpointDonor)
        own = SimpleNamespace(name="own", names=list, shape=tuple, get=torch.tensor)
        assert open_donor(own) is own

    @pytest.mark.parametrize("donor", [3, None, {"a": torch.ones(1)}, b"path"])
    def test_refuses_other_things(self, donor: object) -> None:
        with pytest.raises(DonorError, match=f"got {type(donor).__name__}"):
            open_donor(donor)  # type: ignore[arg-type]


@pytest.mark.parametrize("write", [write_single, write_shards])
def test_the_files_of_diffusers_are_found(tmp_path: Path, write) -> None:
    write(tmp_path)
    for file in tmp_path.glob("model.safetensors*"):
        file.rename(tmp_path / f"diffusion_pytorch_{file.name}")
    check_holds_tensors(CheckpointDonor(tmp_path))


class TestSubfolders:
    """Checkpoints in a folder of a directory or a repository, as the parts of a pipeline are."""

    @pytest.mark.parametrize("write", [write_single, write_shards])
    @pytest.mark.parametrize("names", ["", "diffusion_pytorch_"])
    def test_in_a_directory_and_on_the_hub(
        self, hub_cache: Path, names: str, write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for root in (hub_cache, tmp_path / "pipeline"):
            (root / "parts" / "unet").mkdir(parents=True)
            write(root / "parts" / "unet")
            (root / "parts" / "unet" / "config.json").write_text('{"model_type": "bert", "origin": 7}')
            for file in (root / "parts" / "unet").glob("model.safetensors*"):
                file.rename(file.parent / f"{names}{file.name}")
            save_file({"other": torch.ones(1)}, root / "model.safetensors")
        local = CheckpointDonor(tmp_path / "pipeline", subfolder="parts/unet")
        remote = CheckpointDonor("org/donor", subfolder="parts/unet")
        for donor in (local, remote):
            check_holds_tensors(donor)
            assert donor.config_fields["origin"] == 7
        assert (remote.name, remote.revision, local.revision) == ("org/donor", hub_cache.name, None)
        assert CheckpointDonor("org/donor").names() == ["other"]
        check_holds_tensors(open_donor("org/donor", subfolder="parts/unet"))

    def test_one_that_is_not_there(self, hub_cache: Path, tmp_path: Path) -> None:
        (tmp_path / "pipe" / "vae").mkdir(parents=True)
        with pytest.raises(DonorError, match=r"must have the subfolder 'unet', got \['vae'\].*Check its name"):
            CheckpointDonor(tmp_path / "pipe", subfolder="unet")
        with pytest.raises(DonorError, match="must have the subfolder 'unet', got no folders with weights in 'org/don"):
            CheckpointDonor("org/donor", subfolder="unet")
        with pytest.raises(DonorError, match="reached or is cached"):
            CheckpointDonor("org/other", subfolder="unet")
        with pytest.raises(DonorError, match="id of a Hub repository"):
            CheckpointDonor("a/b/c", subfolder="unet")
        file = write_single(tmp_path) / "model.safetensors"
        with pytest.raises(DonorError, match="must be a directory or a Hub id to have the subfolder"):
            CheckpointDonor(file, subfolder="unet")

    @pytest.mark.parametrize("subfolder", ["../other", "/etc"])
    def test_one_outside_of_the_directory(self, subfolder: str, tmp_path: Path) -> None:
        with pytest.raises(DonorError, match="subfolder must be a folder of the donor"):
            CheckpointDonor(tmp_path, subfolder=subfolder)


def test_the_files_of_diffusers_are_found_on_the_hub(hub_cache: Path) -> None:
    save_file({"x": torch.ones(1)}, hub_cache / "diffusion_pytorch_model.safetensors")
    assert CheckpointDonor("org/donor").names() == ["x"]


class TestAdapters:
    """A saved adapter, or a model that carries one, in the place of a whole model."""

    def save(self, directory: Path, **fields: str) -> Path:
        directory.mkdir(exist_ok=True)
        (directory / "adapter_config.json").write_text(json.dumps(fields))
        save_file({"x": torch.zeros(1)}, directory / "adapter_model.safetensors")
        return directory

    @pytest.mark.parametrize("role", ["base", "donor"])
    @pytest.mark.parametrize(
        ("fields", "how"),
        [
            (
                {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base"},
                r"AutoPeftModelForCausalLM\.from_pretrained\('.*skill'\)\.merge_and_unload\(\)\.save_pretrained",
            ),
            ({"peft_type": "GRAFT"}, "peft-graft export .*skill --to checkpoint --output-dir merged"),
            ({}, r"AutoPeftModel\.from_pretrained"),
        ],
        ids=["lora", "graft", "unknown"],
    )
    def test_a_directory(self, fields: dict[str, str], how: str, role: str, tmp_path: Path) -> None:
        skill = self.save(tmp_path / "skill", **fields)
        for source in (skill, skill / "adapter_model.safetensors"):
            with pytest.raises(
                DonorError, match=rf"{role} must be a whole model, got an adapter.*Merge it first.*{how}"
            ):
                CheckpointDonor(source, role=role)

    def test_an_adapter_beside_a_model(self, tmp_path: Path) -> None:
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        assert CheckpointDonor(tmp_path).names() == ["x"]
        with pytest.raises(DonorError, match=r"If the model beside it is meant, move adapter_config\.json"):
            CheckpointDonor(self.save(tmp_path, peft_type="LORA"))

    def test_a_repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        root = tmp_path / "hub" / "models--org--skill"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("1" * 40)
        (root / "snapshots").mkdir()
        self.save(root / "snapshots" / ("1" * 40), peft_type="LORA", task_type="SEQ_CLS")
        with pytest.raises(DonorError, match="got an adapter .* in 'org/skill'.*ForSequenceClassification"):
            CheckpointDonor("org/skill")

    def test_a_model_in_memory(self) -> None:
        model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
        for module in (model, model.base_model.model):
            with pytest.raises(
                DonorError, match=r"with an adapter in '.*q_proj'.*Merge it first.*merge_and_unload\(\)"
            ):
                ModuleDonor(module)
        assert "model.layers.0.self_attn.q_proj.weight" in ModuleDonor(model.merge_and_unload()).names()
