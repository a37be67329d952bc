"""Compare the configurations of a base and a donor, as far as they change what a forward computes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from .donor import CheckpointDonor, ModuleDonor
from .name_mapping import RenamedCheckpoint

# Fields that change no logits in evaluation mode, or that the shapes of the tensors tell.
_NEUTRAL = re.compile(
    r"(_name_or_path|architectures|transformers_version|model_type|auto_map|dtype|torch_dtype|quantization_config"
    r"|use_cache|return_dict|output_\w+|gradient_checkpointing|pretraining_tp|chunk_size_feed_forward"
    r"|problem_type|id2label|label2id|num_labels|finetuning_task|task_specific_params|tokenizer_class|prefix"
    r"|num_hidden_layers|num_layers|n_layers?|(num_)?(en|de)coder_layers|layer_types"
    r"|tie_word_embeddings|tie_encoder_decoder|vocab_size|initializer_\w+|\w*init_std|init_\w+|layer_?drop|\w*drop\w*"
    r"|\w*_token_ids?|\w*suppress_tokens|\w*aux_loss\w*|router_jitter_noise|mask_(time|feature)\w*|pruned_heads)"
)
# They say how long inputs may be. With other kinds of positions, they change the positions.
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx")
_BY_LENGTH = ("dynamic", "longrope", "yarn")

Differences = dict[str, tuple[Any, Any]]


def read_donor_config(donor: object, like: PretrainedConfig) -> PretrainedConfig | None:
    """Read a donor's configuration, as a configuration of the base's class, so that no code of others runs.

    Args:
        donor: The donor.
        like: The base's configuration.

    Returns:
        The configuration; None where the donor has none that can be read, or one of another type of model.
    """
    if isinstance(donor, ModuleDonor):
        config = donor.config
        return config if isinstance(config, PretrainedConfig) and config.model_type == like.model_type else None
    checkpoint = donor.checkpoint if isinstance(donor, RenamedCheckpoint) else donor
    fields = checkpoint.config_fields if isinstance(checkpoint, CheckpointDonor) else None
    if fields is None or fields.get("model_type") != like.model_type:
        return None
    try:
        return type(like).from_dict(fields)
    except (ValueError, TypeError, KeyError):  # not what this version of the class takes
        return None


def forward_differences(base: PretrainedConfig, donor: PretrainedConfig) -> Differences:
    """Find the fields of two configurations that make the same weights compute something else.

    Args:
        base: The base's configuration.
        donor: The donor's, of the same class.

    Returns:
        (the base's value, the donor's) by field, fields of fields with dots between; None for a value that is not set.
    """
    ours, theirs = base.to_dict(), donor.to_dict()
    found = dict(_compare("", ours, {key: value for key, value in theirs.items() if key in ours}))
    if not any(kind in f"{ours}{theirs}" for kind in _BY_LENGTH):
        found = {name: values for name, values in found.items() if name.rpartition(".")[2] not in _LENGTHS}
    # Decoders that classify look for the last token that is no padding.
    pad = ours.get("pad_token_id"), theirs.get("pad_token_id")
    if pad[0] != pad[1] and any("ForSequenceClassification" in name for name in donor.architectures or ()):
        found["pad_token_id"] = pad
    return found


def describe(differences: Differences) -> str:
    """Return the differing fields with both values, as text."""
    return ", ".join(
        f"{name} ({ours!r} in the base, {theirs!r} in the donor)" for name, (ours, theirs) in differences.items()
    )


def _compare(prefix: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    names = ours.keys() & theirs.keys() if not prefix else ours.keys() | theirs.keys()
    for name in sorted(names, key=str):
        one, other = ours.get(name), theirs.get(name)
        if one == other or _NEUTRAL.fullmatch(str(name)):
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _compare(f"{prefix}{name}.", one, other)
        else:
            yield f"{prefix}{name}", (one, other)
