"""Keep what a donor says about rows of data, in memory or in files, found again by what a row holds.

A row's key is a hash of its inputs. Trainers shuffle, group by length, share rows out among ranks, and drop columns
that the model does not take, so neither an order nor an extra column would last; what the model reads of a row stays
the same. Padding is left out, because it depends on the rows beside it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..patch.atomic import atomic_directory
from ..tuner.backends import collectives

TOP_K = 64  # tokens of a vocabulary whose probabilities are kept one by one
CountedTokens = Literal["completion", "all"]
TokenKind = Literal["same", "next", "decoder"]

_KEY_BYTES = 16
_FORMAT = "peft_graft.donor_outputs"
_FILE = "donor_outputs-{:05d}.safetensors"
_FILE_BYTES = 64 * 2**20  # of values, from which on a file is written
LABELS = ("labels", "label", "label_ids")
ATTENTION = ("attention_mask", "decoder_attention_mask")  # of the encoder or the only stack, and of the decoder


class Distributions(NamedTuple):
    """Distributions over classes or tokens, one for each of M counted positions.

    Attributes:
        log_probs: Log-probabilities, float32 [M, C]: of all C classes, or of the C likeliest tokens.
        ids: Which tokens these are, int32 [M, C]; None for all classes in order.
        log_rest: Log-probability of all other tokens together, float32 [M]; None where there are none.
    """

    log_probs: torch.Tensor
    ids: torch.Tensor | None = None
    log_rest: torch.Tensor | None = None

    @classmethod
    def of(cls, logits: torch.Tensor, top_k: int) -> Distributions:
        """Keep the likeliest classes of each position.

        Args:
            logits: Float [M, C].
            top_k: How many to keep, at least 1; all where there are no more.

        Returns:
            The distributions, on the device of the logits.
        """
        log_probs = logits.float().log_softmax(-1)
        if log_probs.shape[-1] <= top_k:
            return cls(log_probs)
        kept, ids = log_probs.topk(top_k, dim=-1)
        log_rest = log_probs.scatter(-1, ids, float("-inf")).logsumexp(-1)
        return cls(kept, ids.int(), log_rest)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name, without those that are None."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def rows(self, start: int, stop: int) -> Distributions:
        """Return some of the positions."""
        return Distributions(**{name: value[start:stop] for name, value in self.tensors().items()})

    def to(self, device: torch.device) -> Distributions:
        """Return the distributions on a device."""
        return Distributions(**{name: value.to(device) for name, value in self.tensors().items()})


def concatenate(parts: Sequence[Distributions]) -> Distributions:
    """Join distributions of the same kind, in order."""
    names = parts[0].tensors()
    return Distributions(**{name: torch.cat([part.tensors()[name] for part in parts]) for name in names})


@dataclass(frozen=True)
class _Place:
    """Positions `start` to `stop` of a chunk."""

    chunk: int
    start: int
    stop: int


class DonorOutputs:
    """Outputs of a donor by row: of each position that counts, a distribution.

    In memory until `save`, or opened from files, of which only the rows asked for are read.

    Args:
        top_k: Tokens whose probabilities are kept one by one; of the others only their sum.
        tokens: Positions that count in models with an output for each token: `"completion"`, those with a label other
            than -100, and all that attention sees where a batch has no labels; or `"all"` in any case.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, top_k: int = TOP_K, tokens: CountedTokens = "completion") -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k!r}. {TOP_K} is enough for most vocabularies.")
        if tokens not in ("completion", "all"):
            raise ValueError(f"tokens must be 'completion' or 'all', got {tokens!r}. Use 'all' to count prompts too.")
        self.top_k, self.tokens = top_k, tokens
        self._chunks: list[Distributions | Path] = []
        self._places: dict[bytes, _Place] = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._places)

    def __contains__(self, key: object) -> bool:
        """Return whether the outputs for a row are here."""
        return key in self._places

    def add(self, keys: Sequence[bytes], counts: Sequence[int], found: Distributions) -> None:
        """Keep the outputs for a batch.

        Args:
            keys: One for each row.
            counts: Number of counted positions of each row.
            found: Of all counted positions, row by row.
        """
        self._chunks.append(found.to(torch.device("cpu")))
        self._index(keys, counts)

    def _index(self, keys: Sequence[bytes], counts: Sequence[int]) -> None:
        start = 0
        for key, count in zip(keys, counts, strict=True):
            self._places[key] = _Place(len(self._chunks) - 1, start, start + count)
            start += count

    def get(self, keys: Sequence[bytes], counts: Sequence[int]) -> Distributions:
        """Return the outputs for a batch, on the CPU.

        Args:
            keys: One for each row.
            counts: Number of counted positions of each row.

        Returns:
            Those of all counted positions, row by row.

        Raises:
            ValueError: The donor has not seen a row, or other positions of it.
        """
        unknown = [row for row, key in enumerate(keys) if key not in self._places]
        if unknown:
            raise ValueError(
                f"rows must be among those that the donor has seen, got {len(unknown)} of {len(keys)} in a batch that "
                f"are not (the first is row {unknown[0]}; {len(self)} rows are kept). Call "
                "peft_graft.store_donor_outputs(model, dataloader) with these rows first. Rows that are changed at "
                "random each time they are drawn (augmentation, masking) cannot be found again: fix them beforehand."
            )
        places = [self._places[key] for key in keys]
        wrong = [
            (row, place.stop - place.start, count)
            for row, (place, count) in enumerate(zip(places, counts, strict=True))
            if place.stop - place.start != count
        ]
        if wrong:
            row, kept, count = wrong[0]
            raise ValueError(
                f"rows must count the positions that the donor's outputs are for, got {count} instead of {kept} in row "
                f"{row} ({len(wrong)} such rows). Use the same collator for both."
            )
        with ExitStack() as files:
            return concatenate(list(self._read(places, files)))

    def _read(self, places: Iterable[_Place], files: ExitStack) -> Iterator[Distributions]:
        """Read places in order, and open each file once."""
        handles: dict[int, Any] = {}
        for place in places:
            chunk = self._chunks[place.chunk]
            if isinstance(chunk, Distributions):
                yield chunk.rows(place.start, place.stop)
                continue
            if place.chunk not in handles:
                handles[place.chunk] = files.enter_context(safe_open(chunk, framework="pt"))
            file = handles[place.chunk]
            held = set(file.keys()) & set(Distributions._fields)
            yield Distributions(**{name: file.get_slice(name)[place.start : place.stop] for name in held})

    def _items(self) -> Iterator[tuple[bytes, Distributions]]:
        with ExitStack() as files:
            yield from zip(self._places, self._read(self._places.values(), files), strict=True)

    def extend(self, other: DonorOutputs) -> None:
        """Keep the rows of others, too.

        Raises:
            ValueError: They were made with other options.
        """
        if (other.top_k, other.tokens) != (self.top_k, self.tokens):
            raise ValueError(
                f"top_k and tokens must be {self.top_k} and {self.tokens!r} as of the outputs that are kept, got "
                f"{other.top_k} and {other.tokens!r}. Compute one of them again."
            )
        offset = len(self._chunks)
        self._chunks += other._chunks
        moved = {key: _Place(place.chunk + offset, place.start, place.stop) for key, place in other._places.items()}
        self._places |= moved

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all outputs into a new directory, which appears whole or not at all.

        Args:
            path: The directory.

        Raises:
            FileExistsError: It exists already.
        """
        with OutputsWriter(path, self.top_k, self.tokens) as writer:
            for key, found in self._items():
                writer.add([key], [found.log_probs.shape[0]], found)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> DonorOutputs:
        """Open outputs in files; keys are read at once, outputs when they are asked for.

        Args:
            path: Directory that `save` or `store_donor_outputs` wrote.

        Returns:
            The outputs.

        Raises:
            ValueError: There are none, or a file is damaged.
        """
        files = sorted(Path(path).glob("donor_outputs-*.safetensors"))
        if not files:
            raise ValueError(
                f"path must be a directory of donor outputs, got {os.fspath(path)!r}. Write one with "
                "store_donor_outputs(model, dataloader, output_dir=...)."
            )
        read = [_read_keys(file) for file in files]
        opened = cls(*read[0][2])
        for file, (keys, counts, options) in zip(files, read, strict=True):
            if options != read[0][2]:
                raise _damaged(file, f"top_k and tokens {options}, not those of {files[0].name!r}")
            opened._chunks.append(file)
            opened._index(keys, counts)
        return opened

    def share(self) -> None:
        """Give every rank the outputs of all ranks; those in files are taken into memory."""
        if collectives.world_size() == 1:
            return
        items = list(self._items())
        found = concatenate([each for _, each in items])
        keys = torch.frombuffer(bytearray(b"".join(key for key, _ in items)), dtype=torch.uint8)
        counts = torch.tensor([each.log_probs.shape[0] for _, each in items])
        keys = collectives.all_gather_rows(keys.view(-1, _KEY_BYTES))
        counts = collectives.all_gather_rows(counts)
        found = Distributions(**{name: collectives.all_gather_rows(each) for name, each in found.tensors().items()})
        self._chunks, self._places = [], {}
        self.add([bytes(key.tolist()) for key in keys], counts.tolist(), found)


class OutputsWriter:
    """Write outputs batch by batch into files of about 64 MB in a new directory, which appears when all is written.

    Args:
        path: The directory.
        top_k: As in `DonorOutputs`.
        tokens: As in `DonorOutputs`.

    Raises:
        FileExistsError: The directory exists already.
    """

    def __init__(self, path: str | os.PathLike[str], top_k: int, tokens: str) -> None:
        if Path(path).exists():
            raise FileExistsError(
                f"output_dir must not exist yet, got {os.fspath(path)!r}. Open the outputs in it with "
                "DonorOutputs.open, or give a new directory."
            )
        self._metadata = {"format": _FORMAT, "version": "1", "top_k": str(top_k), "tokens": tokens}
        self._placing = atomic_directory(Path(path))
        self._keys: list[bytes] = []
        self._counts: list[int] = []
        self._parts: list[Distributions] = []
        self._held, self._files = 0, 0

    def __enter__(self) -> OutputsWriter:
        """Make a temporary directory."""
        self._folder = self._placing.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Write what is left and rename the directory, or remove it after an error."""
        if error[0] is None and self._parts:
            self._flush()
        self._placing.__exit__(*error)

    def add(self, keys: Sequence[bytes], counts: Sequence[int], found: Distributions) -> None:
        """Write the outputs for a batch, as `DonorOutputs.add`."""
        self._keys += keys
        self._counts += counts
        self._parts.append(found.to(torch.device("cpu")))
        self._held += sum(each.numel() * each.element_size() for each in found.tensors().values())
        if self._held >= _FILE_BYTES:
            self._flush()

    def _flush(self) -> None:
        tensors = {name: value.contiguous() for name, value in concatenate(self._parts).tensors().items()}
        tensors["keys"] = torch.frombuffer(bytearray(b"".join(self._keys)), dtype=torch.uint8).view(-1, _KEY_BYTES)
        tensors["counts"] = torch.tensor(self._counts)
        save_file(tensors, self._folder / _FILE.format(self._files), self._metadata)
        self._keys, self._counts, self._parts = [], [], []
        self._held, self._files = 0, self._files + 1


