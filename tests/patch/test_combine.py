"""Patches to patches, against slow loops over dense tensors, and the laws that hold whatever the patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grafts import same_bits
from peft_graft.patch.combinations import COMBINATIONS
from peft_graft.patch.combine import apply_alpha, conflicts, intersection, stitch, subtract, union
from peft_graft.patch.patch import Patch, PatchError, TensorPatch

SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "b.weight": (2, 2)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def patch_of(entries: dict[str, dict[int, float]], dtype: torch.dtype = torch.float32) -> Patch:
    """A patch from {tensor: {index: value}}."""
    tensors = {
        name: TensorPatch(torch.tensor(sorted(by)), torch.tensor([by[i] for i in sorted(by)], dtype=dtype))
        for name, by in entries.items()
        if by
    }
    return Patch(tensors, SHAPES)


def entries_of(patch: Patch) -> dict[tuple[str, int], float]:
    return {
        (name, index): value
        for name, part in patch.tensors.items()
        for index, value in zip(part.indices.tolist(), part.values.tolist(), strict=True)
    }


def assert_same(one: Patch, other: Patch) -> None:
    assert one.tensors.keys() == other.tensors.keys()
    for name, part in one.tensors.items():
        assert torch.equal(part.indices, other.tensors[name].indices), name
        assert same_bits(part.values, other.tensors[name].values), name


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.1, 1e-6, 3e4, -3e4]  # zeros of both signs, equal numbers, and ones far apart


def numbers(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """One number for every entry, a few of them special."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(math.prod(shape) for shape in SHAPES.values())
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (size,), generator=generator)]
    usual = torch.randn(size, generator=generator)
    return torch.where(torch.rand(size, generator=generator) < 0.5, special, usual).to(dtype)


def split(flat: torch.Tensor) -> dict[str, torch.Tensor]:
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    return {name: part.view(SHAPES[name]) for name, part in zip(SHAPES, flat.split(sizes), strict=True)}


def masked(flat: torch.Tensor, mask: int) -> Patch:
    """A patch of the entries whose bit is set."""
    bits = split(torch.tensor([bool(mask >> i & 1) for i in range(len(flat))]))
    return Patch(
        {
            name: TensorPatch(bits[name].flatten().nonzero().flatten(), part[bits[name]])
            for name, part in split(flat).items()
            if bits[name].any()
        },
        SHAPES,
    )


@st.composite
def several(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], list[Patch], list[float]]:
    dtype = draw(st.sampled_from(DTYPES))
    seed, masks = draw(st.integers(0, 2**32)), draw(st.lists(st.integers(0, 2**19 - 1), min_size=1, max_size=4))
    found = [masked(numbers(seed + i + 1, dtype), mask) for i, mask in enumerate(masks)]
    weights = [draw(st.sampled_from([1.0, 1.0, 0.5, -1.0, 0.3, 0.0, 2.0])) for _ in found]
    return split(numbers(seed, dtype)), found, weights


def loop(base: dict[str, torch.Tensor], found: Sequence[Patch], weights: Sequence[float], kind: str) -> Patch:
    """What `stitch` must give, one entry at a time and with no help from it."""
    f32 = np.float32
    stitched: dict[str, dict[int, float]] = {name: {} for name in SHAPES}
    lookup = [entries_of(patch) for patch in found]
    for name, tensor in base.items():
        for index, start in enumerate(tensor.flatten().tolist()):
            takers = []
            for by, weight in zip(lookup, weights, strict=True):
                if (name, index) in by:
                    value = by[name, index]
                    with np.errstate(all="ignore"):
                        moved = f32(start) + f32(weight) * (f32(value) - f32(start))
                    takers.append(value if weight == 1 else float(moved))
            if kind == "disjoint" and len(takers) != 1:
                continue
            if kind == "ties":
                elected = np.sign(sum(sorted(taker - start for taker in takers)))
                takers = [taker for taker in takers if np.sign(taker - start) == elected]
            if not takers:
                continue
            summed = reduce(lambda x, y: x + y, sorted(takers))
            if kind in ("mean", "ties"):
                stitched[name][index] = summed / len(takers)
            else:
                stitched[name][index] = summed - (len(takers) - 1) * start if len(takers) > 1 else summed
    return patch_of(stitched, next(iter(base.values())).dtype)


