"""Bring the active patches into a layer's forward, by one of three strategies.

In place, where no gradient is wanted: `PatchLease` writes the entries into the parameters, and the base's bits return
when the call of the whole model ends (`applied`), or the layer's own where it is called alone. With a sparse gradient,
where a Linear, Conv1D or Embedding runs under autograd: `sparse_grad`. On a patched copy, for anything unusual.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..backends.offloaded import where_it_runs
from ..backends.sharded import frees_parameters
from .in_place import (
    PatchLease,
    ResolvedTensor,
    can_write,
    is_any_applied,
    is_traced,
    own_copy,
    patched_copy,
    release_all,
    uncompiled,
)
from .per_row import run_by_row
from .sparse_grad import SparseGrad, is_simple, patched_run

if TYPE_CHECKING:
    from ..layer import GraftLayer
    from ..mask import GraftStates


class AppliedScope:
    """The patches that stay in place until a model's call ends, in the thread that makes the call.

    A layer's patch is written when the layer runs for the first time, and is there when it runs again, as for every
    token that `generate` adds.

    Args:
        states: The states that the model's layers share.
        keeps: Whether patches may stay; False where an engine frees the parameters of a module that has run.
    """

    def __init__(self, states: GraftStates, keeps: bool = True) -> None:
        self.states, self._keeps = states, keeps
        self.version = states.version  # of the patches that are in place
        self._leases: dict[GraftLayer, list[PatchLease]] = {}  # none where the layer's patch cannot be in place
        self._names: list[tuple[GraftLayer, list[str]]] = []
        self._ran: set[GraftLayer] = set()

    def has(self, layer: GraftLayer) -> bool:
        """Return whether the layer's parameters carry the active patches, after writing them where that is possible."""
        if layer in self._ran:  # a new pass through the model: what the layers share may have changed
            self._ran.clear()
            self.states.look()
        self._ran.add(layer)
        if self.version != self.states.version:
            self.release()
            self.version = self.states.version
        leases = self._leases.get(layer)
        if leases is None and self._keeps:
            leases = self._leases[layer] = []
            self._acquire(layer, leases)
        return bool(leases)

    def _acquire(self, layer: GraftLayer, leases: list[PatchLease]) -> None:
        if layer.rows is not None or layer.disable_adapters or not is_simple(layer.get_base_layer()):
            return
        layer.check(None)
        if lease_all(layer, leases):
            names = list(layer.active_adapters)
            self._names.append((layer, names))
            layer.applied_names.append(names)
        else:
            release_all(leases)
            leases.clear()

    def release(self) -> None:
        """Put the base's bits back; doing so twice does nothing."""
        try:
            release_all([lease for leases in self._leases.values() for lease in leases])
        finally:
            for layer, names in self._names:
                layer.applied_names[:] = [others for others in layer.applied_names if others is not names]
        self._leases, self._names = {}, []


@contextmanager
def applied(states: GraftStates, model: nn.Module, layers: Iterable[GraftLayer] = ()) -> Iterator[None]:
    """Let patches stay in place until a model's call ends; calls inside of it share them.

    Args:
        states: The states that the model's layers share.
        model: The model that holds the layers.
        layers: Layers to patch at once, so that also a forward that is compiled inside finds them patched.
    """
    if is_traced():
        yield
        return
    states.look()
    thread = threading.get_ident()
    if thread in states.scopes:
        yield
        return
    scope = AppliedScope(states, keeps=not frees_parameters(model))
    try:
        states.scopes[thread] = scope
        with torch.no_grad():
            for layer in layers:
                scope.has(layer)
        yield
    finally:
        try:
            _close(scope, thread)
        finally:
            _close(scope, thread)  # once more, because an interrupt may end the first


def _close(scope: AppliedScope, thread: int) -> None:
    try:
        scope.states.scopes.pop(thread, None)
    finally:
        scope.release()


def lease_all(layer: GraftLayer, leases: list[PatchLease]) -> bool:
    """Write the active patches into all parameters of a layer, also none, so that nobody else writes meanwhile.

    Args:
        layer: The layer.
        leases: Takes the leases, one by one, so that they can be released whatever happens.

    Returns:
        Whether all parameters have theirs.
    """
    for param, (module, name, patch) in zip(layer.keys, layer.plan(), strict=True):
        parameter = module._parameters[name]
        if parameter is None or not _lease(layer, param, parameter, patch, leases):
            return False
    return True


def _lease(
    layer: GraftLayer,
    param: str,
    parameter: torch.Tensor,
    patch: ResolvedTensor,
    leases: list[PatchLease],
    adapter_names: list[str] | None = None,
) -> bool:
    """Write a patch into one parameter, resolved anew where the base has changed since."""
    if not can_write(parameter):
        return False
    if patch.expected is not None and parameter.device.type != "cpu":
        # Comparing with the base would wait for the device; computing the values again does not.
        patch = layer.resolve(param, adapter_names)._replace(expected=None)
    lease = PatchLease(parameter)
    leases.append(lease)
    return lease.acquire(patch) or (patch.expected is not None and lease.acquire(layer.resolve(param, adapter_names)))


