"""Pair the tensors of a base with those of a donor by name, and hand them out one pair at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from huggingface_hub.utils import tqdm

from .donor import (
    FLOAT_DTYPES,
    INDEX_FILE,
    MAX_LISTED,
    WEIGHTS_FILE,
    CheckpointDonor,
    Donor,
    DonorError,
    ModuleDonor,
    ZerosDonor,
    open_donor,
)

__all__ = [
    "FLOAT_DTYPES",
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "Block",
    "CheckpointDonor",
    "Donor",
    "DonorError",
    "ModuleDonor",
    "PairedTensors",
    "Span",
    "Triple",
    "ZerosDonor",
    "bits_differ",
    "count_nonfinite",
    "find_names",
    "nothing_to_graft",
    "open_donor",
    "require_finite",
    "resolve_names",
    "settle_nonfinite",
    "stream",
]

# The names that TensorFlow gave to the parameters of LayerNorm, still found in old BERT checkpoints.
_OLD_NORM_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


T = TypeVar("T")


class Block(NamedTuple):
    """Entries of one tensor that follow each other, in the base and in the donor.

    Attributes:
        name: The tensor's name in the base.
        start: Flat index of the first of them.
        base: The base's values: 1-D, or the whole tensor in its shape.
        donor: The donor's values, of the same shape, in the donor's dtype.
    """

    name: str
    start: int
    base: torch.Tensor
    donor: torch.Tensor


class Span(NamedTuple):
    """The place of a block: the tensor's name in the base, the first entry's flat index, and the number of entries."""

    name: str
    start: int
    size: int


class Triple(NamedTuple):
    """One tensor of the base beside the donor's.

    Attributes:
        name: The tensor's name in the base.
        base: The base's tensor, as it was given.
        donor: The donor's tensor of the same shape, on the CPU, in the donor's dtype.
    """

    name: str
    base: torch.Tensor
    donor: torch.Tensor


def resolve_names(
    wanted: Mapping[str, tuple[int, ...]],
    donor: Donor,
    prefixes: Sequence[str] = (),
    aliases: Mapping[str, Sequence[str]] | None = None,
    are_saved_whole: bool = False,
) -> dict[str, str]:
    """Find the donor's tensor for every wanted tensor of the base.

    Args:
        wanted: Shape of each wanted base tensor, by name.
        donor: Where to look. `ZerosDonor` has every name.
        prefixes: Module prefixes that either side may lack, such as `("bert",)` for `bert.encoder.x` and `encoder.x`.
        aliases: Other names of the same base parameter (tied weights), used where the donor lacks the first.
        are_saved_whole: Whether the tensors are wanted because of `modules_to_save`, for the remedy in errors.

    Returns:
        Base tensor name -> donor tensor name, with the same keys as `wanted`.

    Raises:
        DonorError: If tensors are missing or have another shape; all of them are looked at first, so that the message
            can tell another architecture from a resized vocabulary.
    """
    if isinstance(donor, ZerosDonor):
        return {name: name for name in wanted}
    found = find_names(wanted, donor, prefixes, aliases)
    missing = sorted(wanted.keys() - found.keys())
    misfits = {
        name: (tuple(wanted[name]), tuple(donor.shape(found[name])))
        for name in sorted(found)
        if tuple(donor.shape(found[name])) != tuple(wanted[name])
    }
    if missing or misfits:
        raise DonorError(_misfit_message(donor, len(wanted), missing, misfits, are_saved_whole))
    return found


def find_names(
    wanted: Iterable[str],
    donor: Donor,
    prefixes: Sequence[str] = (),
    aliases: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, str]:
    """Find the donor's tensors as `resolve_names` does, but leave out what the donor lacks, and look at no shapes.

    Args:
        wanted: Names of tensors of the base.
        donor: As in `resolve_names`.
        prefixes: As in `resolve_names`.
        aliases: As in `resolve_names`.

    Returns:
        Base tensor name -> donor tensor name.
    """
    present, wanted = set(donor.names()), set(wanted)
    aliases = aliases or {}
    found = {name: name for name in wanted if name in present}
    # A tensor that bears a wanted name is that tensor, never a stand-in for another.
    free = present - found.keys()
    for name in sorted(wanted - found.keys()):
        others = aliases.get(name, ())
        spelled = {spelling for other in others for spelling in _spellings(other, prefixes)}
        candidates = (c for known in (name, *others) for c in _spellings(known, prefixes))
        match = next((c for c in candidates if c in free or (c in spelled and c in present)), None)
        if match is not None:
            found[name] = match
            free.discard(match)
    return found


class PairedTensors:
    """Tensors of a base in memory beside those of a donor, handed out whole and one at a time.

    Args:
        base: Floating-point tensors by name, each looked up when its turn comes.
        donor: Where the other side comes from.
        names: Base tensor name -> donor tensor name, from `resolve_names`.
        sizes: Number of entries of each tensor of the base, by name.
        show_progress_bar: Show a progress bar in every pass.

    Attributes:
        sizes: Number of entries by name, in increasing order.
        whole_tensors: True: a block is a whole tensor.
        with_unchanged_nan: Names of the tensors seen to have the same NaN or Inf in the base and in the donor.
    """

    whole_tensors = True

    def __init__(
        self,
        base: Mapping[str, torch.Tensor],
        donor: Donor,
        names: Mapping[str, str],
        sizes: Mapping[str, int],
        show_progress_bar: bool = False,
    ) -> None:
        self._base, self._donor, self._names = base, donor, names
        self._show_progress_bar = show_progress_bar
        self.with_unchanged_nan: set[str] = set()
        self.sizes = dict(sorted(sizes.items()))

    def map(
        self, work: Callable[[Block], T], names: Iterable[str] | None = None, workers: int | None = None
    ) -> Iterator[tuple[Span, T]]:
        """Call a function on every tensor that has entries, in the caller's thread; as `PairedReader.map`.

        Args:
            work: The function.
            names: Tensors to go through; None for all.
            workers: Not used: operations on whole tensors use all cores.

        Yields:
            For each tensor, in order of the names: its span, and the result of `work`.

        Raises:
            DonorError: As `stream` does.
        """
        wanted = self._names if names is None else {name: self._names[name] for name in names}
        for name, base, donor in stream(self._base, self._donor, wanted, self._show_progress_bar):
            if base.numel():
                yield Span(name, 0, base.numel()), work(Block(name, 0, base.detach(), donor))

    def delta(self, block: Block) -> torch.Tensor:
        """Compute donor - base of a tensor, in float32, on the base's device; 0 where both have the same NaN or Inf."""
        base = block.base.float() if block.base.dtype == torch.float64 else block.base
        delta = block.donor.to(base.device, torch.float32, copy=True).sub_(base)
        return settle_nonfinite(block, delta, self.with_unchanged_nan)


