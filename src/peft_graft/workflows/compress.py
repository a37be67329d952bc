"""Write a saved adapter in fewer bytes: its values as signs or few bits, its tensors packed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import save_file

from ..adapter_files.card import carry_card, require_readable_card
from ..adapter_files.summary import SavedAdapter, fetch_adapter
from ..patch.atomic import atomic_directory, check_output_dir
from ..patch.patch import PEFT_PREFIX, Patch, parse_file_key
from ..patch.value_codes import VALUE_CODES, ValueCode
from ..tuner import GraftConfig
from ..tuner.build_patch import encode_parts, note_loss
from ..tuner.config import VALUES
from .adapter_on_base import AdapterOnBase, read_finished


@dataclass(frozen=True)
class CompressResult:
    """Adapter written by `compress`.

    Attributes:
        directory: Directory of the adapter.
        entries: Number of entries of its patch.
        nbytes: Size of the tensors' file.
        nbytes_before: Size of the tensors' file that was read.
        values_error: What the code loses of the deltas, ||coded - delta|| / ||delta||; 0 for `"donor"`.
    """

    directory: Path
    entries: int
    nbytes: int
    nbytes_before: int
    values_error: float


def compress(
    adapter: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    values: str = "sign",
    base: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> CompressResult:
    """Write a saved adapter with its values in a code of fewer bits.

    The entries stay the same ones, and so do alpha, the modules stored whole and what the card says.

    Args:
        adapter: Directory or Hub id of the adapter.
        output_dir: Directory of the new adapter; it appears when the adapter is complete.
        values: The code: `"sign"`, `"int4"` or `"int8"` (see `GraftConfig`). `"donor"` leaves the values as they are,
            and packs the tensors of a file of an older version, for which no base is needed.
        base: Directory or Hub id of the base. Default: the base that the adapter names.
        base_revision: Branch, tag or commit of a base on the Hub.
        revision: Branch, tag or commit of an adapter on the Hub.
        token: Token for the Hub. Default: the token of `hf auth login`, or HF_TOKEN; False for none.
        trust_remote_code: Run the code that comes with a base that transformers does not know. Without it, such bases
            are refused; nothing is asked on the terminal.
        overwrite: Replace an adapter that is in `output_dir` already.

    Returns:
        The new adapter's directory and sizes, and what the code loses.

    Raises:
        PatchError: `adapter` holds no finished graft or belongs to another base.
        DonorError: The base cannot be read.
        FileExistsError: There is an adapter in `output_dir`, and `overwrite` is not set; or it holds the adapter, the
            base or another model.
        ValueError: The code is unknown.
        OSError: The adapter or the base does not exist.
    """
    if values not in VALUES:
        raise ValueError(f"values must be one of {list(VALUES)}, got {values!r}. 'sign' takes the fewest bytes.")
    target = Path(output_dir)
    files = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
    check_output_dir(target, overwrite, files, inputs={"adapter": adapter, "base": base})
    require_readable_card(target)
    directory = fetch_adapter(adapter, revision, token)
    saved = read_finished(directory)
    config, error = GraftConfig.from_pretrained(directory), 0.0
    patch = saved.load_patch()
    if values != "donor":
        graft = AdapterOnBase(directory, base, base_revision, None, token, trust_remote_code)
        check_output_dir(target, overwrite, files, inputs={"base": graft.base})
        patch = _encode(graft, config, VALUE_CODES[values])
        config.values = values
        error = (config.record.provenance or {})["values_error"] if config.record else 0.0
    with atomic_directory(target, last=CONFIG_NAME) as temporary:
        carry_card(directory, temporary)
        save_file(_tensors(saved, patch), temporary / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        config.save_pretrained(str(temporary))
        nbytes = (temporary / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    return CompressResult(target, patch.num_params, nbytes, saved.tensors_bytes, error)


def _encode(graft: AdapterOnBase, config: GraftConfig, code: ValueCode) -> Patch:
    """Encode the values of an adapter, and record in its config what the code loses."""
    parts, losses = encode_parts(graft.patch.plain, graft.base_values, code)
    note_loss(config, losses, code)
    origin: Mapping[str, Any] = (config.record.provenance if config.record else None) or {}
    config.note(provenance={name: value for name, value in origin.items() if name != "exact"})
    return Patch(parts)


def _tensors(saved: SavedAdapter, patch: Patch) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter's file with another patch in it."""
    with safe_open(saved.directory / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        keys = list(file.keys())
        others = {key: file.get_tensor(key) for key in keys if parse_file_key(key) is None}
    prefix = PEFT_PREFIX if any(key.startswith(PEFT_PREFIX) for key in keys) else ""
    return others | {f"{prefix}{key}": tensor for key, tensor in patch.to_tensors().items()}
