"""Fill a model card: its metadata for the Hub, and its text for people."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .hub_names import public_base, public_name
from .summary import SavedAdapter
from .task_types import task_names
from .versions import PACKAGES, installed_versions

TITLE = "Skill graft"
REPO = "this/repository"
TAGS = ("graft", "peft-graft")

_ADAPTER_TAG = "base_model:adapter:"
_MODELS = ("base", "donor", "graft")
_METRICS = ("accuracy", "f1", "ece", "agreement", "forgotten")
_LEGEND = {
    "ece": "ece: expected calibration error; lower is better.",
    "agreement": "agreement: share of the rows on which a model decides as the donor does.",
    "forgotten": "forgotten: share of the rows that the base gets right and this model does not.",
}


def update_metadata(
    data: ModelCardData,
    saved: SavedAdapter,
    metrics: Mapping[str, Any] | None,
    keep_scores: bool,
    repo_id: str | None,
    tags: Sequence[str],
) -> None:
    """Update the metadata of a card in place, and keep the fields and tags that a person has added.

    Args:
        data: The card's metadata.
        saved: The adapter.
        metrics: Scores, as in `card.refresh_card`.
        keep_scores: Whether to keep the scores in `data`, instead of replacing them by those of `metrics`.
        repo_id: Repository where the adapter will be published.
        tags: Further tags.
    """
    base = public_base(saved.config.get("base_model_name_or_path"), saved.hub_ids)
    if base is None and isinstance(data.base_model, str):
        base = public_name(data.base_model, saved.hub_ids)
    data.library_name = "peft"
    data.base_model = base
    data["base_model_relation"] = "adapter" if base else None
    tag = _ADAPTER_TAG + base if base else None
    kept = [one for one in (data.tags or []) if not one.startswith(_ADAPTER_TAG)]
    data.tags = sorted({*kept, *tags, *TAGS, *([tag] if tag else [])})
    task = task_names(saved.config.get("task_type"))
    pipeline_tag = task.pipeline_tag if task else None
    data.pipeline_tag = data.pipeline_tag or pipeline_tag
    ours = tuple(f"({name})" for name in _MODELS)
    results = list(data.eval_results or [])
    if not keep_scores:
        results = [result for result in results if not (result.metric_name or "").endswith(ours)]
        results += _results(metrics or {}, pipeline_tag)
    data.eval_results = results or None
    if results:
        data.model_name = repo_id.split("/")[-1] if repo_id else data.model_name or TITLE


def _results(metrics: Mapping[str, Any], pipeline_tag: str | None) -> list[EvalResult]:
    """Return the entries of the model-index, in which only the graft's scores have plain names."""
    # The index does not tell models apart: with a plain name, the donor's score would be taken for the graft's.
    dataset = _measured_on(metrics)
    return [
        EvalResult(
            task_type=pipeline_tag or "other",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric if name == "graft" else f"{name}_{metric}",
            metric_name=f"{metric} ({name})",
            metric_value=round(value, 6),
        )
        for name in ("graft", "donor", "base")
        for metric, value in _scores(metrics, name).items()
    ]