# Stitching


@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("kind", sorted(COMBINATIONS))
@given(data=several())
def test_stitching_is_the_loop_over_all_entries(kind: str, data: tuple) -> None:
    base, found, weights = data
    wanted = loop(base, found, weights, kind)
    if not all(part.values.isfinite().all() for part in wanted.tensors.values()):
        with pytest.raises(PatchError, match="must be finite"):
            stitch(found, weights, kind, base=base)
        return
    result = stitch(found, weights, kind, base=base)
    assert_same(result, wanted)
    result.validate()


@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("kind", sorted(COMBINATIONS))
@given(data=several())
def test_stitching_does_not_depend_on_the_order(kind: str, data: tuple) -> None:
    base, found, weights = data
    results = []
    for order in permutations(range(len(found))):
        try:
            results.append(stitch([found[i] for i in order], [weights[i] for i in order], kind, base=base))
        except PatchError:
            results.append(Patch({}))
    for other in results[1:]:
        assert_same(results[0], other)


@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("kind", sorted(COMBINATIONS))
@given(data=several())
def test_one_patch_stitched_is_itself(kind: str, data: tuple) -> None:
    base, (patch, *_), _ = data
    assert_same(stitch([patch], [1.0], kind, base=base), patch)
    assert_same(stitch([patch], combination_type=kind, base=base), patch)


@settings(max_examples=50, deadline=None)
@given(data=several())
def test_without_conflicts_all_combinations_agree(data: tuple) -> None:
    base, (first, *rest), _ = data
    apart = [first]
    for patch in rest:
        apart.append(subtract(patch, union(apart)))
    assert conflicts(apart) == {}
    wanted = union(apart)
    for kind in COMBINATIONS:
        assert_same(stitch(apart, combination_type=kind, base=base), wanted)


@settings(max_examples=50, deadline=None)
@given(data=several())
def test_the_mean_with_weights_of_1_is_the_union(data: tuple) -> None:
    base, found, _ = data
    assert_same(stitch(found, combination_type="mean", base=base), union(found))


BASE = {"a.weight": torch.zeros(3, 4), "a.bias": torch.tensor([1.0, 2.0, 4.0]), "b.weight": torch.ones(2, 2)}
ONE = patch_of({"a.bias": {0: 2.0, 1: 5.0}, "b.weight": {0: 3.0}})
TWO = patch_of({"a.bias": {0: 5.0, 2: 3.0}, "b.weight": {0: 0.0}})


def test_by_hand() -> None:
    def kind(combination_type: str, *weights: float) -> dict[tuple[str, int], float]:
        return entries_of(stitch([ONE, TWO], list(weights) or None, combination_type, base=BASE))

    apart = {("a.bias", 1): 5.0, ("a.bias", 2): 3.0}
    assert kind("linear") == apart | {("a.bias", 0): 6.0, ("b.weight", 0): 2.0}
    assert kind("mean") == apart | {("a.bias", 0): 3.5, ("b.weight", 0): 1.5}
    assert kind("disjoint") == apart
    assert kind("ties") == apart | {("a.bias", 0): 3.5, ("b.weight", 0): 3.0}  # +2 against -1: the first has the sign
    assert kind("ties", 0.5, -2.0) == {  # -2 * (5 - 1) wins over 0.5 * (2 - 1); both move b upwards
        ("a.bias", 0): -7.0,
        ("a.bias", 1): 3.5,
        ("a.bias", 2): 6.0,
        ("b.weight", 0): 2.5,
    }
    assert kind("linear", 0.5, -1.0)["a.bias", 0] == 1 + 0.5 - 4
    assert conflicts([ONE, TWO]) == {"a.bias": 1, "b.weight": 1}


def test_opposite_deltas_elect_no_sign() -> None:
    patches = [patch_of({"a.bias": {0: value, 1: 3.0}}) for value in (3.0, -1.0)]  # base 1: +2 and -2
    assert entries_of(stitch(patches, combination_type="ties", base=BASE)) == {("a.bias", 1): 3.0}


