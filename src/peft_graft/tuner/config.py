"""GraftConfig: the donor, the budget and the rule of a graft, and the results on record."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from peft.config import PeftConfig
from torch import nn

from ..adapter_files.card import refresh_card
from ..adapter_files.hub_names import strip_local_paths
from ..adapter_files.summary import current_fields
from ..patch.value_codes import VALUE_CODES
from ..peft_compat.register import GRAFT
from ..selection.rules import RULES

VALUES = ("donor", *VALUE_CODES)
_SCOPES = ("global", "tensor")
_GRANULARITIES = ("entry", "tensor", "layer")


@dataclass(frozen=True)
class GraftRecord:
    """Results that the package records in a config, so that a saved adapter is self-contained.

    Args:
        base_subfolder: Folder of the base's directory or repository that holds its checkpoint.
        base_model_type: Type of the base in transformers, such as `"bert"`.
        eligible: Number of entries that the budget is a share of.
        entries: Number of entries taken from the donor.
        fingerprint: Fingerprint of the base at these entries; a config with one belongs to a finished patch.
        hub_ids: Hub ids of the models by the names under which they were loaded; None for a local model that has none.
        provenance: How the patch was made: versions of the packages, or the adapters that it combines.
    """

    base_subfolder: str | None = None
    base_model_type: str | None = None
    eligible: int | None = None
    entries: int | None = None
    fingerprint: dict[str, Any] | None = None
    hub_ids: dict[str, str | None] | None = None
    provenance: dict[str, Any] | None = None


@dataclass
class GraftConfig(PeftConfig):
    """Configuration of a graft: theta = theta_base + alpha * mask * (theta_donor - theta_base), |mask| = budget.

    Args:
        donor: Fine-tuned checkpoint of the base's architecture: a directory or Hub id with safetensors, a module in
            memory, or `"zeros"` (the mask says which base entries become 0, arXiv 2004.14129). Not needed to load a
            saved adapter.
        donor_revision: Revision of a donor on the Hub.
        donor_subfolder: Folder of the donor's directory or repository that holds the checkpoint, such as `"unet"`.
        density: Share of the eligible entries to take from the donor, in (0, 1].
        num_params: The same as an integer; mutually exclusive with `density`.
        selection: Rule that scores the entries: see `peft_graft.RULES`.
        budget_scope: `"global"`, one budget over all targeted tensors, or `"tensor"`, the same density in each.
        granularity: `"entry"`, or whole `"tensor"`s or `"layer"`s.
        candidate_ratio: Number of entries that a learned mask may choose from, as a multiple of the budget, >= 1: the
            entries with the largest |delta|.
        alpha: Scale of the patch: 1 writes the donor's bits; any other number writes base + alpha * (donor - base);
            `"auto"` is fitted by `initialize_graft` on calibration data; `"norm"` is estimated from the norms of the
            delta and of its largest entries, without data. Once known, the number, or one number per tensor.
        values: What is stored of an entry: `"donor"`, the donor's value, or a code of its delta, with which the value
            is float32(base + scale * level): `"sign"` (1 bit; the scale is the mean |delta| of the tensor), `"int4"`
            or `"int8"` (a scale for 128 successive entries). A learned mask is trained with the coded values.
        alpha_scope: What `alpha="auto"` fits: `"global"`, one number, or `"tensor"`, one per tensor.
        target_modules: Names (suffixes) or a regular expression of the modules to graft. Default: every leaf module
            that owns parameters except the embeddings and the head; `"all"` takes these too.
        target_parameters: Names (suffixes) of bare parameters to graft.
        exclude_modules: Names or a regular expression of modules to leave alone.
        modules_to_save: Modules taken whole from the donor and stored with the patch; task heads are added by PEFT.
        layers_to_transform: Indices of the layers to graft.
        layers_pattern: Name of the list of layers, where it is not the first number in the module's name.
        allow_extra: Accept a donor with tensors for which the base has no place, such as further layers, and take only
            what both have.
        seed: Seed of `random` and of everything drawn during selection.
        record: Results that the package records, None before there are any. Not to be passed.

    Raises:
        ValueError: Names all fields that are out of range.
    """

    donor: Any = field(
        default=None, metadata={"help": "Fine-tuned checkpoint: a directory, a Hub id, a module, or 'zeros'."}
    )
    donor_revision: str | None = field(default=None, metadata={"help": "Revision of a donor on the Hub."})
    donor_subfolder: str | None = field(default=None, metadata={"help": "Folder of the donor's checkpoint."})
    density: float | None = field(default=None, metadata={"help": "Share of the eligible entries, in (0, 1]."})
    num_params: int | None = field(default=None, metadata={"help": "The number of entries, instead of density."})
    selection: str = field(default="magnitude", metadata={"help": f"Rule for the entries, one of {sorted(RULES)}."})
    budget_scope: str = field(
        default="global", metadata={"help": "'global': one budget over all tensors; 'tensor': one in each."}
    )
    granularity: str = field(
        default="entry",
        metadata={"help": "Take entries, whole tensors or whole layers."},
    )
    candidate_ratio: float = field(
        default=10.0, metadata={"help": "Entries that a learned mask may choose from, as a multiple of the budget."}
    )
    alpha: Any = field(default=1.0, metadata={"help": "Scale of the patch: a number, or 'auto' to fit it."})
    values: str = field(default="donor", metadata={"help": f"What is stored of an entry, one of {list(VALUES)}."})
    alpha_scope: str = field(default="global", metadata={"help": "Fit one alpha, or one for each tensor."})
    target_modules: Collection[str] | str | None = field(
        default=None, metadata={"help": "Modules to graft; default all but embeddings and head; 'all' for every one."}
    )
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Bare parameters to graft."})
    exclude_modules: Collection[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules taken whole from the donor."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to graft."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    allow_extra: bool = field(
        default=False, metadata={"help": "Accept a donor with more tensors than the base; take only what both have."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the selection."})
    record: GraftRecord | None = field(default=None, metadata={"help": "Results that the package records."})

    # PEFT saves whole embeddings when they are targeted, unless the method is known to store single rows. Not a field.
    trainable_token_indices: ClassVar[dict[str, list[int]]] = {}
    # Whether the next save goes to the Hub, so that it must not name local paths. Not a field.
    for_hub = False

    def __post_init__(self) -> None:
        """Validate all fields, collecting every offender."""
        super().__post_init__()
        self.peft_type = GRAFT
        if isinstance(self.record, Mapping):  # from a file, maybe of a later version with more results
            known = {each.name for each in fields(GraftRecord)}
            self.record = GraftRecord(**{name: value for name, value in self.record.items() if name in known})
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list | tuple):
            self.exclude_modules = set(self.exclude_modules)
        problems = list(self._problems())
        if problems:
            raise ValueError(" ".join(problems))

    def _problems(self) -> Iterator[str]:
        def problem(what: str, constraint: str, remedy: str) -> str:
            return f"{what} must be {constraint}, got {getattr(self, what)!r}. {remedy}"

        if self.density is not None and self.num_params is not None:
            yield (
                f"density and num_params must not both be given, got {self.density!r} and {self.num_params!r}. "
                "Leave one out."
            )
        if self.density is not None and not (_is_number(self.density) and 0 < self.density <= 1):
            yield problem("density", "in (0, 1]", "Give the share of entries to graft.")
        if self.num_params is not None and not (_is_integer(self.num_params) and self.num_params >= 1):
            yield problem("num_params", "an integer >= 1", "Give the number of entries to graft.")
        if (
            self.donor is not None
            and not isinstance(self.donor, str | os.PathLike | nn.Module)
            and not hasattr(self.donor, "get")
        ):
            yield problem("donor", "a directory, a Hub id, a module or 'zeros'", "Pass the fine-tuned checkpoint.")
        for what in ("target_parameters", "modules_to_save"):
            if isinstance(getattr(self, what), str):
                yield problem(what, "a list of names", "Put the name into brackets.")
        rule = RULES.get(self.selection)
        if rule is None and not self.is_pretrained:  # a patch can be loaded without its rule
            yield problem("selection", f"one of {sorted(RULES)}", "Add your own with register_rule.")
        if self.budget_scope not in _SCOPES:
            yield problem("budget_scope", f"one of {list(_SCOPES)}", "Use 'global' for one exact budget.")
        if self.granularity not in _GRANULARITIES:
            yield problem("granularity", f"one of {list(_GRANULARITIES)}", "Use 'entry' for single entries.")
        if not (_is_number(self.candidate_ratio) and self.candidate_ratio >= 1):
            yield problem("candidate_ratio", "a number >= 1", "It multiplies the budget.")
        alphas = self.alpha.values() if isinstance(self.alpha, dict) else [self.alpha]
        if self.alpha not in ("auto", "norm") and not all(_is_number(alpha) for alpha in alphas):
            yield problem(
                "alpha", "a finite number, numbers by tensor name, 'auto' or 'norm'", "1 grafts the donor's values."
            )
        if self.alpha == "norm" and (self.selection != "magnitude" or self.alpha_scope != "global"):
            yield (
                "alpha must be a number or 'auto' but for one scale of a magnitude mask, got 'norm' with "
                f"selection={self.selection!r} and alpha_scope={self.alpha_scope!r}. The estimate holds for that only."
            )
        if self.values not in VALUES:
            yield problem("values", f"one of {list(VALUES)}", "'donor' stores the donor's values.")
        elif self.values != "donor" and self.donor == "zeros":
            yield problem("values", "'donor' with donor='zeros'", "Its values are all 0 and are not stored.")
        if self.alpha_scope not in _SCOPES:
            yield problem("alpha_scope", f"one of {list(_SCOPES)}", "Use 'global' for one alpha.")
        if rule is not None and rule.trains_mask and self.granularity != "entry":
            yield problem("granularity", f"'entry' with selection={self.selection!r}", "Only entries are trained.")
        if self.budget_scope == "tensor" and (self.num_params is not None or self.granularity != "entry"):
            yield problem(
                "budget_scope", "'global' with num_params or a coarser granularity", "Or give a density of entries."
            )
        if self.budget_scope == "tensor" and rule is not None and rule.kind == "procedure":
            yield problem("budget_scope", f"'global' with selection={self.selection!r}", "A procedure has one budget.")
        if not _is_integer(self.seed):
            yield problem("seed", "an integer", "Use 0.")

    @property
    def is_pretrained(self) -> bool:
        """Return whether the config belongs to a finished patch, so that no donor is needed."""
        return self.record is not None and self.record.fingerprint is not None

    @property
    def needs_data(self) -> bool:
        """Return whether `initialize_graft` must see data before the graft is complete."""
        rule = RULES.get(self.selection)
        return self.alpha == "auto" or (rule is not None and rule.needs_data)

    def note(self, **results: Any) -> None:
        """Record results.

        Args:
            results: Fields of `GraftRecord`; the others stay as they are.
        """
        self.record = replace(self.record or GraftRecord(), **results)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a JSON-able dictionary; a donor in memory becomes its name."""
        plain = copy.copy(self)
        if isinstance(plain.donor, nn.Module) or hasattr(plain.donor, "get"):
            from ..checkpoints.pairing import open_donor

            plain.donor = open_donor(plain.donor).name
        elif plain.donor is not None:
            plain.donor = os.fspath(plain.donor)
        result = super(GraftConfig, plain).to_dict()
        for key in ("target_modules", "exclude_modules"):
            if isinstance(result[key], set):
                result[key] = sorted(result[key])
        return result

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and beside an adapter's tensors the model card.

        PEFT writes the configuration last, so this is where the adapter is whole and its card can tell the truth.
        """
        super().save_pretrained(save_directory, **kwargs)
        if self.for_hub:
            strip_local_paths(save_directory)
        refresh_card(save_directory, hub_ids=self.record.hub_ids if self.record else None)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _with_current_fields(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: GraftConfig, *args: Any, **given: Any) -> None:
        init(self, *args, **current_fields(given))

    return __init__


# PEFT hands the fields of a file to the constructor, whichever class is asked to read it.
GraftConfig.__init__ = _with_current_fields(GraftConfig.__init__)  # type: ignore[method-assign]
