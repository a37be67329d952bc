"""Bring the active patches into a layer's forward, by one of three strategies.

In place, where no gradient is wanted: `PatchLease` writes the entries into the parameters. The base's bits return when
the layer has run, while its parameters are in the processor's cache. Where the layers run again in the same call, as in
`generate`, and inside of `model.applied()`, they return when that ends. With a sparse gradient,
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
    uncompiled,
)
from .per_row import run_by_row
from .sparse_grad import SparseGrad, is_simple, patched_run

if TYPE_CHECKING:
    from ..layer import GraftLayer
    from ..mask import GraftStates


class AppliedScope:
    """A call of a model, in the thread that makes it, and the patches that stay in place until it ends.

    They stay as soon as a layer runs again, as it does for every token that `generate` adds.

    Args:
        states: The states that the model's layers share.
        may_keep: Whether patches may stay; False where an engine frees the parameters of a module that has run.
    """

    def __init__(self, states: GraftStates, may_keep: bool) -> None:
        self.states, self._may_keep, self._keeps = states, may_keep, False
        self.version = states.version  # of the patches that are in place
        self._leases: dict[GraftLayer, PatchLease] = {}  # empty where the layer's patch cannot be in place
        self._names: list[tuple[GraftLayer, list[str]]] = []
        self._ran: set[GraftLayer] = set()

    def has(self, layer: GraftLayer) -> bool:
        """Return whether the layer's parameters carry the active patches until the call ends; to be asked when it runs.

        They are written where they are to stay and can.
        """
        if layer in self._ran:  # a new pass through the model: what the layers share may have changed
            self._ran.clear()
            self._keeps = self._may_keep
            self.states.look()
        self._ran.add(layer)
        if self.version != self.states.version:
            self.release()
            self.version = self.states.version
        return self._keeps and self._write(layer)

    def keep(self, layers: Iterable[GraftLayer]) -> None:
        """Patch these layers at once, and let all patches stay until the call ends."""
        self._keeps = self._may_keep
        with torch.no_grad():
            for layer in layers if self._keeps else ():
                self._write(layer)

    def _write(self, layer: GraftLayer) -> bool:
        lease = self._leases.get(layer)
        if lease is None:
            lease = self._leases[layer] = PatchLease()
            if acquire(layer, lease):
                names = list(layer.active_adapters)
                self._names.append((layer, names))
                layer.applied_names.append(names)
            else:
                lease.release()
        return bool(lease)

    def release(self) -> None:
        """Put the base's bits back; doing so twice does nothing."""
        leases = list(self._leases.values())
        try:
            for lease in leases:
                lease.release()
        finally:
            for lease in leases:
                lease.release()  # once more, because an interrupt may end the first
            for layer, names in self._names:
                layer.applied_names[:] = [others for others in layer.applied_names if others is not names]
        self._leases, self._names = {}, []


@contextmanager
def applied(states: GraftStates, model: nn.Module, layers: Iterable[GraftLayer] | None = None) -> Iterator[None]:
    """Open a call of a model; calls inside of it share its patches.

    Args:
        states: The states that the model's layers share.
        model: The model that holds the layers.
        layers: Layers to patch at once, so that also a forward that is compiled inside finds them patched, and to keep
            patched until the call ends; None for a single forward pass, in which each layer is patched while it runs.
    """
    if is_traced():
        yield
        return
    states.look()
    thread = threading.get_ident()
    outer = states.scopes.get(thread)
    if outer is not None:
        if layers is not None:
            outer.keep(layers)
        yield
        return
    scope = AppliedScope(states, may_keep=not frees_parameters(model))
    try:
        states.scopes[thread] = scope
        if layers is not None:
            scope.keep(layers)
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


def acquire(layer: GraftLayer, lease: PatchLease) -> bool:
    """Write the active patches into all parameters of a layer, also none, so that nobody else writes meanwhile.

    Args:
        layer: The layer.
        lease: Takes the parameters, one by one, so that they can be released whatever happens.

    Returns:
        Whether all parameters have theirs.
    """
    if layer.disable_adapters or layer.rows is not None or not is_simple(layer.get_base_layer()):
        return False
    layer.check(None)
    for param, (module, name, patch) in zip(layer.keys, layer.plan(), strict=True):
        parameter = module._parameters[name]
        if parameter is None or not _write(layer, param, parameter, patch, lease):
            return False
    return True


def _write(
    layer: GraftLayer,
    param: str,
    parameter: torch.Tensor,
    patch: ResolvedTensor,
    lease: PatchLease,
    adapter_names: list[str] | None = None,
) -> bool:
    """Write a patch into one parameter, resolved anew where the base has changed since."""
    if not can_write(parameter):
        return False
    if patch.expected is None:
        return lease.acquire(parameter, patch)
    if not parameter.is_cpu:
        # Comparing with the base would wait for the device; computing the values again does not.
        return lease.acquire(parameter, layer.resolve(param, adapter_names)._replace(expected=None))
    return lease.acquire(parameter, patch) or lease.acquire(parameter, layer.resolve(param, adapter_names))


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
        scope = layer.states.scopes.get(threading.get_ident())
        if scope is None:
            layer.states.look()
        elif scope.has(layer):
            return layer.get_base_layer()(*args, **kwargs)
        lease = PatchLease()
        try:
            if acquire(layer, lease):
                return layer.get_base_layer()(*args, **kwargs)
        finally:
            lease.release()
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
    lease = PatchLease()
    shadows: list[tuple[dict[str, Any], str]] = []
    try:
        for param in layer.keys:
            parameter = layer.base_parameter(param)
            if in_place:
                patch = layer.resolve(param, adapter_names)
                if _write(layer, param, parameter, patch, lease, adapter_names):
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
            lease.release()