def test_weights_by_tensor() -> None:
    result = stitch([ONE], [{"a.bias": 0.5}], base=BASE)
    assert entries_of(result) == {("a.bias", 0): 1.5, ("a.bias", 1): 3.5, ("b.weight", 0): 3.0}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_base_may_be_a_function(dtype: torch.dtype) -> None:
    base = {name: tensor.to(dtype) for name, tensor in BASE.items()}
    asked: list[tuple[str, list[int]]] = []

    def read(name: str, indices: torch.Tensor) -> torch.Tensor:
        asked.append((name, indices.tolist()))
        return base[name].view(-1)[indices]

    assert_same(stitch([ONE, TWO], [0.3, 0.7], base=read), stitch([ONE, TWO], [0.3, 0.7], base=base))
    assert asked == [("a.bias", [0, 1, 2]), ("b.weight", [0])]


@pytest.mark.parametrize("kind", sorted(COMBINATIONS))
def test_sums_do_not_depend_on_rounding(kind: str) -> None:
    found = [patch_of({"a.bias": {0: value}}) for value in (1e20, -1e20, 1.0)]  # 0 or 1, as "1" comes last or first
    results = {str(entries_of(stitch(list(order), combination_type=kind, base=BASE))) for order in permutations(found)}
    assert len(results) == 1


def test_half_precision_is_rounded_once() -> None:
    """1 + 2^-8 + 2^-8 in bfloat16: each step alone rounds back to 1, the sum does not."""
    base = {"a.bias": torch.ones(3, dtype=torch.bfloat16)}
    step = patch_of({"a.bias": {0: 1 + 2**-7}}, torch.bfloat16)
    once = stitch([step], [0.5], base=base)
    twice = stitch([step, step], [0.5, 0.5], base=base)
    assert entries_of(once) == {("a.bias", 0): 1.0}
    assert entries_of(twice) == {("a.bias", 0): 1 + 2**-7}


def test_the_dtype_is_the_narrowest_that_loses_nothing() -> None:
    patch = patch_of({"a.bias": {0: 1.5}}, torch.bfloat16)
    assert stitch([patch], base=BASE).tensors["a.bias"].values.dtype == torch.bfloat16
    moved = stitch([patch], [0.1], base=BASE).tensors["a.bias"].values
    assert moved.dtype == torch.float32 and moved.item() == pytest.approx(1.05, rel=1e-7)
    wide = patch_of({"a.bias": {0: 1.1}})
    half = {"a.bias": torch.ones(3, dtype=torch.float16)}
    assert same_bits(stitch([wide], base=half).tensors["a.bias"].values, wide.tensors["a.bias"].values)
    assert union([patch, wide]).tensors["a.bias"].values.dtype == torch.float32


# Sets


@settings(max_examples=40, deadline=None)
@given(data=several())
def test_sets_are_the_sets_of_entries(data: tuple) -> None:
    _, found, _ = data
    sets = [entries_of(patch) for patch in found]
    assert entries_of(union(found)).keys() == set().union(*sets)
    assert entries_of(intersection(found)).keys() == set(sets[0]).intersection(*sets)
    left = entries_of(subtract(found[0], found[-1]))
    assert left == {key: value for key, value in sets[0].items() if key not in sets[-1]}
    counted = conflicts(found)
    assert sum(counted.values()) == sum(sum(key in one for one in sets) > 1 for key in set().union(*sets))
    assert all(counted.values())


@settings(max_examples=50, deadline=None)
@given(data=several())
def test_laws_of_sets(data: tuple) -> None:
    _, found, _ = data
    first, last = found[0], found[-1]
    for combine in (union, intersection):
        assert_same(combine([first]), first)
        assert_same(combine([first, first]), first)
        for order in permutations(found):
            assert_same(combine(list(order)), combine(found))
    assert_same(subtract(first, first), Patch({}))
    assert_same(subtract(first, Patch({})), first)
    assert_same(union([subtract(first, last), intersection([first, first])]), first)
    # Inclusion and exclusion.
    parts = (union([first, last]), intersection([first, last]))
    assert sum(part.num_params for part in parts) == first.num_params + last.num_params
    assert intersection([first, last]).num_params == sum(conflicts([first, last]).values())


