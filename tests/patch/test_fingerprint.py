"""Fingerprints: the right base in any dtype is accepted, a wrong one is not, and the bytes of the format."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from peft_graft.patch.fingerprint import Fingerprint
from peft_graft.patch.index_codec import PatchError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


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

    @pytest.mark.parametrize("bits", [4, 8])
    def test_quantized_tensors_need_only_point_the_same_way(self, bits: int) -> None:
        values, found = entries(), Fingerprint.compute(entries())
        step = values["b.weight"].abs().max() / (2 ** (bits - 1) - 1)
        rounded = {**values, "b.weight": (values["b.weight"] / step).round() * step}
        assert found.matches(rounded, rounded=["b.weight"]) and not found.matches(rounded)
        found.require(cast(rounded, torch.bfloat16), rounded=["b.weight"])
        assert not found.matches(entries(seed=1), rounded=list(values))
        assert not found.matches({**values, "b.weight": entries(seed=1)["b.weight"]}, rounded=["b.weight"])
        with pytest.raises(PatchError, match="base must be the model"):  # the others still count exactly
            found.require({**rounded, "d.bias": entries(seed=1)["d.bias"]}, rounded=["b.weight"])

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
