"""vLLM 0.33's names that `peft_graft.vllm` uses: a stand-in that follows what they do, or the real modules.

vLLM itself needs an accelerator's libraries to import. The real modules of its weight updates do not: they run from an
unpacked wheel, without the `__init__` of the packages that they are in.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

PATCHES = "vllm.model_executor.model_loader.checkpoint_weight_patch"
BASE = "vllm.distributed.weight_transfer.base"
FACTORY = "vllm.distributed.weight_transfer.factory"
SPARSE = "vllm.distributed.weight_transfer.sparse_nccl_engine"
PACKAGES = (
    *("vllm", "vllm.config", "vllm.distributed", "vllm.distributed.weight_transfer"),
    *("vllm.model_executor", "vllm.model_executor.model_loader"),
)
FOLDER = "PEFT_GRAFT_VLLM"


class CheckpointWeightPatch(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None = None


def load_checkpoint_weight_patches(
    model: Any,
    patches: Iterable[CheckpointWeightPatch],
    *,
    max_chunk_bytes: int = 512 << 20,
    validate_unique_indices: bool = True,
) -> set[str]:
    """Load tensors in which NaN stands for "unchanged": what a loader copies replaces everything but those."""
    weights = []
    for patch in patches:
        assert patch.indices is not None and patch.indices.dtype in (torch.int32, torch.int64)
        assert patch.values.dtype == patch.dtype and patch.values.shape == patch.indices.shape
        assert not patch.values.isnan().any()
        assert not validate_unique_indices or patch.indices.unique().numel() == patch.indices.numel()
        flat = torch.full((math.prod(patch.shape),), torch.nan, dtype=patch.dtype)
        flat[patch.indices.long()] = patch.values
        weights.append((patch.name, flat.view(patch.shape)))
    copy = torch.Tensor.copy_

    def keep(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        assert target.shape == source.shape
        return copy(target, torch.where(source.isnan(), target, source.to(target.dtype)))

    torch.Tensor.copy_ = keep  # type: ignore[assignment, method-assign]
    try:
        return set(model.load_weights(weights))
    finally:
        torch.Tensor.copy_ = copy  # type: ignore[method-assign]


class WeightTransferInitInfo:
    pass


class WeightTransferUpdateInfo:
    pass


class WeightTransferEngine:
    init_info_cls: type
    update_info_cls: type

    def __class_getitem__(cls, item: Any) -> type:
        return cls

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        self.model_config, self.device, self.model = vllm_config.model_config, device, model

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            info = self.update_info_cls(**update_info)
        except TypeError as error:
            raise ValueError(f"Invalid update_info: {error}") from error
        self.receive_weights(info)  # type: ignore[attr-defined]


class WeightTransferEngineFactory:
    _registry: dict[str, Callable[[], Any]] = {}

    @classmethod
    def register_engine(cls, name: str, module: str, class_name: str) -> None:
        if name in cls._registry:
            raise ValueError(f"Weight transfer engine '{name}' is already registered.")
        cls._registry[name] = lambda: getattr(importlib.import_module(module), class_name)

    @classmethod
    def create_engine(cls, config: Any, vllm_config: Any, device: Any, model: Any) -> Any:
        return cls._registry[config.backend]()(config, vllm_config, device, model)


@dataclass
class SparseWeightPatch:
    name: str
    indices: torch.Tensor
    values: torch.Tensor
    full_shape: tuple[int, ...]


STAND_IN: dict[str, tuple[Any, ...]] = {
    PATCHES: (CheckpointWeightPatch, load_checkpoint_weight_patches),
    BASE: (WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo),
    FACTORY: (WeightTransferEngineFactory,),
    SPARSE: (SparseWeightPatch,),
}


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take vLLM, and what has imported it, out of the loaded modules for one test."""
    ours = ("peft_graft.vllm.engine", "_peft_graft_vllm")
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm" or name in ours]:
        monkeypatch.delitem(sys.modules, name)


def install_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where vLLM's modules would be."""
    for name in PACKAGES:
        package = ModuleType(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    WeightTransferEngineFactory._registry.clear()
    for name, members in STAND_IN.items():
        module = ModuleType(name)
        vars(module).update({member.__name__: member for member in members})
        monkeypatch.setitem(sys.modules, name, module)


def real_packages(folder: str | os.PathLike[str]) -> dict[str, ModuleType]:
    """Return vLLM's packages from an unpacked wheel, for `sys.modules`, without what their `__init__` would import."""
    packages = {name: ModuleType(name) for name in PACKAGES}
    for name, package in packages.items():
        package.__path__ = [str(Path(folder, *name.split(".")))]
    return packages


def install_real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the packages of an unpacked wheel in place; skip if there is none."""
    folder = os.environ.get(FOLDER)
    if not folder:
        pytest.skip(f"{FOLDER} names no folder with an unpacked wheel of vLLM")
    for name, package in real_packages(folder).items():
        monkeypatch.setitem(sys.modules, name, package)
    for name in (PATCHES, BASE, FACTORY, SPARSE):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            pytest.skip(f"vLLM's modules need {error.name}: pip install --no-deps pyzmq pybase64")