def test_where_patches_meet_sets_take_the_mean() -> None:
    assert entries_of(union([ONE, TWO])) == {
        ("a.bias", 0): 3.5,
        ("a.bias", 1): 5.0,
        ("a.bias", 2): 3.0,
        ("b.weight", 0): 1.5,
    }
    assert entries_of(intersection([ONE, TWO])) == {("a.bias", 0): 3.5, ("b.weight", 0): 1.5}
    assert union([]).tensors == {}


@settings(max_examples=50, deadline=None)
@given(data=several())
def test_alpha_on_a_patch(data: tuple) -> None:
    base, (patch, *_), _ = data
    assert_same(apply_alpha(patch, 1.0, base), patch)
    nothing = apply_alpha(patch, 0.0, base)
    for name, part in nothing.tensors.items():
        assert torch.equal(part.indices, patch.tensors[name].indices)
        assert torch.equal(part.values, base[name].view(-1)[part.indices])
    assert_same(apply_alpha(patch, 0.3, base), loop(base, [patch], [0.3], "linear"))


def test_shapes_are_kept() -> None:
    one = Patch(ONE.tensors, {name: SHAPES[name] for name in ("a.bias", "b.weight")})
    two = Patch(patch_of({"a.weight": {0: 1.0}}).tensors, {"a.weight": (3, 4)})
    for patch in (union([one, two]), stitch([one, two], base=BASE), intersection([one, two]), subtract(one, two)):
        assert patch.shapes == SHAPES
        patch.validate()
    assert union([one, Patch(two.tensors)]).shapes is None


# Errors

OTHER = Patch({"a.bias": TensorPatch(torch.tensor([4]), torch.ones(1))}, {"a.bias": (5,)})
TORN = Patch({"a.bias": TensorPatch(torch.tensor([1, 0]), torch.ones(2))})


@pytest.mark.parametrize(
    "call",
    [
        lambda patch: union([ONE, patch]),
        lambda patch: intersection([ONE, patch]),
        lambda patch: subtract(ONE, patch),
        lambda patch: conflicts([ONE, patch]),
        lambda patch: stitch([ONE, patch], base=BASE),
    ],
    ids=["union", "intersection", "subtract", "conflicts", "stitch"],
)
def test_patches_must_be_whole_and_of_one_base(call: Callable[[Patch], object]) -> None:
    with pytest.raises(PatchError, match=r"of one base, got .*'a.bias' of shape \(3,\) and \(5,\)"):
        call(OTHER)
    with pytest.raises(PatchError, match="strictly increasing.*'a.bias'"):
        call(TORN)


def test_nothing_has_no_intersection() -> None:
    with pytest.raises(PatchError, match="at least one, got none"):
        intersection([])


def test_all_that_is_wrong_with_the_arguments_is_said_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        stitch([ONE, TWO], [math.nan, "1", True], "sum", base=BASE)
    for words in (
        "combination_type must be one of ['disjoint', 'linear', 'mean', 'ties'], got 'sum'",
        "weights must be one for each of the 2 patches, got 3",
        "weights must be finite numbers, got [nan, '1', True]",
    ):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match=r"finite numbers, got \[inf\]"):
        apply_alpha(ONE, {"a.bias": math.inf}, BASE)


def test_a_base_must_have_the_tensors() -> None:
    with pytest.raises(PatchError, match=r"none for \['b.weight'\] and too few or others for \['a.bias'\]"):
        stitch([ONE, TWO], base={"a.bias": torch.ones(2)})
    with pytest.raises(PatchError, match=r"others for \['a.bias', 'b.weight'\]"):
        stitch([ONE], base={name: tensor.to(torch.int8) for name, tensor in BASE.items()})


def test_an_overflow_is_refused() -> None:
    base = {name: tensor.half() for name, tensor in BASE.items()}
    patch = patch_of({"a.bias": {0: 6e4}, "b.weight": {1: 1.0}}, torch.float16)
    with pytest.raises(PatchError, match=r"must be finite, got an overflow in \['a.bias'\]"):
        stitch([patch], [2.0], base=base)
