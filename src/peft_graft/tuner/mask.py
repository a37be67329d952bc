"""Hold the entries of each adapter, and train the mask over a learned graft's candidates.

The mask is straight-through in training and exact in evaluation.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..checkpoints.donor import MAX_LISTED
from ..patch.value_codes import VALUE_CODES, ScaledTensor, TensorPatch, ValueCode
from ..peft_compat.torch_names import version_of
from ..selection.topk import SelectionError, top_k_mask
from .backends import collectives
from .backends.sharded import copy_into, is_partitionable, is_sharded, whole, whole_shape

if TYPE_CHECKING:
    from .apply.forward import AppliedScope
    from .config import GraftConfig


_versions = itertools.count(1)  # of all models together, so that no two patches have the same number


class GraftStates(dict[str, "GraftState"]):
    """The state of each adapter by name, shared by all layers of one model.

    `version` changes with every event after which a layer may have to write something else: adapters that are switched,
    enabled, added or deleted, patches that are installed, a mask or an alpha that is another one now, a model that
    moves. Layers resolve their patches anew when it has changed, and only then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.version = next(_versions)
        self.scopes: dict[int, AppliedScope] = {}  # by thread: the call that keeps patches in place
        self._alphas: dict[str, Any] = {}

    def changed(self) -> None:
        """Let every layer resolve its patch anew."""
        self.version = next(_versions)

    def look(self) -> None:
        """Look for changes that nobody announces: numbers in a config, and logits that an optimizer has moved."""
        found, known = {name: state.alpha for name, state in self.items()}, self._alphas
        alphas = {name: dict(alpha) if isinstance(alpha, dict) else alpha for name, alpha in found.items()}
        if alphas.keys() != known.keys() or any(_differ(alpha, known[name]) for name, alpha in alphas.items()):
            self._alphas = alphas
            self.changed()
        for state in self.values():
            state.look()

    def __setitem__(self, adapter_name: str, state: GraftState) -> None:
        """Add an adapter's state, which announces from now on when its masks have changed."""
        super().__setitem__(adapter_name, state)
        state.states = self
        self.changed()

    def pop(self, adapter_name: str, *default: Any) -> Any:
        """Remove an adapter's state."""
        self.changed()
        return super().pop(adapter_name, *default)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraftStates:
        """Copy without the calls that run now."""
        clone = GraftStates()
        memo[id(self)] = clone
        for name, state in self.items():
            clone[name] = copy.deepcopy(state, memo)
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the calls that run now."""
        return _make_states, (), None, None, iter(self.items())


def _make_states() -> GraftStates:
    return GraftStates()


def _differ(alpha: Any, other: Any) -> bool:
    if isinstance(alpha, dict) and isinstance(other, dict):
        return alpha.keys() != other.keys() or any(_differ(value, other[name]) for name, value in alpha.items())
    return isinstance(alpha, torch.Tensor) or isinstance(other, torch.Tensor) or alpha != other


class Slot(nn.Module):
    """The entries of one adapter in one layer: per parameter flat indices, their values, and logits of a mask.

    Values are the donor's, or levels and scales of a code, with which the layer computes them from the base.

    A parameter without entries has no tensors here, so nothing of size zero is ever registered.
    """

    def __init__(self, eligible: tuple[str, ...]) -> None:
        super().__init__()
        self.eligible = eligible
        self.params: list[str] = []
        self.codes: dict[str, ValueCode] = {}
        self.in_steps: set[str] = set()  # parameters of which the file holds the whole donor as steps from the base
        self.version = next(_versions)  # changes with the entries
        self._shards: dict[str, nn.Parameter] = {}

    def install(self, param: str, part: TensorPatch | ScaledTensor, logits: torch.Tensor | None = None) -> None:
        """Hold these entries for `param`, in place where the shapes allow it, so that optimizers keep their hold.

        Args:
            param: Key of the parameter.
            part: The entries; with logits, plain ones.
            logits: Mask logits, float32 [n]; None for a fixed mask.
        """
        held = self.logits(param)
        if logits is not None and held is not None and whole_shape(held) == logits.shape:
            copy_into(held, logits)
        elif logits is not None:
            self.remove(param)
            self.register_parameter(f"{param}_logits", nn.Parameter(logits.detach().clone().float()))
        else:
            self.remove(param)
        self.register_buffer(f"{param}_indices", part.indices)
        if isinstance(part, ScaledTensor):
            self.codes[param] = part.value_code
            self.register_buffer(f"{param}_levels", part.levels)
            self.register_buffer(f"{param}_scales", part.scales)
        else:
            self.register_buffer(f"{param}_values", part.values)
        self.version = next(_versions)
        if param not in self.params:
            self.params = sorted([*self.params, param])

    def remove(self, param: str) -> None:
        """Forget the entries of `param`, if any."""
        for kind in self.tensors(param):
            delattr(self, f"{param}_{kind}")
        self.codes.pop(param, None)
        self.in_steps.discard(param)
        self._shards.pop(f"{param}_logits", None)
        self.version = next(_versions)
        self.params = [name for name in self.params if name != param]

    def tensors(self, param: str) -> dict[str, torch.Tensor]:
        """Return the tensors held for `param`, by kind."""
        kinds = ("indices", "values", "levels", "scales", "logits")
        return {kind: getattr(self, f"{param}_{kind}") for kind in kinds if hasattr(self, f"{param}_{kind}")}

    def indices(self, param: str) -> torch.Tensor:
        """Return the flat indices of `param`, int64 [n]."""
        return cast(torch.Tensor, self._buffers[f"{param}_indices"])

    def values(self, param: str) -> torch.Tensor:
        """Return the donor's values of `param`, float [n], which is not in a code."""
        return cast(torch.Tensor, self._buffers[f"{param}_values"])

    def part(self, param: str, device: torch.device) -> TensorPatch | ScaledTensor:
        """Return the entries of `param` on a device: an offloaded base is elsewhere than its patch."""
        indices, code = self.indices(param).to(device), self.codes.get(param)
        if code is None:
            return TensorPatch(indices, self.values(param).to(device))
        levels, scales = (cast(torch.Tensor, self._buffers[f"{param}_{kind}"]) for kind in ("levels", "scales"))
        return ScaledTensor(indices, levels.to(device), scales.to(device), code)

    def logits(self, param: str) -> nn.Parameter | None:
        """Return the mask logits of `param`, float32 [n], or None for a fixed mask."""
        name = f"{param}_logits"
        return self._parameters[name] if name in self._parameters else None  # by [], where ZeRO-3 gathers

    def owned_logits(self, param: str) -> nn.Parameter | None:
        """Return the logits that the optimizer holds: under FSDP2 the shards, also while a forward sees the whole."""
        name = f"{param}_logits"
        return self._shards.get(name, self._parameters.get(name))  # by get, where it does not

    def __setattr__(self, name: str, value: Any) -> None:
        """Remember shards: while a module runs, FSDP2 sets the whole parameter, maybe in half precision, instead."""
        super().__setattr__(name, value)
        if isinstance(value, nn.Parameter) and is_sharded(value):
            self._shards[name] = value

    def _apply(self, fn: Any, recurse: bool = True) -> Slot:
        """Move or cast, but keep scales in float32: the values are computed in it, and rounded once."""
        scales = {name: values for name, values in self._buffers.items() if name.endswith("scales")}
        super()._apply(fn, recurse)
        for name, values in scales.items():
            moved = self._buffers[name]
            if values is not None and moved is not None and moved.dtype != values.dtype:
                self._buffers[name] = values.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Show how many entries each parameter has."""
        return ", ".join(f"{param}: {self.indices(param).numel()}" for param in self.params)


class GraftState:
    """The state of one adapter: its scale, and the one budget that spans the candidates of all layers.

    Args:
        config: The adapter's config: alpha is read from it at every use, so that it can be changed there.
        budget: Number of entries of a learned mask, or one number per tensor name (`scope="tensor"`).
    """

    def __init__(self, config: GraftConfig, budget: int | dict[str, int] | None = None) -> None:
        self.config = config
        self.budget = budget
        self.trial: float | dict[str, torch.Tensor] | None = None  # the alpha that a fit is looking at
        self.awaits_file = False  # whether the patch is still to come from a file
        self.ready = False  # whether the patch is complete, so that it may be saved or merged
        self.donor_outputs: Any = None  # what the donor says about rows of data, see `training.donor_outputs`
        self.waits_for_data = False  # whether there is no patch yet, because its rule needs data
        self.packed: dict[str, torch.Tensor] | None = None  # the tensors of the file, of a patch made without the model
        self._members: dict[str, tuple[Slot, str]] = {}
        self._base: dict[str, torch.Tensor] = {}
        self._masks: dict[str, torch.Tensor] = {}
        self.states: GraftStates | None = None  # those of the model, once it is among them
        self._seen: dict[str, nn.Parameter] = {}  # the logits that the masks were made of
        self._versions = 0
        self._settled: tuple[tuple[int, bool], ...] = ()  # whose they were, if nothing could train meanwhile

    def register(self, name: str, slot: Slot, param: str, base: torch.Tensor) -> None:
        """Let the budget span the logits of this tensor.

        Args:
            name: Name of the tensor.
            slot: Who holds the logits.
            param: Key of the parameter in the slot.
            base: The base's values at the candidates, float [n].
        """
        self._members[name] = (slot, param)
        self._base[name] = base
        self._members = dict(sorted(self._members.items()))
        self.invalidate()

    def clear(self) -> None:
        """Forget all tensors."""
        self._members, self._base = {}, {}
        self.invalidate()

    def invalidate(self) -> None:
        """Forget the mask, for changes of the logits that their version counters do not show."""
        self._seen = {}

    def check(self, adapter_name: str) -> None:
        """Warn or refuse where the adapter runs without its patch.

        Raises:
            RuntimeError: The patch was to come from a file.
        """
        if self.awaits_file:
            raise RuntimeError(
                f"adapter {adapter_name!r} must be loaded from its file before it runs, got none of its tensors. "
                "Load it with PeftModel.from_pretrained, or with load_adapter of a PeftModel."
            )
        if self.waits_for_data:
            self.waits_for_data = False  # once is enough
            warnings.warn(
                f"Adapter {adapter_name!r} has no patch yet, so the model runs as the base: "
                f"selection={self.config.selection!r} waits for data. "
                "Call peft_graft.initialize_graft(model, dataloader) first.",
                stacklevel=2,
            )

    def require_ready(self, done: str) -> None:
        """Refuse what needs a complete patch.

        Args:
            done: What is done with it, as a participle.

        Raises:
            ValueError: The patch waits for data.
        """
        if not self.ready:
            raise ValueError(
                f"graft must be complete before it is {done}, got selection={self.config.selection!r} and "
                f"alpha={self.config.alpha!r} that still wait for data. "
                "Call peft_graft.initialize_graft(model, dataloader)."
            )

    @property
    def alpha(self) -> Any:
        """Return the scale of the patch, or one per tensor name; 1 where `"auto"` is not fitted yet."""
        alpha = self.config.alpha if self.trial is None else self.trial
        return 1.0 if alpha == "auto" else alpha

    def scale(self, name: str) -> float | torch.Tensor:
        """Return alpha of this tensor; a tensor while it is being fitted by gradients."""
        alpha = self.alpha
        return alpha.get(name, 1.0) if isinstance(alpha, dict) else alpha

    @property
    def value_code(self) -> ValueCode | None:
        """Return the code of the values that a learned mask takes; None for the donor's values."""
        return VALUE_CODES.get(self.config.values)

    def logits(self) -> dict[str, nn.Parameter]:
        """Return the mask logits by tensor name."""
        found = {name: slot.owned_logits(param) for name, (slot, param) in self._members.items()}
        return {name: logits for name, logits in found.items() if logits is not None}

    def mask(self, name: str) -> torch.Tensor:
        """Return the exact mask of this tensor's candidates: bool [n], with the budget spent over all tensors.

        Where the logits are sharded they are gathered, so every rank must call this together.
        """
        self.look()
        return self.known_mask(name)

    def look(self) -> None:
        """Make the masks anew where an optimizer, or anybody else, has changed the logits: O(tensors)."""
        if not self._members:
            return
        logits = self.logits()
        same = logits.keys() == self._seen.keys() and all(self._seen[name] is own for name, own in logits.items())
        if not same or sum(map(version_of, logits.values())) != self._versions:
            self._make_masks(logits)

    def known_mask(self, name: str) -> torch.Tensor:
        """Return the same as of the last look: O(1), for layers of a model that has looked when its forward began."""
        slot, param = self._members[name]
        mask, own = self._masks.get(name), slot.owned_logits(param)
        if mask is None or self._seen.get(name) is not own or mask.device != self._index(name).device:
            self._make_masks(self.logits())
        return self._masks[name]

    def _make_masks(self, logits: dict[str, nn.Parameter]) -> None:
        masks = self.masks_of({name: whole(values) for name, values in logits.items()})
        masks = {name: mask.to(self._index(name).device) for name, mask in masks.items()}
        changed, self._masks = not _are_equal(masks, self._masks), masks
        self._seen, self._versions = logits, sum(map(version_of, logits.values()))
        self._settled = () if torch.is_grad_enabled() else self._holders()
        if changed and self.states is not None:
            self.states.changed()

    def start_forward(self) -> None:
        """Look at the logits again: the optimizers of FSDP and DeepSpeed change them without a trace."""
        if collectives.joined() and (torch.is_grad_enabled() or self.settled_masks() is None):
            self.invalidate()

    def change_mode(self) -> None:
        """Look at the logits again: every training loop changes the mode, whatever else it does."""
        if not collectives.joined():  # there `start_forward` does it, and a rank may change its mode alone
            self.invalidate()

    def settle(self) -> None:
        """Make the mask that holds until training goes on, so that one rank can save it alone; called by all ranks."""
        self.invalidate()
        with torch.no_grad():
            for name in self._members:
                self.mask(name)

    def settled_masks(self) -> dict[str, torch.Tensor] | None:
        """Return the masks by tensor name without asking other ranks; None where training may have changed them.

        None also where the logits have been sharded since: before that, a rank may have looked at the model alone.
        """
        return self._masks if self._seen and self._settled and self._settled == self._holders() else None

    def _holders(self) -> tuple[tuple[int, bool], ...]:
        return tuple((id(values), is_partitionable(values)) for values in self.logits().values())

    def note_base(self, name: str, base: torch.Tensor) -> None:
        """Record the base's values at this tensor's entries, float [n]; reading them from shards later is hard."""
        self._base[name] = base

    def base_values(self, name: str) -> torch.Tensor | None:
        """Return the recorded values of the base at this tensor's candidates or entries, float [n], or None."""
        return self._base.get(name)

    def _index(self, name: str) -> torch.Tensor:
        slot, param = self._members[name]
        return slot.indices(param)

    def _magnitude(self, name: str, device: torch.device) -> torch.Tensor:
        slot, param = self._members[name]
        base = self._base[name].to(device)  # a model may move after the patch was made
        if not torch.is_inference_mode_enabled():  # what is made there, autograd would refuse later
            self._base[name] = base
        return (slot.values(param).to(device).float() - base.float()).abs()

    def masks_of(self, logits: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute exact masks of the highest logit * |delta|, ties broken by (tensor name, flat index).

        Logits start at 1, so a learned mask starts as the magnitude mask. The factor keeps an optimizer that moves all
        logits equally fast (Adam) from trading large deltas for small ones.

        Args:
            logits: By tensor name, float32 [n], entries in order of their flat index.

        Returns:
            Bool [n] by tensor name.

        Raises:
            SelectionError: Logits are NaN, or infinite where the delta is 0.
            ValueError: Logits were sharded in a way that cannot be gathered.
        """
        names = sorted(logits)
        partial = [name for name in names if logits[name].shape != self._base[name].shape]
        if partial:
            raise ValueError(
                f"mask logits must be one per candidate, got other shapes in {partial[:MAX_LISTED]} ({len(partial)} "
                "tensors). Shard with FSDP2 (fsdp_version: 2) or DeepSpeed."
            )
        scores = [logits[name] * self._magnitude(name, logits[name].device) for name in names]
        device = scores[0].device
        if torch.stack([score.isnan().any().to(device) for score in scores]).any():  # one wait for the device, not many
            broken = [name for name, score in zip(names, scores, strict=True) if score.isnan().any()]
            raise SelectionError(
                f"mask logits must be finite, got NaN in {broken[:MAX_LISTED]} ({len(broken)} tensors). The training "
                "has diverged: lower the learning rate, or clip the gradients."
            )
        if isinstance(self.budget, dict):
            return {name: top_k_mask(score, self.budget[name]) for name, score in zip(names, scores, strict=True)}
        everything = torch.cat([score.to(device) for score in scores])
        masks = top_k_mask(everything, self.budget or 0).split([score.numel() for score in scores])
        return {name: mask.to(logits[name].device) for name, mask in zip(names, masks, strict=True)}


def _are_equal(masks: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return masks.keys() == others.keys() and all(
        mask.device == others[name].device and torch.equal(mask, others[name]) for name, mask in masks.items()
    )


class _StraightThrough(torch.autograd.Function):
    """Straight-through estimator: the exact mask's values forward, alpha * (donor - base) as the gradient backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, values: torch.Tensor, base: torch.Tensor, donor: torch.Tensor, alpha: float
    ) -> torch.Tensor:
        ctx.alpha = alpha
        ctx.save_for_backward(base, donor)  # both live anyway
        return values

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        base, donor = ctx.saved_tensors
        slope = (donor.float() - base.to(donor.device).float()).mul_(ctx.alpha)
        return slope.mul_(grad), None, None, None, None


def straight_through(
    logits: torch.Tensor, values: torch.Tensor, base: torch.Tensor, donor: torch.Tensor, alpha: float | torch.Tensor
) -> torch.Tensor:
    """Let gradients reach the logits of all candidates, whatever the mask.

    Args:
        logits: Mask logits, float32 [n].
        values: What the candidates are with the exact mask, float [n].
        base: The base's values, float [n].
        donor: The donor's values, float [n].
        alpha: Scale of the patch.

    Returns:
        The values.
    """
    if not isinstance(alpha, torch.Tensor):
        return _StraightThrough.apply(logits, values, base, donor, alpha)
    return values + (logits - logits.detach()) * (alpha * (donor.float() - base.float()))
