"""What a card says: the metadata that the Hub reads, and the text that people read."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .hub_names import public_base, public_name
from .summary import PACKAGES, Saved, installed_versions

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
# task_type of PEFT: tag of the Hub, the class that loads base and adapter at once.
_TASKS = {
    "SEQ_CLS": ("text-classification", "AutoPeftModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoPeftModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoPeftModelForQuestionAnswering"),
    "CAUSAL_LM": ("text-generation", "AutoPeftModelForCausalLM"),
    "SEQ_2_SEQ_LM": (None, "AutoPeftModelForSeq2SeqLM"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoPeftModelForFeatureExtraction"),
}


def update_data(
    data: ModelCardData,
    saved: Saved,
    metrics: Mapping[str, Any] | None,
    is_known: bool,
    repo_id: str | None,
    tags: Sequence[str],
) -> None:
    """Set what the Hub reads; keep what a person has added."""
    base = public_base(saved.config.get("base_model_name_or_path"))
    if base is None and isinstance(data.base_model, str):
        base = public_name(data.base_model)
    data.library_name = "peft"
    data.base_model = base
    data["base_model_relation"] = "adapter" if base else None
    tag = _ADAPTER_TAG + base if base else None
    kept = [one for one in (data.tags or []) if not one.startswith(_ADAPTER_TAG)]
    data.tags = sorted({*kept, *tags, *TAGS, *([tag] if tag else [])})
    pipeline_tag, _ = _TASKS.get(saved.config.get("task_type") or "", (None, None))
    data.pipeline_tag = data.pipeline_tag or pipeline_tag
    ours = tuple(f"({name})" for name in _MODELS)
    results = list(data.eval_results or [])
    if metrics is not None or not is_known:
        results = [result for result in results if not (result.metric_name or "").endswith(ours)]
        results += _results(metrics or {}, pipeline_tag)
    data.eval_results = results or None
    if results:
        data.model_name = repo_id.split("/")[-1] if repo_id else data.model_name or TITLE


def _results(metrics: Mapping[str, Any], pipeline_tag: str | None) -> list[EvalResult]:
    """Entries of the model-index. Only the graft's have plain names, so that nobody takes the donor's for them."""
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
    """Finite numbers of one model, in the order of the table; agreement of the donor with itself says nothing."""
    found = metrics.get(name) or {}
    return {
        metric: float(found[metric])
        for metric in _METRICS
        if isinstance(found.get(metric), int | float) and math.isfinite(found[metric])
        and (metric, name) not in (("agreement", "donor"), ("forgotten", "base"))
    }  # fmt: skip


def _measured_on(metrics: Mapping[str, Any]) -> str:
    """Name of the data that was measured on: a Hub id as it is, of a file only its name."""
    data = _data(metrics)
    name = data.get("validation") or data.get("train") or "unnamed data"
    return _data_name(str(name))


def _data(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Names of the data; examples/graft.py has always recorded them among its arguments too."""
    return metrics.get("data") or metrics.get("arguments") or {}


def _data_name(name: str) -> str:
    """Return the name of a data set without the path to it."""
    return re.split(r"[\\/]", name)[-1] if os.path.exists(name) or "\\" in name or os.path.isabs(name) else name


def template() -> str:
    """Return the Jinja template of the card."""
    return (files(__package__) / "template.md").read_text(encoding="utf-8")


def render(
    data: ModelCardData,
    saved: Saved,
    metrics: Mapping[str, Any] | None,
    pictures: Sequence[tuple[str, str]],
    repo_id: str | None,
    training: str | None,
) -> ModelCard:
    """Fill the template."""
    scores = {name: _scores(metrics or {}, name) for name in _MODELS}
    shown = [metric for metric in _METRICS if any(metric in values for values in scores.values())]
    _, auto_class = _TASKS.get(saved.config.get("task_type") or "", (None, None))
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
        stamp=saved.stamp,
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
    """What was measured on, and what the mask and alpha come from."""
    data, rows = _data(metrics), metrics.get("rows") or {}
    measured = f"{rows['validation']:,} rows of " if rows.get("validation") else ""
    text = [f"Measured on {measured}`{_cell(_measured_on(metrics))}`."]
    if data.get("train"):
        used = {"the mask or its scores": rows.get("train"), "alpha": rows.get("calibration")}
        counts = " and ".join(f"{count:,} rows for {what}" for what, count in used.items() if count)
        text.append(f"Made with `{_cell(_data_name(str(data['train'])))}`{': ' if counts else ''}{counts}.")
    return " ".join([*text, *([_cell(metrics["note"])] if metrics.get("note") else [])])


