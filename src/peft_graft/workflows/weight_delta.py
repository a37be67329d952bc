"""Write a patch as SGLang, slime and miles exchange weights on a disk: changed bytes, compressed, with checksums."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ..checkpoints.donor import INDEX_FILE, CheckpointDonor, Extent
from .checkpoint_patch import CheckpointEdit, CheckpointPatch

DELTA_FILE = "model-00000-of-00001.safetensors"
# Nearly all bytes are zero; a higher level takes longer and saves little.
_LEVEL = 3


def write_delta(directory: Path, patch: CheckpointPatch, files: CheckpointDonor, version: int = 1) -> Path:
    """Write the change from one version of a checkpoint to the next, as `weight_v<version>/`.

    For each tensor that changes, a safetensors file holds the zstd stream of (new bytes XOR old bytes), over the whole
    tensor, and in its metadata the Adler-32 of the new bytes, in hexadecimal. An index of the usual name says which
    version this is and which one it builds on. The version before the first is the base itself.

    Args:
        directory: Directory of the versions.
        patch: The changes, all of tensors that the files have.
        files: Files of the base.
        version: Number of the version, >= 1.

    Returns:
        The directory of this version.

    Raises:
        ImportError: zstandard is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            "the package zstandard must be installed to write a weight delta. Run `pip install peft-graft[serve]`."
        ) from error
    compressor = zstandard.ZstdCompressor(level=_LEVEL)
    target = directory / f"weight_v{version:06d}"
    target.mkdir(parents=True)
    streams: dict[str, torch.Tensor] = {}
    checksums: dict[str, str] = {}
    for name, edit in sorted(patch.edits.items()):
        before, after = _bytes_of(files.extent(name), edit)
        changed = before ^ after
        if changed.any():
            streams[name] = torch.frombuffer(bytearray(compressor.compress(changed.data)), dtype=torch.uint8)
            checksums[name] = f"{zlib.adler32(after.data):08x}"
    save_file(streams, target / DELTA_FILE, checksums)
    fields = {
        "metadata": {
            "version": f"{version:06d}",
            "base_version": f"{version - 1:06d}",
            "delta_encoding": "xor",
            "compression_format": "zstd",
            "checksum_format": "adler32",
        },
        "weight_map": dict.fromkeys(streams, DELTA_FILE),
    }
    (target / INDEX_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
    return target


def _bytes_of(extent: Extent, edit: CheckpointEdit) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of a tensor in the base's file, and after the change, uint8 [bytes] each."""
    values = edit.values if not isinstance(extent.dtype, torch.dtype) else edit.values.to(extent.dtype)
    width, count = values.dtype.itemsize, math.prod(extent.shape)
    before = np.fromfile(extent.path, np.uint8, count=count * width, offset=extent.offset)
    after = before.copy()
    coded = values.contiguous().view(torch.uint8).numpy().reshape(-1, width)
    after.reshape(count, width)[slice(None) if edit.indices is None else edit.indices.numpy()] = coded
    return before, after