def run(layer: GraftLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the wrapped module of a layer on patched parameters.

    Args:
        layer: The layer.
        args: Arguments of its forward.
        kwargs: The same by keyword.

    Returns:
        What the wrapped module returns.
    """
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    if torch.compiler.is_compiling() and layer.applied_names:  # what is compiled cannot tell own bits from a patch's
        bare = layer.get_base_layer() if has_active_applied(layer) else None
        return bare(*args, **kwargs) if bare is not None else uncompiled(run, layer, args, kwargs)
    if layer.merged and not layer.aliases and not is_any_applied():
        return layer.get_base_layer()(*args, **kwargs)
    if layer.rows is not None and not layer.disable_adapters:
        return run_by_row(
            lambda name, *own, **named: layer.run_patched([name], own, named),
            layer.rows, args, kwargs, layer.tensor_prefix, layer.patches,
        )  # fmt: skip
    if not torch.is_grad_enabled() and not is_traced():
        scope = layer.states.scopes.get(threading.get_ident()) if layer.states.scopes else None
        if scope is not None and scope.has(layer):
            return layer.get_base_layer()(*args, **kwargs)
    return layer.run_patched([] if layer.disable_adapters else None, args, kwargs)


def has_active_applied(layer: GraftLayer) -> bool:
    """Return whether the wrapped module as it stands carries the active patches, as far as compiled code can tell."""
    names = [] if layer.disable_adapters else layer.active_adapters
    return names == layer.applied_names[-1] and layer.rows is None and not torch.is_grad_enabled()


def run_patched(
    layer: GraftLayer, adapter_names: list[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the wrapped module once with the patches of these adapters, None for the active ones (see `run`)."""
    layer.check(adapter_names)
    if torch.is_grad_enabled() and not is_traced() and len(args) == 1 and not kwargs:
        module = layer.get_base_layer()
        kernel = patched_run(module)
        names = layer.effective_adapters("weight", adapter_names) if kernel else []  # others may have no weight
        if kernel and names:
            biases = layer.effective_adapters("bias", adapter_names) if "bias" in layer.keys else []
            bias = sparse_part(layer, "bias", biases) if biases else None
            return kernel(module, args[0], sparse_part(layer, "weight", names), bias)
    with patched(layer, adapter_names) as module:
        return module(*args, **kwargs)


def sparse_part(layer: GraftLayer, param: str, adapter_names: list[str]) -> SparseGrad:
    """Return the patch of one parameter for a kernel, which writes no candidates that are not taken."""
    owner, owned = layer.owner(param)
    layer.require_whole(param)
    alone = owner.candidates(adapter_names[0], owned) if len(adapter_names) == 1 else None
    if alone is not None:
        return alone
    indices, values = layer.effective_entries(param, adapter_names)
    return SparseGrad(indices, values, indices, values.detach())


def effective(layer: GraftLayer, param: str, adapter_names: list[str] | None = None) -> torch.Tensor | None:
    """Return a copy of a parameter with the patches of these adapters on it, None for the active ones.

    Args:
        layer: The layer.
        param: Parameter of the layer.
        adapter_names: Adapters whose patches to take; None for the active ones.

    Returns:
        The copy; None where the parameter itself, as it stands, is what is wanted.
    """
    if torch.compiler.is_compiling() and layer.applied_names:
        wanted = has_active_applied(layer) if adapter_names is None else False
        return None if wanted else uncompiled(effective, layer, param, adapter_names)
    parameter, names = layer.base_parameter(param), layer.effective_adapters(param, adapter_names)
    return patched_copy(parameter, *layer.effective_entries(param, names)) if names else own_copy(parameter)


@contextmanager
def patched(layer: GraftLayer, adapter_names: list[str] | None = None) -> Iterator[nn.Module]:
    """Give the wrapped module with the patches of these adapters, None for the active ones, on its parameters.

    They are written in place where no gradient is wanted and nobody else can notice. Else a patched copy shadows the
    registered parameter as an instance attribute; unlike `functional_call` this also holds under FSDP.
    """
    layer.check(adapter_names)
    module = layer.get_base_layer()
    simple = is_simple(module) and not is_traced()
    in_place = simple and not torch.is_grad_enabled()
    leases: list[PatchLease] = []
    shadows: list[tuple[dict[str, Any], str]] = []
    try:
        for param in layer.keys:
            parameter = layer.base_parameter(param)
            if in_place:
                patch = layer.resolve(param, adapter_names)
                if _lease(layer, param, parameter, patch, leases, adapter_names):
                    continue
            tensor = effective(layer, param, adapter_names)
            if tensor is None:
                continue
            if simple and module is layer.get_base_layer():
                module = copy.copy(module)  # shares the parameters; other threads do not see the attribute
            inside, _, name = param.rpartition(".")
            holder = module.get_submodule(inside)
            holder.__dict__[name] = where_it_runs(holder, tensor)
            shadows.append((holder.__dict__, name))
        yield module
    finally:
        try:
            for attributes, name in shadows:
                attributes.pop(name, None)
        finally:
            release_all(leases)