def _scores(metrics: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return the finite scores of one model in the order of the table, without those that are trivial for it."""
    found = metrics.get(name) or {}
    return {
        metric: float(found[metric])
        for metric in _METRICS
        if isinstance(found.get(metric), int | float) and math.isfinite(found[metric])
        and (metric, name) not in (("agreement", "donor"), ("forgotten", "base"))
    }  # fmt: skip


def _measured_on(metrics: Mapping[str, Any]) -> str:
    """Return the name of the evaluation data: a Hub id, or the name of a file without its path."""
    data = _data(metrics)
    name = data.get("validation") or data.get("train") or "unnamed data"
    return _data_name(str(name))


def _data(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the names of the data, which older files of examples/graft.py hold under `arguments`."""
    return metrics.get("data") or metrics.get("arguments") or {}


def _data_name(name: str) -> str:
    """Return the name of a dataset without the path to it."""
    return re.split(r"[\\/]", name)[-1] if os.path.exists(name) or "\\" in name or os.path.isabs(name) else name


def template() -> str:
    """Return the Jinja template of the card."""
    return (files(__package__) / "template.md").read_text(encoding="utf-8")


def render(
    data: ModelCardData,
    saved: SavedAdapter,
    metrics: Mapping[str, Any] | None,
    pictures: Sequence[tuple[str, str]],
    training: str | None,
) -> ModelCard:
    """Fill the template of the card.

    Args:
        data: The card's metadata.
        saved: The adapter.
        metrics: Scores, as in `card.refresh_card`.
        pictures: File name and caption of each picture.
        training: Section on the training procedure, if there is one.

    Returns:
        The card, with `REPO` in the place of the repository's name.
    """
    scores = {name: _scores(metrics or {}, name) for name in _MODELS}
    shown = [metric for metric in _METRICS if any(metric in values for values in scores.values())]
    task = task_names(saved.config.get("task_type"))
    auto_class = task.peft_class if task else None
    return ModelCard.from_template(
        data,
        template_str=template(),
        title=TITLE,
        repo_id=REPO,
        auto_class=auto_class,
        num_labels=saved.num_labels if saved.config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else None,
        facts=_facts(saved),
        largest=_largest(saved),
        versions=_versions(saved),
        content_hash=saved.content_hash,
        metrics=shown,
        scores=[
            (name, [f"{values[metric]:.4f}" if metric in values else "" for metric in shown])
            for name, values in scores.items()
            if values
        ],
        measured_on=_sentence_on_data(metrics or {}),
        legend=[text for metric, text in _LEGEND.items() if metric in shown],
        pictures=list(pictures),
        training=training,
    )


def _sentence_on_data(metrics: Mapping[str, Any]) -> str:
    """Return sentences on the evaluation data, and on the data that the mask and alpha come from."""
    data, rows = _data(metrics), metrics.get("rows") or {}
    measured = f"{rows['validation']:,} rows of " if rows.get("validation") else ""
    text = [f"Measured on {measured}`{_cell(_measured_on(metrics))}`."]
    if data.get("train"):
        used = {"the mask or its scores": rows.get("train"), "alpha": rows.get("calibration")}
        counts = " and ".join(f"{count:,} rows for {what}" for what, count in used.items() if count)
        text.append(f"Made with `{_cell(_data_name(str(data['train'])))}`{': ' if counts else ''}{counts}.")
    return " ".join([*text, *([_cell(metrics["note"])] if metrics.get("note") else [])])


def _facts(saved: SavedAdapter) -> list[tuple[str, str]]:
    """Return the rows of the table of facts: origin, budget and size of the patch."""
    config, modules = saved.config, saved.modules_to_save_bytes
    whole = f" (of which {sum(modules.values()):,} for `modules_to_save`)" if modules else ""
    found = {
        "base": _named(public_base(config.get("base_model_name_or_path"), saved.hub_ids), config.get("revision")),
        "fingerprint of the base": _fingerprint(saved.record.get("fingerprint") or {}),
        "donor": _donor(config, saved.hub_ids),
        "configuration of the donor": _donor_config(saved.record.get("provenance") or {}),
        "rule": "`{}`, scope `{}`, granularity `{}`".format(
            *map(config.get, ("selection", "budget_scope", "granularity"))
        ),
        "density": config.get("density"),
        "entries": _entries(saved),
        "bytes": f"{saved.tensors_bytes:,} for the tensors{whole}, {saved.config_bytes:,} for the configuration",
        "alpha": _alpha(config.get("alpha")),
        "modules_to_save": ", ".join(f"`{name}`" for name in modules),
        "seed": config.get("seed"),
    }
    return [(name, _cell(value)) for name, value in found.items() if value not in (None, "", {})]


def _fingerprint(fields: Mapping[str, Any]) -> str:
    if not fields:
        return ""
    return f"`{fields.get('sha256', '')[:16]}` over {fields.get('count', 0):,} entries in {fields.get('dtype')}"


def _donor_config(provenance: Mapping[str, Any]) -> str:
    """Return the fields in which the donor computes something else than the base."""
    fields = provenance.get("donor_config") or {}
    listed = ", ".join(
        f"`{name}` {both.get('donor')!r} instead of {both.get('base')!r}" for name, both in fields.items()
    )
    return f"{listed}; the graft computes with the base's" if listed else ""


def _entries(saved: SavedAdapter) -> str:
    if saved.in_training:
        return "candidates of a mask in training, not a finished patch"
    count, eligible = sum(saved.counts.values()), saved.record.get("eligible")
    return f"{count:,}" + (f" of {eligible:,} eligible ({count / eligible:.4%})" if eligible else "")


def _alpha(alpha: Any) -> Any:
    if isinstance(alpha, dict) and alpha:
        return f"one per tensor, {min(alpha.values()):.4g} to {max(alpha.values()):.4g}"
    return f"{alpha:.6g}" if isinstance(alpha, int | float) else alpha


def _donor(config: Mapping[str, Any], hub_ids: Mapping[str, str | None]) -> str:
    """Return the origin of the values: a model, zeros, or the grafts that were combined into this one."""
    provenance = (config.get("record") or config).get("provenance") or {}  # of an adapter, or a part of one
    parts = provenance.get("adapters")
    if parts:
        how = provenance.get("combination_type")
        named = [
            f"{each.get('weight')} x {each.get('entries'):,} entries, donor {_donor(each, hub_ids)}" for each in parts
        ]
        return f"combined (`{how}`): {'; '.join(named)}"
    if config.get("donor") == "zeros":
        return "zeros (the entries become 0)"
    return _named(public_name(config.get("donor"), hub_ids), config.get("donor_revision"))


def _largest(saved: SavedAdapter, rows: int = 5) -> list[tuple[str, str, str]]:
    total = sum(saved.counts.values())
    ranked = sorted(saved.counts.items(), key=lambda item: (-item[1], item[0]))[:rows]
    return [(_cell(name), f"{count:,}", f"{count / total:.1%}") for name, count in ranked if count]


def _versions(saved: SavedAdapter) -> list[tuple[str, str]]:
    """Return the versions recorded when the patch was made, or else the installed ones."""
    # Spelled as PEFT does, which adds a line of its own where it finds no such line.
    versions = (saved.record.get("provenance") or {}).get("versions") or {}
    found = {name: versions.get(name) for name in PACKAGES} if versions else installed_versions()
    return [("PEFT" if name == "peft" else name, _cell(value)) for name, value in found.items() if value]


def _named(name: str | None, revision: object) -> str:
    """Return a link to a model of the Hub, or a note that the model is not published."""
    if name is None:
        return "not published (a local directory or a model in memory)"
    text = f"[{name}](https://huggingface.co/{name})" if "/" in name else f"`{name}`"
    return f"{text} at `{revision}`" if revision else text


def _cell(value: object) -> str:
    """Return a value without line breaks and bars, which would break out of its table cell."""
    return re.sub(r"[\s|]+", " ", str(value))
