"""The weight transfer engine `peft_graft`, which vLLM's workers run: it reads skills from files and writes them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.checkpoint_weight_patch import load_checkpoint_weight_patches

from ..workflows.checkpoint_patch import CheckpointEdit, CheckpointPatch
from .patches import checkpoint_weight_patches, read_patch
from .routes import Routes
from .switch import Switch

# A patch of 1e-3 of a 7B model has 56 MB with indices and the base's values.
MAX_CACHED = 32


@dataclass
class GraftInitInfo(WeightTransferInitInfo):
    """Nothing: there is no trainer to meet."""


@dataclass
class GraftUpdateInfo(WeightTransferUpdateInfo):
    """The skill that the model is to have.

    Attributes:
        adapter: Directory or Hub id of the adapter, or directory of its export to vLLM; None for the base.
        revision: Branch, tag or commit of an adapter on the Hub.
    """

    adapter: str | None = None
    revision: str | None = None


class GraftWeightTransferEngine(WeightTransferEngine[GraftInitInfo, GraftUpdateInfo]):
    """Write a skill into a worker's part of the model, in place of the one that is there.

    The model's own loader tells where the entries stand, also where a rank holds a part of a tensor, or a tensor is a
    part of a packed one. Tensors from which it computes something are left to vLLM's loader of sparse patches. Skills
    that were read are kept, `MAX_CACHED` of them.
    """

    init_info_cls = GraftInitInfo
    update_info_cls = GraftUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._switch = Switch(self._write)
        self._routes = Routes(model)
        self._cache: OrderedDict[tuple[Any, ...], CheckpointPatch] = OrderedDict()

    def init_transfer_engine(self, init_info: GraftInitInfo) -> None:
        """Do nothing: there is no trainer to meet."""

    def start_weight_update(self) -> None:
        """Check that the model's weights are those of the base's files."""
        if self.model_config.quantization is not None:
            raise ValueError(
                "a skill can only be written into an engine that is not quantized, got quantization="
                f"{self.model_config.quantization!r}. Start the engine with the base as it was trained."
            )

    def finish_weight_update(self) -> None:
        """Do nothing: entries are written in place."""

    def receive_weights(self, update_info: GraftUpdateInfo) -> None:
        """Read the skill, unless it is kept, and write it.

        Args:
            update_info: The skill.

        Raises:
            PatchError: The adapter is no finished graft, belongs to another base, or could not be taken out again.
            DonorError: The base's files cannot be read.
            OSError: The adapter does not exist.
        """
        self._switch.to(None if update_info.adapter is None else self._read(update_info.adapter, update_info.revision))

    def shutdown(self) -> None:
        """Forget the skills that were read."""
        self._cache.clear()

    def _read(self, adapter: str, revision: str | None) -> CheckpointPatch:
        key = (adapter, revision, _stamp(Path(adapter)))
        if key not in self._cache:
            self._cache[key] = read_patch(
                adapter,
                self.model_config.model,
                self.model_config.revision,
                revision=revision,
                trust_remote_code=self.model_config.trust_remote_code,
            )
        self._cache.move_to_end(key)
        while len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return self._cache[key]

    @torch.no_grad()
    def _write(self, edits: Mapping[str, CheckpointEdit]) -> None:
        left: dict[str, CheckpointEdit] = {}
        for name, routes in self._routes.find(edits).items():
            if routes is None:
                left[name] = edits[name]
            for route in routes or []:
                route.write(edits[name])
        if left:
            # The indices are sorted and have been checked; vLLM would sort them again.
            patches = checkpoint_weight_patches(left, self.device)
            load_checkpoint_weight_patches(self.model, patches, validate_unique_indices=False)


def _stamp(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what tells whether a directory's files have changed; nothing for a Hub id."""
    if not directory.is_dir():
        return ()
    files = [(file.name, file.stat()) for file in sorted(directory.iterdir()) if file.is_file()]
    return tuple((name, found.st_mtime_ns, found.st_size) for name, found in files)
