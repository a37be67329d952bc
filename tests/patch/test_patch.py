"""Patches and their files: keys, round trips, hostile input, and saving at once or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from old_patches import to_old_tensors
from peft_graft.patch.index_codec import encode_indices
from peft_graft.patch.patch import Patch, PatchError, TensorPatch, file_key, parse_file_key

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class TestFileKeys:
    @pytest.mark.parametrize("module", ["", "encoder.layer.0", "graft_patch.x"])
    @pytest.mark.parametrize("param", ["weight", "out_proj__weight", "bias_values"])
    @pytest.mark.parametrize("kind", ["indices", "values", "logits"])
    def test_round_trip(self, module: str, param: str, kind: str) -> None:
        key = file_key(module, param, kind)
        assert parse_file_key(key) == (module, param, kind)
        assert parse_file_key("base_model.model." + key) == (module, param, kind)

    def test_form(self) -> None:
        assert file_key("layer.0", "weight", "values") == "layer.0.graft_patch.weight_values"
        assert file_key("", "weight", "indices") == "graft_patch.weight_indices"

    @pytest.mark.parametrize("key", ["classifier.weight", "layer.graft_patches.weight_values", "xgraft_patch.a_values"])
    def test_keys_of_other_things(self, key: str) -> None:
        assert parse_file_key(key) is None

    @pytest.mark.parametrize("leaf", ["weight", "weight_mask", "_values", "values", "default.weight_values", ""])
    def test_malformed_keys(self, leaf: str) -> None:
        with pytest.raises(PatchError, match="must end in"):
            parse_file_key(f"layer.graft_patch.{leaf}")

    @pytest.mark.parametrize(("param", "kind"), [("", "values"), ("a.b", "values"), ("weight", "mask")])
    def test_refuses_to_make(self, param: str, kind: str) -> None:
        with pytest.raises(PatchError, match="file key must"):
            file_key("layer", param, kind)


def make_patch(dtype: torch.dtype = torch.bfloat16) -> Patch:
    return Patch(
        {
            "layer.0.weight": TensorPatch(
                torch.tensor([1, 2, 7, 10]), torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype)
            ),
            "layer.0.bias": TensorPatch(torch.arange(3), torch.tensor([1.0, 2.0, 3.0], dtype=dtype)),
            "scale": TensorPatch(torch.tensor([133]), torch.tensor([-0.0], dtype=dtype)),
        },
        {"layer.0.weight": (3, 4), "layer.0.bias": (3,), "scale": (200,), "unpatched": (5,)},
    )


def as_bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def check_same(one: Patch, other: Patch) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, part in one.tensors.items():
        assert torch.equal(part.indices, other.tensors[name].indices)
        values = other.tensors[name].values
        assert values.dtype == part.values.dtype and values.shape == part.values.shape
        assert torch.equal(values.view(torch.uint8), part.values.contiguous().view(torch.uint8))


class TestPatch:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_file_round_trip(self, tmp_path: Path, dtype: torch.dtype) -> None:
        patch = make_patch(dtype)
        patch.save(tmp_path / "patch.safetensors")
        loaded = Patch.load(tmp_path / "patch.safetensors", patch.shapes)
        check_same(patch, loaded)
        assert loaded.num_params == 8
        assert [file.name for file in tmp_path.iterdir()] == ["patch.safetensors"]
        check_same(patch, Patch.load(str(tmp_path / "patch.safetensors")))

    def test_file_holds_what_the_format_says(self, tmp_path: Path) -> None:
        make_patch().save(tmp_path / "patch.safetensors")
        state = load_file(tmp_path / "patch.safetensors")
        table = b'{"BF16":{"layer.*.bias":{"0":[3,2]},"layer.*.weight":{"0":[4,4]},"scale":[1,3]}}'
        # in order of the names; the coded indices, then the values
        packed = "0000803f00404040" + "01006120003f80bf00400000" + "0085010080"
        assert {key: (bytes(tensor.tolist()), tensor.dtype) for key, tensor in state.items()} == {
            "graft_patch.table": (table, torch.uint8),
            "graft_patch.packed": (bytes.fromhex(packed), torch.uint8),
        }
        assert make_patch().nbytes == len(table) + len(packed) // 2

    def test_files_of_version_1_are_read(self) -> None:
        patch = make_patch()
        state = to_old_tensors(patch)
        assert {key: (bytes(t.view(torch.uint8).tolist()).hex(), t.dtype) for key, t in state.items()} == {
            "layer.0.graft_patch.weight_indices": ("01006120", torch.uint8),
            "layer.0.graft_patch.weight_values": ("003f80bf00400000", torch.bfloat16),
            "layer.0.graft_patch.bias_indices": ("0000", torch.uint8),
            "layer.0.graft_patch.bias_values": ("803f00404040", torch.bfloat16),
            "graft_patch.scale_indices": ("008501", torch.uint8),
            "graft_patch.scale_values": ("0080", torch.bfloat16),
        }
        check_same(patch, Patch.from_tensors(state, patch.shapes))

    def test_reads_an_adapter_file(self) -> None:
        patch = make_patch()
        state = {"base_model.model." + key: tensor for key, tensor in patch.to_tensors().items()}
        state["base_model.model.classifier.weight"] = torch.ones(2, 2)
        state["base_model.model.layer.0.graft_patch.weight_logits"] = torch.ones(4)
        state["base_model.model.other.graft_patch.weight_logits"] = torch.ones(4)
        check_same(patch, Patch.from_tensors(state))

    def test_zeros_store_no_values(self) -> None:
        indices = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:500].sort().values
        patch = Patch({"m.weight": TensorPatch(indices, torch.zeros(500))})
        for state in (patch.to_tensors(), to_old_tensors(patch)):
            assert sum(tensor.nbytes for tensor in state.values()) < encode_indices(indices).numel() + 50
            check_same(patch, Patch.from_tensors(state))

    def test_zeros_of_a_whole_tensor_are_stored(self) -> None:
        patch = Patch({"m.weight": TensorPatch(torch.arange(500), torch.zeros(500))})
        for state in (patch.to_tensors(), to_old_tensors(patch)):
            assert sum(tensor.nbytes for tensor in state.values()) >= 2000
            check_same(patch, Patch.from_tensors(state))

    def test_count_of_zeros_must_be_vouched_for(self) -> None:
        packed = {
            "graft_patch.table": as_bytes(f'{{"zeros-F32":{{"m.weight":[{2**40},2]}}}}'),
            "graft_patch.packed": torch.zeros(2, dtype=torch.uint8),
        }
        with pytest.raises(PatchError, match="number of zeros must be at most 16.*'m.weight'"):
            Patch.from_tensors(packed)
        state = {
            "m.graft_patch.weight_indices": torch.zeros(2, dtype=torch.uint8),
            "m.graft_patch.weight_values": torch.empty(2**40, 0),
        }
        with pytest.raises(PatchError, match="number of zeros must be at most 16.*'m.weight'"):
            Patch.from_tensors(state)

    def test_empty(self, tmp_path: Path) -> None:
        none = torch.zeros(0, dtype=torch.int64)
        for patch in (Patch({}), Patch({"a.b": TensorPatch(none, torch.zeros(0))}, {"a.b": (0,)})):
            patch.save(tmp_path / "p")
            check_same(patch, Patch.load(tmp_path / "p", patch.shapes))
            assert patch.num_params == 0

    def test_saves_slices_of_one_storage(self, tmp_path: Path) -> None:
        values, indices = torch.arange(6.0), torch.tensor([0, 2, 9])
        patch = Patch({"a.w": TensorPatch(indices, values[::2]), "b.w": TensorPatch(indices, values[3:])})
        patch.save(tmp_path / "p")
        check_same(patch, Patch.load(tmp_path / "p"))
        assert (tmp_path / "p").stat().st_size < 500

    @pytest.mark.parametrize(
        ("indices", "values", "words"),
        [
            ([0, 2, 1], [1.0, 1.0, 1.0], "strictly increasing"),
            ([0, 1, 1], [1.0, 1.0, 1.0], "strictly increasing"),
            ([-1, 1, 2], [1.0, 1.0, 1.0], r"in \[0, 12\)"),
            ([0, 1, 12], [1.0, 1.0, 1.0], r"in \[0, 12\)"),
            ([0, 1, 2], [1.0, 1.0], r"of shape \(3,\)"),
            ([0, 1, 2], [1.0, float("nan"), float("inf")], "finite, got 2 NaN or Inf"),
            ([0, 1, 2], [1, 2, 3], "floating-point"),
        ],
    )
    def test_validation_names_the_tensor(self, tmp_path: Path, indices: list, values: list, words: str) -> None:
        patch = Patch({"m.weight": TensorPatch(torch.tensor(indices), torch.tensor(values))}, {"m.weight": (3, 4)})
        for call in (patch.validate, patch.to_tensors, lambda: patch.save(tmp_path / "p")):
            with pytest.raises(PatchError, match=f"{words}.*in 'm.weight'"):
                call()
        assert list(tmp_path.iterdir()) == []

    def test_tensors_outside_the_target_are_refused(self) -> None:
        state = make_patch().to_tensors()
        with pytest.raises(PatchError, match="targets, got 'scale'"):
            Patch.from_tensors(state, {"layer.0.weight": (3, 4), "layer.0.bias": (3,)})
        with pytest.raises(PatchError, match="below 10.*in 'layer.0.weight'"):
            Patch.from_tensors(state, {**make_patch().shapes, "layer.0.weight": (2, 5)})
        with pytest.raises(PatchError, match="at most 2.*in 'layer.0.bias'"):
            Patch.from_tensors(state, {**make_patch().shapes, "layer.0.bias": (2,)})

    @pytest.mark.parametrize("kind", ["indices", "values"])
    def test_half_a_patch(self, kind: str) -> None:
        state = to_old_tensors(make_patch())
        del state[f"layer.0.graft_patch.weight_{kind}"]
        with pytest.raises(PatchError, match="given by indices and values.*'layer.0.weight'"):
            Patch.from_tensors(state)

    def test_one_tensor_twice(self) -> None:
        state = to_old_tensors(make_patch())
        twice = {**state, "base_model.model.graft_patch.scale_values": torch.ones(1)}
        with pytest.raises(PatchError, match="values must be given once.*'scale'"):
            Patch.from_tensors(twice)
        with pytest.raises(PatchError, match="patched tensor must be given once.*also a row of the table in 'scale'"):
            Patch.from_tensors({**state, **make_patch().to_tensors()})
        packed = make_patch().to_tensors()
        with pytest.raises(PatchError, match="table must be given once.*a second time"):
            Patch.from_tensors({**packed, "base_model.model.graft_patch.table": packed["graft_patch.table"]})

    @pytest.mark.parametrize(
        ("kind", "tensor", "words"),
        [
            ("values", torch.ones(2, 2), r"of shape \(n,\)"),
            ("values", torch.tensor(1.0), r"of shape \(n,\)"),
            ("values", torch.ones(4, dtype=torch.int32), "floating-point"),
            ("values", torch.ones(4).to(torch.float8_e4m3fn), "floating-point"),
            ("values", torch.ones(5), "Rice codes of 5"),
            ("values", torch.tensor([1.0, 2.0, float("nan"), 1.0]), "finite"),
            ("indices", torch.tensor([1, 2, 7, 10]), "uint8"),
        ],
    )
    def test_malformed_tensors(self, kind: str, tensor: torch.Tensor, words: str) -> None:
        state = {**to_old_tensors(make_patch()), f"layer.0.graft_patch.weight_{kind}": tensor}
        with pytest.raises(PatchError, match=f"{words}.*in 'layer.0.weight'"):
            Patch.from_tensors(state)

    def test_damaged_file(self, tmp_path: Path) -> None:
        whole = save(make_patch().to_tensors())
        for damaged in (b"", whole[:20], whole[:-1], whole + b"\0", b"\xff" * 100):
            (tmp_path / "p").write_bytes(damaged)
            with pytest.raises(PatchError, match="whole safetensors"):
                Patch.load(tmp_path / "p")
        with pytest.raises(FileNotFoundError):
            Patch.load(tmp_path / "none")

    @settings(max_examples=300)
    @given(data=st.data())
    def test_mutated_files_load_as_valid_or_are_refused(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        write = data.draw(st.sampled_from([Patch.to_tensors, to_old_tensors]))
        file = bytearray(save(write(make_patch())))
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(file) - 1))
            file[at] = data.draw(st.integers(0, 255))
        path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
        path.write_bytes(file)
        try:
            patch = Patch.load(path, make_patch().shapes)
        except PatchError:
            return
        patch.validate()
        assert patch.num_params <= 8

    def test_failing_save_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "patch.safetensors"
        make_patch().save(path)
        before = path.read_bytes()

        def fail(state: dict, file: Path, metadata: dict) -> None:
            Path(file).write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr("peft_graft.patch.patch.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            make_patch(torch.float32).save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_save_replaces_the_old_file(self, tmp_path: Path) -> None:
        save_file({"old": torch.ones(1000)}, tmp_path / "p")
        make_patch().save(tmp_path / "p")
        check_same(make_patch(), Patch.load(tmp_path / "p"))
