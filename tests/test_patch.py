"""Coded indices, patch files and fingerprints: round trips, hostile input, and the bytes of the format."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from peft_graft.patch import (
    MAX_NUMEL,
    Fingerprint,
    Patch,
    PatchError,
    TensorPatch,
    decode_indices,
    encode_indices,
    file_key,
    parse_file_key,
)

torch.set_num_threads(1)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def blob_of(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


@st.composite
def index_lists(draw: st.DrawFn) -> list[int]:
    """Sorted indices of many characters: uniform, clustered, runs, one, none, far apart."""
    gaps = draw(
        st.one_of(
            st.lists(st.integers(0, 3), max_size=200),
            st.lists(st.integers(0, 5000), max_size=100),
            st.lists(st.sampled_from([0, 0, 0, 0, 0, 1, 100_000]), max_size=200),
            st.lists(st.integers(0, 2**40), max_size=20),
            st.integers(0, 300).map(lambda n: [7] + [0] * n),
        )
    )
    return (np.cumsum(np.array(gaps, dtype=np.int64) + 1) - 1).tolist()


class TestIndexCode:
    @given(index_lists())
    def test_round_trip(self, listed: list[int]) -> None:
        indices = torch.tensor(listed, dtype=torch.int64)
        blob = encode_indices(indices)
        assert blob.dtype == torch.uint8 and blob.dim() == 1
        numel = listed[-1] + 1 if listed else 0
        decoded = decode_indices(blob, len(listed), numel)
        assert decoded.dtype == torch.int64 and torch.equal(decoded, indices)
        assert torch.equal(decode_indices(blob, len(listed)), indices)
        if listed:
            with pytest.raises(PatchError, match=r"below|at most"):
                decode_indices(blob, len(listed), numel - 1)
        for other in (len(listed) + 1, len(listed) - 1):
            if blob[0] != 0 and other >= 0:
                with pytest.raises(PatchError):
                    decode_indices(blob, other, numel + 1)

    # The bytes of the format; docs/patch_format.md works out the fifth and the last by hand.
    GOLDEN = [
        ("0000", []),
        ("0000", [0, 1, 2, 3]),
        ("008501", [133]),
        ("00e807", [1000, 1001]),
        ("01006120", [1, 2, 7, 10]),
        ("010098", [0, 3, 4]),
        ("010785c4404e02", [5, 100, 101, 1000]),
    ]

    @pytest.mark.parametrize(("text", "listed"), GOLDEN)
    def test_golden_bytes(self, text: str, listed: list[int]) -> None:
        indices = torch.tensor(listed, dtype=torch.int64)
        assert bytes(encode_indices(indices).tolist()).hex() == text
        assert torch.equal(decode_indices(blob_of(text), len(listed), MAX_NUMEL), indices)

    def test_golden_bytes_of_deflated_varints(self) -> None:
        # A zlib stream of one stored block; how well a writer compresses is its own affair.
        varints = bytes([5, 0x5E, 0, 0x82, 0x07])
        stored = (
            b"\x78\x01\x01" + struct.pack("<HH", 5, 5 ^ 0xFFFF) + varints + struct.pack(">I", zlib.adler32(varints))
        )
        blob = torch.tensor(list(b"\x02" + stored), dtype=torch.uint8)
        assert decode_indices(blob, 4, 1001).tolist() == [5, 100, 101, 1000]
        indices = (torch.arange(40)[:, None] * 300 + torch.tensor([0, 1])).reshape(-1)
        blob = encode_indices(indices)
        assert blob[0] == 2
        assert zlib.decompress(bytes(blob[1:].tolist())) == b"\x00\x00" + b"\xaa\x02\x00" * 39

    def test_codec_is_the_shortest(self) -> None:
        generator = torch.Generator().manual_seed(0)
        uniform = torch.randperm(10_000, generator=generator)[:500].sort().values
        clustered = (torch.arange(50)[:, None] * 1000 + torch.arange(16)).reshape(-1)
        assert encode_indices(uniform)[0] == 1
        assert encode_indices(clustered)[0] == 2
        assert len(encode_indices(torch.arange(1_000_000))) == 2

    def test_size_is_near_the_entropy(self) -> None:
        numel, count = 1_000_000, 1_000
        indices = torch.randperm(numel, generator=torch.Generator().manual_seed(0))[:count].sort().values
        density = count / numel
        entropy = -numel * (density * math.log2(density) + (1 - density) * math.log2(1 - density)) / 8
        assert len(encode_indices(indices)) <= 1.05 * entropy

    @pytest.mark.parametrize(
        ("indices", "words"),
        [
            (torch.tensor([3, 3]), "strictly increasing"),
            (torch.tensor([3, 2]), "strictly increasing"),
            (torch.tensor([-1, 2]), r"in \[0, "),
            (torch.tensor([MAX_NUMEL]), r"in \[0, "),
            (torch.tensor([1, 2], dtype=torch.int32), "int64"),
            (torch.tensor([[1, 2]]), "int64 of shape"),
        ],
    )
    def test_refuses_to_encode(self, indices: torch.Tensor, words: str) -> None:
        with pytest.raises(PatchError, match=words):
            encode_indices(indices)


class TestHostileCode:
    BAD = {
        "empty": ("", 1),
        "unknown codec": ("0300", 1),
        "run: no start": ("00", 1),
        "run: start cut off": ("0080", 1),
        "run: byte after start": ("000000", 1),
        "run: start with needless bytes": ("008000", 1),
        "run: start too large": ("00" + "ff" * 9 + "01", 1),
        "run: past the end": ("00f807", 1),
        "run: more than there are": ("0000", 1001),
        "rice: no r": ("01", 1),
        "rice: r too large": ("01ff" + "ff" * 64, 1),
        "rice: truncated planes": ("010785c4", 4),
        "rice: truncated unary": ("010785c4404e", 4),
        "rice: byte after the end": ("010785c4404e0200", 4),
        "rice: one entry too many": ("010785c4404e03", 4),
        "rice: fewer entries than said": ("010785c4404e02", 3),
        "rice: index past the end": ("012eff" + "ff" * 5 + "80", 1),
        "varint: not zlib": ("02ffff", 1),
        "varint: no bytes": ("02", 1),
    }

    @pytest.mark.parametrize("case", BAD)
    def test_refused_by_name(self, case: str) -> None:
        text, count = self.BAD[case]
        with pytest.raises(PatchError, match=r"in 'layer\.weight'"):
            decode_indices(blob_of(text), count, 1000, where="layer.weight")

    @pytest.mark.parametrize(
        ("stream", "count"),
        [
            (zlib.compress(b"\x05\x00"), 1),  # more varints than values
            (zlib.compress(b"\x05"), 2),  # fewer
            (zlib.compress(b"\x05\x85"), 2),  # the last one cut off
            (zlib.compress(b"\x85\x00"), 1),  # not the shortest form
            (zlib.compress(b"\xff\xff\x01"), 1),  # longer than an index below 1000 can be
            (zlib.compress(b"\xe8\x07"), 1),  # 1000
            (zlib.compress(b"\x05")[:-1], 1),  # truncated
            (zlib.compress(b"\x05") + b"\x00", 1),  # trailing byte
            (zlib.compress(b"\x05") + zlib.compress(b"\x05"), 2),  # two streams
            (zlib.compress(b"\x05")[:-1] + b"\x00", 1),  # wrong checksum
        ],
    )
    def test_deflated_varints(self, stream: bytes, count: int) -> None:
        blob = torch.tensor(list(b"\x02" + stream), dtype=torch.uint8)
        with pytest.raises(PatchError):
            decode_indices(blob, count, 1000)

    def test_wrong_tensor_for_a_code(self) -> None:
        for blob in (torch.zeros(2, dtype=torch.int8), torch.zeros(2), torch.zeros(1, 2, dtype=torch.uint8)):
            with pytest.raises(PatchError, match="vector of uint8"):
                decode_indices(blob, 1, 10)

    def test_gaps_cannot_wrap_around(self) -> None:
        # Every gap is below numel, but 2**18 of them add up past 2**63 and back to small numbers.
        count, r = 2**18, 47
        planes = np.ones(r * count, dtype=np.uint8)
        packed = np.packbits(np.concatenate([planes, np.ones(count, dtype=np.uint8)]))
        blob = torch.from_numpy(np.concatenate([np.array([1, r], dtype=np.uint8), packed]))
        with pytest.raises(PatchError, match="below"):
            decode_indices(blob, count, MAX_NUMEL)

    def test_bomb_costs_no_memory(self) -> None:
        bomb = torch.frombuffer(bytearray(b"\x02" + zlib.compress(bytes(50_000_000), 9)), dtype=torch.uint8)
        unary = torch.cat([torch.tensor([1, 0], dtype=torch.uint8), torch.full((4_000_000,), 255, dtype=torch.uint8)])
        for blob, room in ((bomb, 1_000_000), (unary, 10_000_000)):
            tracemalloc.start()
            with pytest.raises(PatchError):
                decode_indices(blob, 10, MAX_NUMEL)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < room

    @settings(max_examples=400)
    @given(st.data())
    def test_mutations_decode_to_valid_indices_or_are_refused(self, data: st.DataObject) -> None:
        listed = data.draw(index_lists())
        blob = bytearray(encode_indices(torch.tensor(listed, dtype=torch.int64)).tolist())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(blob)))
            kind = data.draw(st.sampled_from(["flip", "insert", "delete", "cut", "codec"]))
            if kind == "flip" and at < len(blob):
                blob[at] ^= 1 << data.draw(st.integers(0, 7))
            elif kind == "insert":
                blob[at:at] = data.draw(st.binary(min_size=1, max_size=4))
            elif kind == "delete":
                del blob[at : at + 1]
            elif kind == "cut":
                del blob[at:]
            elif blob:
                blob[0] = data.draw(st.integers(0, 3))
        self.check_any(bytes(blob), len(listed), listed[-1] + 1 if listed else 5)

    @settings(max_examples=400)
    @given(st.binary(max_size=40), st.integers(0, 40), st.integers(0, 2000))
    def test_random_bytes_decode_to_valid_indices_or_are_refused(self, blob: bytes, count: int, numel: int) -> None:
        self.check_any(bytes([blob[0] % 3]) + blob[1:] if blob else blob, count, numel)

    def check_any(self, blob: bytes, count: int, numel: int) -> None:
        try:
            indices = decode_indices(torch.tensor(list(blob), dtype=torch.uint8), count, numel, "x")
        except PatchError:
            return
        assert indices.dtype == torch.int64 and indices.shape == (count,)
        assert bool((indices[1:] > indices[:-1]).all())
        assert count == 0 or (0 <= int(indices[0]) and int(indices[-1]) < numel)


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
        assert {key: (bytes(t.view(torch.uint8).tolist()).hex(), t.dtype) for key, t in state.items()} == {
            "layer.0.graft_patch.weight_indices": ("01006120", torch.uint8),
            "layer.0.graft_patch.weight_values": ("003f80bf00400000", torch.bfloat16),
            "layer.0.graft_patch.bias_indices": ("0000", torch.uint8),
            "layer.0.graft_patch.bias_values": ("803f00404040", torch.bfloat16),
            "graft_patch.scale_indices": ("008501", torch.uint8),
            "graft_patch.scale_values": ("0080", torch.bfloat16),
        }
        assert make_patch().nbytes == 4 + 8 + 2 + 6 + 3 + 2

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
        state = patch.to_tensors()
        assert state["m.graft_patch.weight_values"].shape == (500, 0)
        assert patch.nbytes == state["m.graft_patch.weight_indices"].nbytes
        check_same(patch, Patch.from_tensors(state))

    def test_zeros_of_a_whole_tensor_are_stored(self) -> None:
        patch = Patch({"m.weight": TensorPatch(torch.arange(500), torch.zeros(500))})
        assert patch.to_tensors()["m.graft_patch.weight_values"].shape == (500,)
        check_same(patch, Patch.from_tensors(patch.to_tensors()))

    def test_count_of_zeros_must_be_vouched_for(self) -> None:
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
        state = make_patch().to_tensors()
        del state[f"layer.0.graft_patch.weight_{kind}"]
        with pytest.raises(PatchError, match="given by indices and values.*'layer.0.weight'"):
            Patch.from_tensors(state)

    def test_one_tensor_twice(self) -> None:
        state = make_patch().to_tensors()
        state["base_model.model.graft_patch.scale_values"] = torch.ones(1)
        with pytest.raises(PatchError, match="values must be given once.*'scale'"):
            Patch.from_tensors(state)

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
        state = {**make_patch().to_tensors(), f"layer.0.graft_patch.weight_{kind}": tensor}
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
        file = bytearray(save(make_patch().to_tensors()))
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

        monkeypatch.setattr("peft_graft.patch.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            make_patch(torch.float32).save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_save_replaces_the_old_file(self, tmp_path: Path) -> None:
        save_file({"old": torch.ones(1000)}, tmp_path / "p")
        make_patch().save(tmp_path / "p")
        check_same(make_patch(), Patch.load(tmp_path / "p"))


def entries(dtype: torch.dtype = torch.float32, scale: float = 0.05, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(count, generator=generator) * scale).to(dtype)
        for name, count in (("b.weight", 700), ("a.weight", 1), ("c.bias", 0), ("d.bias", 299))
    }


def cast(values: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) for name, tensor in values.items()}


class TestFingerprint:
    def test_golden(self) -> None:
        # Computed by hand from the format: sha256 of b"a\0float32\0" b"2\0" and the values' bytes.
        found = Fingerprint.compute({"a": torch.tensor([1.0, -2.0])})
        assert found == Fingerprint(
            dtype="float32",
            sha256="e45a966393009f4326784ef46e7f0c99b75251b14f7e418fe88bbec313cd85fa",
            sample="AAAAAAAA8D8AAAAAAAAAwA==",
            count=2,
        )

    def test_same_base(self) -> None:
        for dtype in FLOATS:
            found = Fingerprint.compute(entries(dtype))
            assert found.count == 1000 and found.dtype == str(dtype).removeprefix("torch.")
            assert found.matches(dict(reversed(entries(dtype).items())))
            found.require(entries(dtype))

    def test_every_entry_counts_in_the_same_dtype(self) -> None:
        found = Fingerprint.compute(entries())
        for name, position in (("a.weight", 0), ("b.weight", 333), ("d.bias", 298)):
            other = entries()
            other[name][position] = torch.nextafter(other[name][position], torch.tensor(1.0))
            assert not found.matches(other)

    @pytest.mark.parametrize("made", FLOATS)
    @pytest.mark.parametrize("loaded", FLOATS)
    @pytest.mark.parametrize("stored", FLOATS)
    @pytest.mark.parametrize("scale", [0.05, 1e-5, 100.0])
    def test_same_checkpoint_in_other_dtypes(self, stored, made, loaded, scale: float) -> None:
        checkpoint = entries(stored, scale)
        found = Fingerprint.compute(cast(checkpoint, made))
        assert found.mismatches(cast(checkpoint, loaded)) == 0
        assert found.matches(cast(checkpoint, loaded))

    @pytest.mark.parametrize("made", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
    def test_base_that_differs_by_a_thousandth(self, made: torch.dtype, loaded: torch.dtype) -> None:
        found = Fingerprint.compute(cast(entries(), made))
        other = {name: tensor * 1.001 for name, tensor in entries().items()}
        if {made, loaded} == {torch.bfloat16, torch.float16}:
            # A thousandth is within their tolerance; a hundredth is not.
            other = {name: tensor * 1.01 for name, tensor in entries().items()}
        assert not found.matches(cast(other, loaded))
        with pytest.raises(PatchError, match=r"must be the model that this patch was made for.*Load 'org/base'"):
            found.require(cast(other, loaded), "org/base")

    @pytest.mark.parametrize("loaded", FLOATS)
    def test_another_base(self, loaded: torch.dtype) -> None:
        found = Fingerprint.compute(entries(torch.bfloat16))
        assert not found.matches(entries(loaded, seed=1))
        with pytest.raises(PatchError, match=r"6\d of 64 samples"):
            found.require(entries(loaded, seed=1))

    def test_difference_outside_the_sample_is_told(self) -> None:
        found, other = Fingerprint.compute(entries()), entries()
        other["b.weight"][1] += 1
        assert found.mismatches(other) == 0
        with pytest.raises(PatchError, match=r"\(their hash\)"):
            found.require(other)

    def test_names_and_counts_matter(self) -> None:
        found = Fingerprint.compute(entries())
        renamed = {name.replace("b.", "bb."): tensor for name, tensor in entries().items()}
        longer = {**entries(), "e": torch.ones(1)}
        shorter = {name: tensor for name, tensor in entries().items() if name != "d.bias"}
        for other in (renamed, longer, shorter, cast(longer, torch.bfloat16), cast(shorter, torch.bfloat16), {}):
            assert not found.matches(other)
            with pytest.raises(PatchError):
                found.require(other)

    def test_mixed_dtypes(self) -> None:
        mixed = entries(torch.bfloat16)
        mixed["b.weight"] = entries()["b.weight"]
        found = Fingerprint.compute(mixed)
        assert found.dtype == "bfloat16*1,float32*1,bfloat16*2"
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert found.matches(cast(mixed, dtype))
        assert Fingerprint.compute(cast(mixed, torch.bfloat16)).matches(mixed)
        assert not found.matches(entries(torch.bfloat16, seed=1))

    def test_empty_patch(self) -> None:
        for empty in ({}, {"a": torch.zeros(0)}):
            found = Fingerprint.compute(empty)
            assert found.matches(empty) and found.sample == ""
            assert Fingerprint.from_dict(found.to_dict()) == found

    def test_json(self) -> None:
        found = Fingerprint.compute(entries(torch.float16))
        assert Fingerprint.from_dict(json.loads(json.dumps({**found.to_dict(), "later": 1}))) == found

    @pytest.mark.parametrize(
        "change",
        [
            {"count": -1},
            {"count": 999.0},
            {"count": True},
            {"count": 3},
            {"count": "1000"},
            {"sample": "AAAA"},
            {"sample": "*"},
            {"sample": None},
            {"sha256": "00"},
            {"sha256": "zz" * 32},
            {"sha256": 7},
            {"dtype": None},
        ],
    )
    def test_malformed(self, change: dict[str, object]) -> None:
        fields = {**Fingerprint.compute(entries()).to_dict(), **change}
        with pytest.raises(PatchError, match="fingerprint must"):
            Fingerprint.from_dict(fields)
        (name,) = change
        del fields[name]
        with pytest.raises(PatchError, match=f"fingerprint must.*{name}"):
            Fingerprint.from_dict(fields)

    @pytest.mark.parametrize(
        "dtype", ["", "int8", "float32*3", "float32*999999999", "float32*5", "float32*-4", "float32*4,"]
    )
    def test_unknown_dtype_is_no_match(self, dtype: str) -> None:
        found = Fingerprint.from_dict({**Fingerprint.compute(entries()).to_dict(), "dtype": dtype})
        assert not found.matches(entries())

    def test_refuses_integers(self) -> None:
        with pytest.raises(PatchError, match="got torch.int64 in 'a'"):
            Fingerprint.compute({"a": torch.tensor([1])})

    @given(st.floats(-1e4, 1e4, width=32))
    def test_one_number_in_any_two_dtypes(self, number: float) -> None:
        assume(number == 0 or abs(number) > 1e-30)
        value = {"a": torch.tensor([number])}
        for made in FLOATS:
            found = Fingerprint.compute(cast(value, made))
            for loaded in FLOATS:
                assert found.matches(cast(value, loaded))