def _facts(saved: Saved) -> list[tuple[str, str]]:
    """Rows of the table: how the patch was made, and what it weighs."""
    config, entries = saved.config, sum(saved.counts.values())
    fingerprint, eligible = config.get("fingerprint") or {}, config.get("eligible")
    alpha = config.get("alpha")
    rule = {name: config.get(name) for name in ("selection", "scope", "granularity")}
    whole = f" (of which {sum(saved.whole.values()):,} for what is stored whole)" if saved.whole else ""
    found = {
        "base": _named(public_base(config.get("base_model_name_or_path")), config.get("revision")),
        "fingerprint of the base": fingerprint
        and f"`{fingerprint.get('sha256', '')[:16]}` over {fingerprint.get('count', 0):,} entries "
        f"in {fingerprint.get('dtype')}",
        "donor": _donor(config),
        "rule": "`{selection}`, scope `{scope}`, granularity `{granularity}`".format_map(rule),
        "density": config.get("density"),
        "entries": "candidates of a mask in training, not a finished patch"
        if saved.in_training
        else f"{entries:,}" + (f" of {eligible:,} eligible ({entries / eligible:.4%})" if eligible else ""),
        "bytes": f"{saved.sizes[0]:,} for the tensors{whole}, {saved.sizes[1]:,} for the configuration",
        "alpha": f"one per tensor, {min(alpha.values()):.4g} to {max(alpha.values()):.4g}"
        if isinstance(alpha, dict) and alpha
        else f"{alpha:.6g}"
        if isinstance(alpha, int | float)
        else alpha,
        "stored whole": ", ".join(f"`{name}`" for name in saved.whole),
        "seed": config.get("seed"),
    }
    return [(name, _cell(value)) for name, value in found.items() if value not in (None, "", {})]


def _donor(config: Mapping[str, Any]) -> str:
    """Where the values come from: a model, zeros, or the grafts that this one was combined of."""
    parts = (config.get("provenance") or {}).get("adapters")
    if parts:
        how = config["provenance"].get("combination_type")
        named = (f"{part.get('weight')} x {part.get('entries'):,} entries, donor {_donor(part)}" for part in parts)
        return f"combined (`{how}`): {'; '.join(named)}"
    if config.get("donor") == "zeros":
        return "zeros (the entries become 0)"
    return _named(public_name(config.get("donor")), config.get("donor_revision"))


def _largest(saved: Saved, rows: int = 5) -> list[tuple[str, str, str]]:
    total = sum(saved.counts.values())
    ranked = sorted(saved.counts.items(), key=lambda item: (-item[1], item[0]))[:rows]
    return [(_cell(name), f"{count:,}", f"{count / total:.1%}") for name, count in ranked if count]


def _versions(saved: Saved) -> list[tuple[str, str]]:
    """Versions on record, of when the patch was made, or else the installed ones; PEFT's as PEFT itself writes it."""
    recorded = (saved.config.get("provenance") or {}).get("versions") or {}
    found = {name: recorded.get(name) for name in PACKAGES} if recorded else installed_versions()
    return [("PEFT" if name == "peft" else name, _cell(value)) for name, value in found.items() if value]


def _named(name: str | None, revision: object) -> str:
    """Link a name of the form owner/name; a model without a public name is said to be local."""
    if name is None:
        return "not published (a local directory or a model in memory)"
    text = f"[{name}](https://huggingface.co/{name})" if "/" in name else f"`{name}`"
    return f"{text} at `{revision}`" if revision else text


def _cell(value: object) -> str:
    """Keep a value inside of its table cell."""
    return re.sub(r"[\s|]+", " ", str(value))