def stream(
    base: Mapping[str, torch.Tensor],
    donor: Donor,
    names: Mapping[str, str] | None = None,
    show_progress_bar: bool = False,
) -> Iterator[Triple]:
    """Yield the base's tensors beside the donor's, one at a time.

    Args:
        base: Floating-point tensors by name. With `names` each is looked up once, when its turn comes, so the mapping
            may be a lazy one.
        donor: Where the other side comes from; no more than one of its tensors is held at a time.
        names: Base tensor name -> donor tensor name, from `resolve_names`; by default it is called here.
        show_progress_bar: Show a progress bar.

    Returns:
        An iterator over `Triple`, in sorted order of the base's names.

    Raises:
        DonorError: If the donor does not fit the base (at once), or if a tensor is not of a floating-point dtype, has
            another shape, or holds NaN or Inf (when its turn comes).
    """
    if names is None:
        names = resolve_names({name: tuple(tensor.shape) for name, tensor in base.items()}, donor)
    return _triples(base, donor, names, show_progress_bar)


def count_nonfinite(tensor: torch.Tensor) -> int:
    """Count the NaN and infinite entries of a floating-point tensor."""
    # One reading pass settles the usual case: a finite sum has only finite terms. A sum may overflow, hence the count.
    sum_of_all = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return 0 if bool(torch.isfinite(sum_of_all)) else int((~torch.isfinite(tensor)).sum())


def require_finite(name: str, base: torch.Tensor, donor: torch.Tensor, donor_name: str = "") -> None:
    """Refuse a donor's tensor that has NaN or Inf where the base has other values.

    Where the base has the same, as in padding rows that no training touches, there is nothing to refuse.

    Args:
        name: The tensor's name.
        base: The base's values.
        donor: The donor's values, of the same shape, on the CPU.
        donor_name: The donor's name, for the error message.

    Raises:
        DonorError: The donor has such entries.
    """
    if not count_nonfinite(donor):
        return
    base = base.detach().cpu()
    changed = ~donor.isfinite() & bits_differ(base, donor) & ~(base.isnan() & donor.isnan())
    if bad := int(changed.sum()):
        where = f"among {donor.numel():,} entries of {name!r} in {donor_name!r}" if donor_name else f"in {name!r}"
        raise DonorError(
            f"donor tensors must be finite, got {bad:,} NaN or Inf {where}, where the base has other values. "
            "Its training has probably diverged: use an earlier checkpoint."
        )


def settle_nonfinite(block: Block, delta: torch.Tensor, found: set[str]) -> torch.Tensor:
    """Set a delta to 0 where base and donor have the same NaN or Inf, which is no change.

    Args:
        block: The base's and the donor's values.
        delta: donor - base, float32; changed in place.
        found: Gets the name of the block's tensor if it has such entries.

    Returns:
        The delta.

    Raises:
        DonorError: The donor has NaN or Inf where the base has other values.
    """
    # A finite delta has finite ends, so one sum settles the usual case.
    if not delta.numel() or math.isfinite(delta.sum()) or not count_nonfinite(block.donor):
        return delta
    require_finite(block.name, block.base, block.donor)
    found.add(block.name)
    return delta.masked_fill_(~block.donor.isfinite().to(delta.device), 0)


