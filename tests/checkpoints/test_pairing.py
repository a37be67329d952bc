"""Finding the base's tensors in a donor, and streaming both side by side."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_graft.checkpoints.pairing import (
    CheckpointDonor,
    DonorError,
    ZerosDonor,
    count_nonfinite,
    nothing_to_graft,
    resolve_names,
    stream,
)

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a.bias": torch.tensor([0.1, -0.2]),
    "b.weight": torch.arange(4, dtype=torch.float16).reshape(4, 1),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


class Recorder:
    """A donor over a dict that keeps a list of what was read."""

    name = "recorder"

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.read: list[str] = []

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return self.tensors[name]


class TestResolveNames:
    def resolve(
        self, wanted: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]], **kwargs
    ) -> dict[str, str]:
        return resolve_names(wanted, Recorder({name: torch.zeros(shape) for name, shape in shapes.items()}), **kwargs)

    def test_same_names(self) -> None:
        assert self.resolve(SHAPES, {**SHAPES, "more": (1,)}) == {name: name for name in SHAPES}

    def test_reads_no_values(self) -> None:
        donor = Recorder(TENSORS)
        resolve_names(SHAPES, donor)
        assert donor.read == []

    def test_prefix_on_either_side(self) -> None:
        wanted = {"bert.x.weight": (2,), "y.weight": (3,)}
        held = {"x.weight": (2,), "bert.y.weight": (3,)}
        want = {"bert.x.weight": "x.weight", "y.weight": "bert.y.weight"}
        assert self.resolve(wanted, held, prefixes=("model", "bert")) == want
        with pytest.raises(DonorError, match="2 of 2 tensors missing"):
            self.resolve(wanted, held)

    def test_exact_name_is_never_a_stand_in(self) -> None:
        # Without this rule both wanted tensors would silently get the same values.
        with pytest.raises(DonorError, match=r"1 of 2 tensors missing \(bert\.x\)"):
            self.resolve({"x": (2,), "bert.x": (2,)}, {"x": (2,)}, prefixes=("bert",))

    def test_one_tensor_does_not_stand_in_twice(self) -> None:
        with pytest.raises(DonorError, match="1 of 2 tensors missing"):
            self.resolve({"m.x": (2,), "n.x": (2,)}, {"x": (2,)}, prefixes=("m", "n"))

    def test_old_names_of_layer_norm(self) -> None:
        wanted = {"bert.LayerNorm.weight": (2,), "bert.LayerNorm.bias": (2,), "LayerNorm.bias": (2,)}
        held = {"LayerNorm.gamma": (2,), "bert.LayerNorm.beta": (2,), "LayerNorm.beta": (2,)}
        assert self.resolve(wanted, held, prefixes=("bert",)) == {
            "bert.LayerNorm.weight": "LayerNorm.gamma",
            "bert.LayerNorm.bias": "bert.LayerNorm.beta",
            "LayerNorm.bias": "LayerNorm.beta",
        }
        with pytest.raises(DonorError, match="missing"):  # gamma is another thing outside LayerNorm (layer scale)
            self.resolve({"block.weight": (2,)}, {"block.gamma": (2,)})

    def test_aliases_of_tied_weights(self) -> None:
        wanted = {"model.embed.weight": (4, 2)}
        aliases = {"model.embed.weight": ["head.weight"]}
        assert self.resolve(wanted, {"head.weight": (4, 2)}, aliases=aliases) == {"model.embed.weight": "head.weight"}
        both = {"head.weight": (4, 2), "embed.weight": (4, 2)}
        found = self.resolve(wanted, both, prefixes=("model",), aliases=aliases)
        assert found == {"model.embed.weight": "embed.weight"}
        tied = {**wanted, "head.weight": (4, 2)}
        found = self.resolve(tied, {"head.weight": (4, 2)}, aliases=aliases)
        assert found == {"model.embed.weight": "head.weight", "head.weight": "head.weight"}

    def test_missing_tensors_are_listed_and_counted(self) -> None:
        wanted = {f"layer.{i}.weight": (2,) for i in range(20)}
        held = {f"layer.{i}.weight": (2,) for i in range(13)}
        with pytest.raises(DonorError) as caught:
            self.resolve(wanted, held)
        text = str(caught.value)
        assert "7 of 20 tensors missing (layer.13.weight, " in text and text.count("layer.") == 5
        assert "not the same architecture" not in text and "'recorder'" in text

    def test_another_architecture(self) -> None:
        wanted = {f"layer.{i}.weight": (2,) for i in range(20)}
        with pytest.raises(DonorError, match="20 of 20 tensors missing.*not the same architecture"):
            self.resolve(wanted, {"h.0.attn": (2,)})

    def test_other_shapes_show_both_shapes(self) -> None:
        wanted = {"a.weight": (4, 8), "a.bias": (4,), "b.weight": (8, 4)}
        held = {"a.weight": (6, 12), "a.bias": (6,), "b.weight": (12, 6)}
        with pytest.raises(DonorError) as caught:
            self.resolve(wanted, held)
        text = str(caught.value)
        assert "a.weight: (4, 8) in the base, (6, 12) in the donor" in text
        assert "not the same architecture" in text and "vocabulary" not in text

    def test_resized_vocabulary(self) -> None:
        wanted = {"embed.weight": (100, 8), "lm_head.weight": (100, 8), "lm_head.bias": (100,), "fc.weight": (8, 8)}
        held = {"embed.weight": (104, 8), "lm_head.weight": (104, 8), "lm_head.bias": (104,), "fc.weight": (8, 8)}
        with pytest.raises(DonorError) as caught:
            self.resolve(wanted, held)
        text = str(caught.value)
        assert "resized vocabulary" in text and "100 in the base and 104 in the donor" in text
        assert "resize_token_embeddings(104)" in text and "exclude_modules=['embed', 'lm_head']" in text

    def test_missing_and_misshapen_are_told_together(self) -> None:
        wanted = {"a": (2,), "b": (2,), "c": (3,), "d": (2,)}
        with pytest.raises(DonorError, match=r"1 of 4 tensors missing \(a\), 1 of another shape \(c: \(3,\)"):
            self.resolve(wanted, {"b": (2,), "c": (4,), "d": (2,)})

    def test_zeros_have_every_name(self) -> None:
        assert resolve_names(SHAPES, ZerosDonor()) == {name: name for name in SHAPES}


class TestStream:
    BASE = {name: torch.zeros(tensor.shape) for name, tensor in reversed(TENSORS.items())}

    def test_in_name_order_with_both_sides(self, tmp_path: Path) -> None:
        save_file(TENSORS, tmp_path / "model.safetensors")
        triples = list(stream(self.BASE, CheckpointDonor(tmp_path)))
        assert [triple.name for triple in triples] == sorted(TENSORS)
        for name, base, donor in triples:
            assert base is self.BASE[name]
            assert donor.dtype == TENSORS[name].dtype and torch.equal(donor, TENSORS[name])

    def test_one_tensor_at_a_time(self) -> None:
        donor = Recorder(TENSORS)
        triples = stream(self.BASE, donor)
        assert donor.read == []
        next(triples)
        assert donor.read == ["a.bias"]

    def test_with_names_looks_up_the_base_lazily(self) -> None:
        class Lazy(dict):
            def __missing__(self, name: str) -> torch.Tensor:
                looked_up.append(name)
                return torch.zeros(SHAPES[name])

        looked_up: list[str] = []
        triples = stream(Lazy(), Recorder(TENSORS), names={name: name for name in TENSORS})
        assert looked_up == []
        next(triples)
        assert looked_up == ["a.bias"]

    def test_renamed(self) -> None:
        triple = next(stream({"x": torch.zeros(2)}, Recorder(TENSORS), names={"x": "a.bias"}))
        assert triple.name == "x" and torch.equal(triple.donor, TENSORS["a.bias"])

    def test_zeros(self) -> None:
        base = {"b": torch.ones(2, 3, dtype=torch.bfloat16), "a": torch.ones(4)}
        triples = list(stream(base, ZerosDonor()))
        assert [triple.name for triple in triples] == ["a", "b"]
        for triple in triples:
            assert triple.donor.dtype == triple.base.dtype
            assert torch.equal(triple.donor, torch.zeros_like(triple.base))

    def test_misfit_is_raised_at_the_call(self) -> None:
        with pytest.raises(DonorError, match="missing"):
            stream({"nowhere": torch.zeros(1)}, Recorder(TENSORS))

    def test_misfit_with_given_names(self) -> None:
        with pytest.raises(DonorError, match=r"\(2,\) for \(3,\) in 'x'"):
            next(stream({"x": torch.zeros(3)}, Recorder(TENSORS), names={"x": "a.bias"}))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("bad", [[float("nan")], [float("inf"), float("-inf")], [float("-inf"), float("nan")]])
    def test_nan_and_inf(self, dtype: torch.dtype, bad: list[float]) -> None:
        tensor = torch.cat([torch.ones(5), torch.tensor(bad)]).to(dtype)
        with pytest.raises(DonorError, match=rf"got {len(bad)} NaN or Inf among {5 + len(bad)} entries of 'x'"):
            list(stream({"x": torch.zeros(5 + len(bad))}, Recorder({"x": tensor})))

    def test_large_finite_values_pass(self) -> None:
        huge = torch.full((3,), torch.finfo(torch.float32).max)  # their sum is infinite
        assert count_nonfinite(huge) == 0
        assert len(list(stream({"x": torch.zeros(3)}, Recorder({"x": huge})))) == 1

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        odd, even = torch.ones(2).to(dtype), torch.ones(2)
        with pytest.raises(DonorError, match=f"donor tensors must be.*got {dtype} in 'x'"):
            list(stream({"x": even}, Recorder({"x": odd})))
        with pytest.raises(DonorError, match=f"base tensors must be.*got {dtype} in 'x'"):
            list(stream({"x": odd}, Recorder({"x": even})))

    def test_progress(self, capsys: pytest.CaptureFixture[str]) -> None:
        list(stream(self.BASE, Recorder(TENSORS), show_progress_bar=True))
        assert "reading recorder" in capsys.readouterr().err
        list(stream(self.BASE, Recorder(TENSORS)))
        assert capsys.readouterr().err == ""


def test_nothing_to_graft_says_what_was_compared() -> None:
    error = nothing_to_graft(Recorder(TENSORS), 12345)
    assert isinstance(error, DonorError)
    assert "'recorder'" in str(error) and "12,345 entries" in str(error) and "nothing to graft" in str(error)
