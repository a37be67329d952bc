"""PatchedRun: how a wrapped module runs on patched parameters."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ..backends.offloaded import where_it_runs
from ..backends.sharded import UNGATHERED, is_sharded, require_whole
from ..mask import Changes
from .in_place import Hold, any_held, can_write, is_traced, nothing, own_copy, patched_copy, uncompiled
from .per_row import Rows, run_by_row
from .sparse_grad import Part, is_simple, patched_run

if TYPE_CHECKING:
    from ..mask import GraftState, Slot


class _Call:
    """A call of a whole model in one thread: what runs in it again and again may keep its patch until the end."""

    def __init__(self, states: Any, exits: ExitStack) -> None:
        self.states, self.exits = states, exits  # the states tell the model
        self.kept: dict[Any, _Kept | None] = {}  # by layer: None once it has run, then what it keeps


@dataclass
class _Kept:
    """What a call keeps on a layer."""

    made_of: list[Hashable]  # by parameter
    glance: Hashable = None  # equal to the layer's only if that has not changed


class _Calls(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Call] = []


_calls = _Calls()


@contextmanager
def calling(states: Any, layers: Iterable[PatchedRun] = ()) -> Iterator[None]:
    """Let patches stay in place until a model's call ends, instead of being written anew for every token of a text.

    Args:
        states: The states that the model's layers share.
        layers: Layers that will surely run more than once; others keep their patches from the second time on.
    """
    if is_traced():
        yield
        return
    with ExitStack() as exits:
        call = _Call(states, exits)
        _calls.stack.append(call)
        try:
            for layer in layers:
                layer.keep(call)
            yield
        finally:
            _calls.stack.pop()


class PatchedRun:
    """What a `GraftLayer` does in its forward."""

    keys: dict[str, str]
    aliases: dict[str, tuple[Any, str]]  # a GraftLayer and its parameter
    states: dict[str, GraftState]
    rows_by_thread: dict[int, Rows]
    tensor_prefix: str
    _plan: tuple[Hashable, dict[str, tuple[Hashable, Callable[[], Any]]] | None] | None
    kept_by: list[list[str]]  # of each call that keeps patches on the wrapped module: whose
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    @property
    def rows(self) -> Rows | None:
        """The adapter of each row of the batch, while they differ in the call that this thread makes."""
        return self.rows_by_thread.get(threading.get_ident()) if self.rows_by_thread else None

    def _owner(self, param: str) -> tuple[Any, str]:
        """Who holds the patch of a parameter, and under which name."""
        return self.aliases.get(param) or (self, param)

    def has_entries(self, adapter_name: str, param: str) -> bool:
        """Whether an adapter patches this parameter."""
        owner, owned = self._owner(param)
        slot = owner.slots.get(adapter_name)
        return slot is not None and owner.keys[owned] in slot.params

    def effective_adapters(self, param: str, adapter_names: list[str] | None = None) -> list[str]:
        """Which of these adapters (None: the active ones) are still to patch the parameter."""
        owner, _ = self._owner(param)
        if owner.merged or owner.disable_adapters:
            return []
        names = owner.active_adapters if adapter_names is None else adapter_names
        return [name for name in names if self.has_entries(name, param)]

    def effective_entries(self, param: str, adapter_names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """What these adapters, which all have entries, put where: indices int64 [n], values [n] in the base's dtype."""
        owner, owned = self._owner(param)
        self._require_whole(param)
        # Whether gradients are wanted, not the mode, decides: masks can be trained in evaluation mode, without dropout.
        found = owner.joint_entries(adapter_names, owned, training=torch.is_grad_enabled())
        return cast(tuple[torch.Tensor, torch.Tensor], found)

    def effective_part(self, param: str, adapter_names: list[str]) -> Part:
        """The same for a kernel, which writes no candidates that are not taken."""
        owner, owned = self._owner(param)
        self._require_whole(param)
        alone = owner.candidates(adapter_names[0], owned) if len(adapter_names) == 1 else None
        if alone is not None:
            return cast(Part, alone)
        indices, values = self.effective_entries(param, adapter_names)
        return Part(indices, values, indices, values.detach())

    def effective(self, param: str, adapter_names: list[str] | None = None) -> torch.Tensor | None:
        """The parameter with these patches (None: the active ones) on it, or None where that is the base's own."""
        if torch.compiler.is_compiling() and self.kept_by:
            return None if self._is_bare(adapter_names) else uncompiled(self.effective, param, adapter_names)
        parameter, names = self.base_parameter(param), self.effective_adapters(param, adapter_names)
        return patched_copy(parameter, *self.effective_entries(param, names)) if names else own_copy(parameter)

    def can_hold(self) -> bool:
        """Whether the patches may stay in place beyond one forward."""
        parameters = [self.base_parameter(param) for param in self.keys]
        free = all(can_write(parameter) and not is_sharded(parameter) for parameter in parameters)
        return free and is_simple(self.get_base_layer()) and self.rows is None and not self.disable_adapters

    def keep(self, call: _Call) -> None:
        """Patch until the end of a call, where that is possible."""
        if not self.can_hold():
            return
        with ExitStack() as undo, torch.no_grad():
            made_of = self._all_made_of()
            module = undo.enter_context(self.patched())
            if module is self.get_base_layer() and None not in made_of:  # and not a copy, which takes memory
                call.kept[self] = _Kept(made_of)
                self.kept_by.append([*self.active_adapters])
                undo.callback(self.kept_by.pop)
                call.exits.push(undo.pop_all())

    def _is_kept(self) -> bool:
        """Whether the wrapped module has the patches of the active adapters on it until the end of the call."""
        call = _calls.stack[-1] if _calls.stack else None
        if call is None or call.states is not self.states or self.disable_adapters or torch.is_grad_enabled():
            return False
        if self not in call.kept:
            call.kept[self] = None
        elif call.kept[self] is None:
            self.keep(call)
        return self._is_as(call.kept[self])

    def _is_as(self, kept: _Kept | None) -> bool:
        if kept is None:
            return False
        glance = self._glance()  # before the thorough look, which takes several times as long
        if glance is None or glance != kept.glance:
            if kept.made_of != self._all_made_of():
                return False
            kept.glance = glance
        return True

    def _glance(self) -> Hashable:
        """Equal only if the active adapters write the same; None where that takes a thorough look."""
        names = self.active_adapters
        alphas = [self.states[name].constant for name in names if name in self.states]
        return None if None in alphas else (Changes.last, *names, *alphas)

    def _is_bare(self, adapter_names: list[str] | None = None) -> bool:
        """Whether the wrapped module as it stands, with the patches that a call keeps, is what is wanted."""
        names = self.active_adapters if adapter_names is None else adapter_names
        switched = self.disable_adapters or self.rows is not None or torch.is_grad_enabled()
        return names == self.kept_by[-1] and not switched

    def _made_of(self, param: str, adapter_names: list[str]) -> Hashable:
        """Equal for what writes the same into the parameter; None where that cannot be told."""
        if not adapter_names:
            return ()
        owner, owned = self._owner(param)
        parts = [owner.made_of(name, owned) for name in adapter_names]
        return None if None in parts else (id(owner), owned, *parts)

    def _all_made_of(self) -> list[Hashable]:
        return [self._made_of(param, self.effective_adapters(param)) for param in self.keys]

    def _up_to_date_plan(self) -> dict[str, tuple[Hashable, Callable[[], Any]]] | None:
        """What `Hold` is told for each parameter, where the active adapters write just what their slots hold."""
        glance = self._glance()
        if glance is None or self.aliases or self.disable_adapters:
            return None
        known = self._plan  # looked at once, because other threads make plans too
        if known is None or known[0] != glance:
            known = self._plan = glance, self._make_plan()
        plan = known[1]
        for param, (_, patch) in (plan or {}).items():
            if patch is not nothing:
                indices, values = patch()
                parameter = self.base_parameter(param)
                if values.dtype != parameter.dtype or indices.device != parameter.device or is_sharded(parameter):
                    return None
        return plan

    def _make_plan(self) -> dict[str, tuple[Hashable, Callable[[], Any]]] | None:
        plan: dict[str, tuple[Hashable, Callable[[], Any]]] = {}
        for param, key in self.keys.items():
            names = self.effective_adapters(param)
            held = self.slots[names[0]] if names else None
            if held is not None:
                entries = self.effective_entries(param, names)
                if entries[0] is not held.indices(key) or entries[1] is not held.values(key):
                    return None
            plan[param] = (self._made_of(param, names), nothing if held is None else functools.partial(held.fixed, key))
        return plan

    @contextmanager
    def patched(self, adapter_names: list[str] | None = None) -> Iterator[nn.Module]:
        """The wrapped module, with parameters patched by these adapters; None for the active ones.

        Where no gradient is wanted, they are patched where they are. Else a patched copy shadows the registered
        parameter as an instance attribute; unlike functional_call this also holds under FSDP.
        """
        self._check(adapter_names)
        module = self.get_base_layer()
        simple = is_simple(module) and not is_traced()
        in_place = simple and not torch.is_grad_enabled()
        plan = self._up_to_date_plan() if in_place and adapter_names is None else None
        holds, shadows = [], []
        try:
            for param in self.keys:
                names = [] if plan is not None else self.effective_adapters(param, adapter_names)
                tensor = None
                if plan is not None:
                    made_of, patch = plan[param]
                elif in_place:
                    made_of = self._made_of(param, names)
                    # Also without a patch, so that no other thread writes one meanwhile.
                    patch = functools.partial(self.effective_entries, param, names) if names else nothing
                if in_place:
                    hold = Hold(self.base_parameter(param), made_of)
                    tensor = hold.write(patch)
                    holds.append(hold)
                elif names or any_held():
                    tensor = self.effective(param, adapter_names)
                if tensor is None:
                    continue
                if simple and module is self.get_base_layer():
                    module = copy.copy(module)  # shares the parameters; other threads do not see the attribute
                inside, _, name = param.rpartition(".")
                holder = module.get_submodule(inside)
                holder.__dict__[name] = where_it_runs(holder, tensor)
                shadows.append((holder.__dict__, name))
            yield module
        finally:
            for attributes, name in shadows:
                del attributes[name]
            for hold in holds:
                hold.erase()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module on patched parameters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if torch.compiler.is_compiling() and self.kept_by:  # what is compiled cannot tell own bits from a patch's
            run = self.get_base_layer() if self._is_bare() else functools.partial(uncompiled, self.forward)
            return run(*args, **kwargs)
        if self.merged and not self.aliases and not any_held():
            return self.get_base_layer()(*args, **kwargs)
        if self.rows is not None and not self.disable_adapters:
            return run_by_row(
                lambda name, *own, **named: self._run([name], own, named),
                self.rows, args, kwargs, self.tensor_prefix, self._patches,
            )  # fmt: skip
        if not is_traced() and self._is_kept():
            return self.get_base_layer()(*args, **kwargs)
        return self._run([] if self.disable_adapters else None, args, kwargs)

    def _run(self, adapter_names: list[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled() and not is_traced() and len(args) == 1 and not kwargs:
            module = self.get_base_layer()
            run = patched_run(module)
            names = self.effective_adapters("weight", adapter_names) if run else []  # others may have no weight
            if run and names:
                self._check(adapter_names)
                biases = self.effective_adapters("bias", adapter_names) if "bias" in self.keys else []
                bias = self.effective_part("bias", biases) if biases else None
                return run(module, args[0], self.effective_part("weight", names), bias)
        with self.patched(adapter_names) as module:
            return module(*args, **kwargs)

    def _require_whole(self, param: str) -> None:
        owner, owned = self._owner(param)
        held = {owner.tensor_name(owned): self.base_parameter(param)}
        require_whole(held, "patched", UNGATHERED)

    def _patches(self, adapter_name: str) -> bool:
        return any(self.has_entries(adapter_name, param) for param in self.keys)

    def _check(self, adapter_names: list[str] | None) -> None:
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.slots:
                self.states[name].check(name)

    if TYPE_CHECKING:

        @property
        def slots(self) -> dict[str, Slot]: ...
        def base_parameter(self, param: str) -> torch.Tensor: ...
        def get_base_layer(self) -> Any: ...
        def unmerge(self) -> None: ...