def bits_differ(base: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    """Mark the entries of two floating-point tensors that differ, also in the sign of a zero; bool, of their shape."""
    wide = torch.promote_types(base.dtype, donor.dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[wide.itemsize]
    return base.to(wide).view(integer) != donor.to(wide).view(integer)


def nothing_to_graft(donor: Donor, num_params: int) -> DonorError:
    """Build the error for a donor that equals the base in all eligible entries.

    Args:
        donor: The donor.
        num_params: How many entries were compared.

    Returns:
        The error, for the caller to raise.
    """
    return DonorError(
        f"donor must differ from the base in the targeted modules, got {donor.name!r}, which equals it in all "
        f"{num_params:,} entries: there is nothing to graft. Check that base and donor are not the same checkpoint, "
        "and that target_modules covers what was fine-tuned."
    )


def _triples(
    base: Mapping[str, torch.Tensor], donor: Donor, names: Mapping[str, str], show_progress_bar: bool
) -> Iterator[Triple]:
    for name in tqdm(sorted(names), desc=f"reading {donor.name}", unit="tensor", disable=not show_progress_bar):
        ours = base[name]
        theirs = torch.zeros_like(ours, device="cpu") if isinstance(donor, ZerosDonor) else donor.get(names[name])
        for side, tensor in (("base", ours), ("donor", theirs)):
            if tensor.dtype not in FLOAT_DTYPES:
                raise DonorError(
                    f"{side} tensors must be float64, float32, float16 or bfloat16, got {tensor.dtype} in {name!r}. "
                    "Quantized and integer tensors cannot be grafted: load full-precision weights, or exclude it."
                )
        if theirs.shape != ours.shape:
            raise DonorError(
                f"donor tensors must have the base's shape, got {tuple(theirs.shape)} for {tuple(ours.shape)} in "
                f"{name!r} of {donor.name!r}."
            )
        require_finite(name, ours, theirs, donor.name)
        yield Triple(name, ours, theirs)


def _spellings(name: str, prefixes: Sequence[str]) -> Iterator[str]:
    names = [name]
    for prefix in prefixes:
        dotted = prefix.rstrip(".") + "."
        names.append(name.removeprefix(dotted) if name.startswith(dotted) else dotted + name)
    yield from names
    for new, old in _OLD_NORM_NAMES.items():
        for spelling in names:
            if spelling == new or spelling.endswith("." + new):
                yield spelling.removesuffix(new) + old


def _misfit_message(
    donor: Donor,
    num_wanted: int,
    missing: Sequence[str],
    misfits: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    are_saved_whole: bool,
) -> str:
    first = {name: misfits[name] for name in list(misfits)[:MAX_LISTED]}
    shapes = "; ".join(f"{name}: {ours} in the base, {theirs} in the donor" for name, (ours, theirs) in first.items())
    more = f" and {len(misfits) - MAX_LISTED} more" if len(misfits) > MAX_LISTED else ""
    if not missing and _only_rows_differ(misfits):
        ours, theirs = next(iter(misfits.values()))
        modules = sorted({name.rpartition(".")[0] for name in misfits})
        how = f"modules_to_save without {modules}" if are_saved_whole else f"exclude_modules={modules}"
        return (
            f"donor must have as many rows as the base, got a resized vocabulary (or number of labels), {ours[0]} in "
            f"the base and {theirs[0]} in the donor {donor.name!r} ({shapes}{more}). Resize the base first, with "
            f"resize_token_embeddings({theirs[0]}) or num_labels, or leave the modules out: {how}."
        )
    role, other = ("base", "model") if getattr(donor, "role", "") == "base" else ("donor", "base")
    parts = []
    if missing:
        listed = ", ".join(missing[:MAX_LISTED]) + (", ..." if len(missing) > MAX_LISTED else "")
        parts.append(f"{len(missing)} of {num_wanted} tensors missing ({listed})")
    if misfits:
        parts.append(f"{len(misfits)} of another shape ({shapes}{more})")
    if num_wanted - len(missing) - len(misfits) < num_wanted / 2:
        remedy = "This is not the same architecture: a donor is the same model as the base, fine-tuned."
    else:
        remedy = "Use the checkpoint that was fine-tuned from this base, or leave the modules out with exclude_modules."
    if are_saved_whole:
        remedy = "Take these modules out of modules_to_save, or use a donor that has them in the base's shape."
    kind = "saved" if are_saved_whole else "targeted"
    return f"{role} must hold every {kind} tensor of the {other}, got {donor.name!r} with {', '.join(parts)}. {remedy}"


def _only_rows_differ(misfits: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Say whether all misfits are explained by one changed number of rows, as of a vocabulary."""
    rows = {(ours[:1], theirs[:1]) for ours, theirs in misfits.values()}
    return len(rows) == 1 and all(len(a) == len(b) in (1, 2) and a[1:] == b[1:] for a, b in misfits.values())