def _read_keys(path: Path) -> tuple[list[bytes], list[int], tuple[int, CountedTokens]]:
    """Read the keys and counts of a file, and check that they fit its outputs."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata, held = file.metadata() or {}, set(file.keys())
            if metadata.get("format") != _FORMAT or not {"keys", "counts", "log_probs"} <= held:
                raise _damaged(path, f"the tensors {sorted(held)}")
            keys, counts = file.get_tensor("keys"), file.get_tensor("counts")
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in held & set(Distributions._fields)}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from error
    if keys.dtype != torch.uint8 or keys.ndim != 2 or keys.shape != (len(counts), _KEY_BYTES):
        raise _damaged(path, f"keys of shape {tuple(keys.shape)} for {len(counts)} rows")
    if counts.dtype != torch.int64 or counts.min() < 0 or any(s[0] != int(counts.sum()) for s in shapes.values()):
        raise _damaged(path, f"counts of {int(counts.sum())} positions for outputs of shapes {shapes}")
    top_k, tokens = metadata.get("top_k", ""), metadata.get("tokens")
    if not top_k.isdigit() or tokens not in ("completion", "all"):
        raise _damaged(path, f"top_k {top_k!r} and tokens {tokens!r}")
    return [bytes(key) for key in keys.numpy()], counts.tolist(), (int(top_k), tokens)


def _damaged(path: Path, got: str) -> ValueError:
    return ValueError(f"donor outputs must be whole, got {got} in {str(path)!r}. Compute them again.")


def row_keys(batch: Mapping[str, Any], tokens: CountedTokens, is_encoder_decoder: bool = False) -> list[bytes]:
    """Compute the keys of a batch's rows: a hash of what the model reads of them, and of which tokens count.

    Args:
        batch: Tensors by the names of the model's inputs, the rows in the first dimension.
        tokens: As in `DonorOutputs`.
        is_encoder_decoder: Whether the model makes its decoder's inputs from the labels.

    Returns:
        One key for each row, equal for equal rows whatever the padding beside them.

    Raises:
        ValueError: The batch is no mapping with tensors.
    """
    inputs = tensors_by_row(batch)
    hashes = [hashlib.blake2b(digest_size=_KEY_BYTES) for _ in range(next(iter(inputs.values())).shape[0])]
    for name, values, mask in _parts(inputs, tokens, is_encoder_decoder):
        for row, digest in enumerate(hashes):
            kept = values[row] if mask is None else values[row][mask[row]]
            digest.update(f"{name}:{kept.dtype}:{tuple(kept.shape)};".encode())
            digest.update(kept.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return [digest.digest() for digest in hashes]


def tensors_by_row(batch: Any) -> dict[str, torch.Tensor]:
    """Return a batch's tensors that have a dimension for the rows, on the CPU.

    Raises:
        ValueError: There are none.
    """
    held = batch if isinstance(batch, Mapping) else {}
    inputs = {name: value.cpu() for name, value in held.items() if isinstance(value, torch.Tensor) and value.ndim}
    if not inputs:
        raise ValueError(
            f"batch must be a mapping of tensors by the names of the model's inputs, got {type(batch).__name__}. Give "
            "it this form in the collator, or pass a loss_fn of your own."
        )
    return inputs


def _parts(
    inputs: Mapping[str, torch.Tensor], tokens: CountedTokens, is_encoder_decoder: bool
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Yield what tells rows apart: a name, values, and a mask [B, T] of the positions that are no padding."""
    masks = {name: inputs[name].bool() for name in ATTENTION if name in inputs and inputs[name].ndim == 2}
    labels = token_labels(inputs)
    for name in sorted(inputs.keys() - masks.keys() - {*LABELS}):
        if name == "decoder_input_ids" and labels is not None:
            continue  # made from the labels, with their padding
        values, mask = inputs[name], masks.get(ATTENTION[name.startswith("decoder_")])
        yield name, values, mask if mask is not None and mask.shape == values.shape[:2] else None
    if labels is None:
        return
    if is_encoder_decoder:
        yield "labels", labels, labels != -100
    elif tokens == "completion":
        mask = masks.get(ATTENTION[0])
        yield "counted", labels != -100, mask if mask is not None and mask.shape == labels.shape else None


