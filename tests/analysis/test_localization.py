"""Where masks live, counted by hand and by a loop over entries, and how much they overlap."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import tiny_bert, tiny_mixtral, tiny_t5, tiny_vit
from peft_graft.analysis.localization import locate, overlap
from peft_graft.analysis.plots import skill_map
from peft_graft.patch.patch import Patch, TensorPatch


def mask_of(**entries: list[int]) -> dict[str, torch.Tensor]:
    return {name.replace("_", "."): torch.tensor(index, dtype=torch.int64) for name, index in entries.items()}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


# Places

MASK = mask_of(net_h_0_fc_weight=[0, 3, 5], net_h_0_fc_bias=[1], net_h_10_norm_weight=[0, 1], net_head_weight=[7])
SHAPES = {
    "net.embed.weight": (9, 2),
    "net.h.0.fc.weight": (2, 3),
    "net.h.0.fc.bias": (2,),
    "net.h.2.fc.weight": (2, 3),
    "net.h.10.norm.weight": (4,),
    "net.head.weight": (2, 9),
}
NAN = float("nan")


def test_counts_by_layer_and_module() -> None:
    place = locate(MASK, SHAPES)
    assert place.layers == ("0", "2", "10", "outside")
    assert place.modules == ("fc", "norm", "net.embed", "net.head")
    wanted = [[4, NAN, NAN, NAN], [0, NAN, NAN, NAN], [NAN, 2, NAN, NAN], [NAN, NAN, 0, 1]]
    np.testing.assert_array_equal(place.counts, np.array(wanted))
    np.testing.assert_array_equal(place.share, np.array(wanted) / 7)
    sizes = [[8, NAN, NAN, NAN], [6, NAN, NAN, NAN], [NAN, 4, NAN, NAN], [NAN, NAN, 18, 18]]
    np.testing.assert_array_equal(place.sizes, np.array(sizes))
    np.testing.assert_array_equal(place.density, np.array(wanted) / np.array(sizes))


def test_without_shapes_only_what_the_mask_has_is_shown() -> None:
    place = locate(MASK)
    assert (place.layers, place.modules) == (("0", "10", "outside"), ("fc", "norm", "net.head"))
    assert np.nansum(place.counts) == 7 and np.isnan(place.sizes).all()


def test_a_patch_brings_its_shapes() -> None:
    patch = Patch({name: TensorPatch(index, torch.ones(len(index))) for name, index in MASK.items()}, SHAPES)
    for name in ("layers", "modules", "counts", "sizes"):
        np.testing.assert_array_equal(getattr(locate(patch), name), getattr(locate(MASK, SHAPES), name))
    assert locate(Patch(patch.tensors)).layers == ("0", "10", "outside")


def test_an_empty_mask_has_no_share_anywhere() -> None:
    place = locate({}, SHAPES)
    assert np.nansum(place.counts) == np.nansum(place.share) == np.nansum(place.density) == 0
    assert locate({}).counts.shape == (0, 0)


@pytest.mark.skipif(transformers.__version__.startswith("5.0."), reason="transformers 5.0 has other names in ViT")
@pytest.mark.parametrize(
    ("make", "layers", "modules"),
    [
        (tiny_bert, ["0", "1", "outside"], ["attention.self.query", "output.LayerNorm", "classifier"]),
        (
            tiny_t5,
            ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1", "outside"],
            ["layer.0.SelfAttention.q", "layer.1.EncDecAttention.q", "shared"],
        ),
        (tiny_mixtral, ["0", "1", "outside"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "lm_head"]),
        (tiny_vit, ["0", "1", "outside"], ["mlp.fc1", "vit.embeddings.cls_token"]),
    ],
    ids=["bert", "t5", "mixtral", "vit"],
)
def test_real_models(make: object, layers: list[str], modules: list[str]) -> None:
    model = make()
    shapes = shapes_of(model)
    everything = {name: torch.arange(value.numel()) for name, value in model.named_parameters()}
    place = locate(everything, shapes)
    assert list(place.layers) == layers
    assert set(modules) <= set(place.modules)
    assert np.nansum(place.counts) == sum(value.numel() for value in model.parameters())
    np.testing.assert_array_equal(place.density[~np.isnan(place.density)], 1.0)
    (image, *_) = skill_map(place.share, place.layers, place.modules).axes[0].images
    np.testing.assert_array_equal(image.get_array().filled(np.nan), place.share)


def test_a_mask_outside_of_the_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of known shape, got \['net.head.weight'\]"):
        locate(MASK, {name: shape for name, shape in SHAPES.items() if "head" not in name})


# Overlap


def test_overlap_by_hand() -> None:
    masks = {
        "a": mask_of(x=[0, 1, 2, 3], y=[5]),
        "b": Patch({"x": TensorPatch(torch.tensor([2, 3, 4]), torch.ones(3))}),
        "c": mask_of(y=[5]),
        "none": {},
    }
    found = overlap(masks)
    assert found.names == ("a", "b", "c", "none")
    assert found.common.tolist() == [[5, 2, 1, 0], [2, 3, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(found.jaccard[:2], [[1, 2 / 6, 1 / 5, 0], [2 / 6, 1, 0, 0]])
    np.testing.assert_array_equal(found.of_smaller[:2], [[1, 2 / 3, 1, NAN], [2 / 3, 1, 0, NAN]])
    np.testing.assert_array_equal(found.of_column[:2], [[1, 2 / 3, 1, NAN], [2 / 5, 1, 0, NAN]])
    assert np.isnan(found.jaccard[3, 3])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("xyz"), st.sets(st.integers(0, 12))), max_size=4))
def test_overlap_is_that_of_sets(drawn: list[dict[str, set[int]]]) -> None:
    sets = [{(name, index) for name, indices in one.items() for index in indices} for one in drawn]
    masks = {str(i): mask_of(**{name: sorted(index) for name, index in one.items()}) for i, one in enumerate(drawn)}
    found = overlap(masks)
    for i, one in enumerate(sets):
        for j, other in enumerate(sets):
            assert found.common[i, j] == len(one & other)
            if one and other:
                assert found.jaccard[i, j] == len(one & other) / len(one | other)
                assert found.of_smaller[i, j] == len(one & other) / min(len(one), len(other))
                assert found.of_column[i, j] == len(one & other) / len(other)