def token_labels(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Return the labels of a batch if there is one for each token: int64 [B, T]."""
    labels = inputs.get("labels")
    return labels if labels is not None and labels.ndim == 2 and not labels.is_floating_point() else None


def counted_positions(
    inputs: Mapping[str, torch.Tensor], shape: tuple[int, int], tokens: CountedTokens, kind: TokenKind
) -> torch.Tensor:
    """Find the positions of a batch whose outputs count.

    Args:
        inputs: The batch's tensors, on the CPU.
        shape: [B, T] of the outputs.
        tokens: As in `DonorOutputs`.
        kind: `"next"` where an output is about the next token (causal models), `"decoder"` where it is about the
            decoder's (encoder-decoder models), else `"same"`.

    Returns:
        Bool [B, T].

    Raises:
        ValueError: Labels and masks have another shape than the outputs.
    """
    attention, labels = inputs.get(ATTENTION[kind == "decoder"]), token_labels(inputs)
    if attention is None or attention.ndim != 2:
        attention = torch.ones(shape, dtype=torch.bool)
    by_labels = labels is not None and (tokens == "completion" or kind == "decoder")
    counted = labels != -100 if labels is not None and by_labels else attention.bool()
    if tuple(counted.shape) != tuple(shape) or (kind == "next" and counted.shape != attention.shape):
        raise ValueError(
            f"outputs must be one for each token of the batch, got outputs of shape {tuple(shape)} where labels or "
            f"attention mask have {tuple(counted.shape)}. Pass a loss_fn of your own."
        )
    if kind != "next":
        return counted
    following = torch.zeros_like(counted)
    following[:, :-1] = counted[:, 1:]
    return following & attention.bool()
