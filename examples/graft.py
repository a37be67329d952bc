"""Graft a fine-tuned donor's skill into its base, and measure what the patch keeps of it.

    python examples/graft.py                                  # makes its own donor from the embedded task, offline
    accelerate launch examples/graft.py --base B --donor D \\
        --train train.jsonl --validation validation.jsonl --density 1e-4 --output-dir out

The run has four steps: measure base and donor, make the patch, measure the graft, and save it. It prints the scores of
base, donor and graft side by side. The adapter goes to `--output-dir` with a model card and `metrics.json`, and is
loaded back to check that its logits are equal.

Three sets of rows are kept apart. `--calibration-samples` rows of --train fit alpha, `--max-train-samples` others train
(or score) the mask, and --validation only measures. Use rows that the donor was not trained on if you have some; pass
over its rows with `--skip-train-samples`. Rows need no labels: without, mask and alpha are fitted to the donor's own
outputs (`--objective donor`), and the graft is measured by how much it agrees with the donor. Without --base and
--donor, a donor is made first, on a built-in task.
"""

from __future__ import annotations

import copy
import json
import os
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
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
from make_donor import DonorArguments, make_donor
from peft_graft import RULES, AlphaCallback, DonorObjectiveMixin, GraftConfig, initialize_graft, use_donor_outputs
from peft_graft.analysis.metrics import Agreement
from peft_graft.training.callbacks import GraftCallback, last_checkpoint
from peft_graft.training.donor_objective import divergence
from peft_graft.training.donor_outputs import Distributions
from peft_graft.workflows.push import write_card

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DONOR_ROWS = 2048  # training rows of a donor that is made here


@dataclass
class GraftArguments:
    """Flags: the models, the budget, the rule, the data, and how long to train."""

    base: str | None = field(
        default=None, metadata={"help": "Base model: directory or Hub id. Default: made here, with its donor."}
    )
    donor: str | None = field(
        default=None, metadata={"help": "Donor, the fine-tuned base: directory or Hub id. Default: made here."}
    )
    train: str = field(
        default=tasks.DOCSTRINGS,
        metadata={
            "help": "Rows that fit mask and alpha, preferably not the donor's own: a .json, .jsonl or .csv file, a Hub "
            "data set as id[:config[:split]], or 'docstrings', the embedded task."
        },
    )
    validation: str | None = field(
        default=None, metadata={"help": "Rows to measure on. Default: the test split of the embedded task."}
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "Text column, or two columns for pairs. Default: as found."}
    )
    label_column: str = field(
        default="label", metadata={"help": "Column of the labels; rows without it are taken as unlabelled."}
    )
    objective: str | None = field(
        default=None,
        metadata={
            "choices": ["labels", "donor"],
            "help": "Fit mask and alpha to the labels, or to the donor's own outputs. Default: labels, if any.",
        },
    )
    donor_outputs: str | None = field(
        default=None,
        metadata={"help": "Directory of the donor's outputs that store_donor_outputs wrote. Default: computed here."},
    )
    density: float | None = field(
        default=None, metadata={"help": "Share of the eligible entries to take, in (0, 1]. Default 1e-3."}
    )
    num_params: int | None = field(default=None, metadata={"help": "Number of entries to take, instead of --density."})
    selection: str = field(
        default="learned",
        metadata={
            "choices": list(RULES),
            "help": "Rule that chooses the entries. " + "; ".join(f"{r.name}: {r.help}" for r in RULES.values()),
        },
    )
    alpha: str = field(default="auto", metadata={"help": "Scale of the patch: a number, or 'auto' to fit it."})
    alpha_scope: str = field(
        default="global", metadata={"help": "Fit one alpha for all tensors ('global') or one per 'tensor'."}
    )
    values: str = field(
        default="donor",
        metadata={
            "choices": ["donor", "sign", "int4", "int8"],
            "help": "What is stored of an entry: the donor's value, or a code of its delta, of 1, 4 or 8 bits.",
        },
    )
    candidate_ratio: float = field(
        default=10.0, metadata={"help": "Candidates of a learned mask, as a multiple of the budget."}
    )
    learning_rate: float = field(
        default=0.1, metadata={"help": "Learning rate of the mask logits, which start in [-1, 1]."}
    )
    epochs: float = field(default=2.0, metadata={"help": "Passes of a learned mask over its training rows."})
    batch_size: int = field(default=32, metadata={"help": "Rows per step on each device."})
    max_train_samples: int = field(default=2048, metadata={"help": "Rows that train or score the mask."})
    calibration_samples: int = field(default=512, metadata={"help": "Other rows of --train that fit alpha."})
    skip_train_samples: int = field(
        default=0, metadata={"help": "Shuffled rows of --train to skip, because the donor was trained on them."}
    )
    max_validation_samples: int | None = field(
        default=None, metadata={"help": "Measure on this many rows. Default: all."}
    )
    max_length: int = field(default=64, metadata={"help": "Tokens per text; longer ones are cut."})
    seed: int = field(default=0, metadata={"help": "Seed of the rows, their order and the selection."})
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to resume (in <output-dir>/checkpoints), or 'last' for the last complete one, if any."
        },
    )
    save_steps: int = field(default=0, metadata={"help": "Write a checkpoint every this many steps; 0 for none."})
    data_name: str | None = field(
        default=None, metadata={"help": "Name of the data in the card, such as SST-2. Default: the names of the files."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that comes with a model which transformers lacks."}
    )
    output_dir: str = field(default="graft_out", metadata={"help": "Directory for the adapter and metrics.json."})


class GraftTrainer(DonorObjectiveMixin, Trainer):
    """A Trainer whose loss is the objective of the graft."""


def batches(encoded: Dataset, tokenizer: PreTrainedTokenizerBase, size: int = 64) -> list[dict[str, torch.Tensor]]:
    """Return batches of rows of similar length, each padded to its own longest row."""
    collate = tasks.collator(tokenizer)
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]["input_ids"]))
    return [dict(collate([encoded[row] for row in order[i : i + size]])) for i in range(0, len(order), size)]


def named(source: str, args: GraftArguments) -> str:
    """Return the name of a file of rows in the card."""
    return f"{args.data_name} ({Path(source).name})" if args.data_name else source


def load_classifier(role: str, source: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a sequence classifier, but not one whose head would be random.

    Args:
        role: `"base"` or `"donor"`, for the message.
        source: Directory or Hub id.
        trust_remote_code: Whether to run code that comes with the checkpoint; without it, nothing is asked.

    Returns:
        The model.

    Raises:
        ValueError: The checkpoint lacks tensors of the model.
    """
    model, info = AutoModelForSequenceClassification.from_pretrained(
        source, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{role} must hold a trained head for sequence classification, got {source!r} without "
            f"{', '.join(missing[:5])}{', ...' if missing[5:] else ''}: its scores would be those of a random "
            "head. Train the head first (examples/make_donor.py writes a base with a linear probe, and its donor), "
            f"or name another checkpoint with --{role}."
        )
    return model


def fit(
    base: PreTrainedModel,
    donor: Any,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    calibration: Dataset,
    args: GraftArguments,
) -> PeftModel:
    """Graft a donor into a base: select or learn the mask on `train`, fit alpha on `calibration`.

    Args:
        base: The base, which is wrapped in place.
        donor: Directory, Hub id or module, as for `GraftConfig(donor=...)`.
        tokenizer: Tokenizer of the base, for padding.
        train: Tokenized rows for the mask.
        calibration: Tokenized rows for alpha.
        args: Flags, see `--help`.

    Returns:
        The grafted model, in evaluation mode.
    """
    set_seed(args.seed)
    density = 1e-3 if args.density is None and args.num_params is None else args.density
    config = GraftConfig(
        donor=donor,
        density=density,
        num_params=args.num_params,
        selection=args.selection,
        candidate_ratio=args.candidate_ratio,
        alpha="auto" if args.alpha == "auto" else float(args.alpha),
        alpha_scope=args.alpha_scope,
        values=args.values,
        objective=args.objective or "labels",
        task_type="SEQ_CLS",
        seed=args.seed,
    )
    model = get_peft_model(base, config)
    if args.donor_outputs is not None:
        use_donor_outputs(model, args.donor_outputs)
    held_out = batches(calibration, tokenizer)
    state = tasks.launched()
    if config.needs_data or config.selection == "sigmoid":
        share = slice(state.process_index, None, state.num_processes)  # of the batches, for each process
        initialize_graft(model, batches(train, tokenizer, args.batch_size)[share], calibration=held_out[share])
    if args.selection == "learned":
        training_args = TrainingArguments(
            output_dir=os.path.join(args.output_dir, "checkpoints"),
            learning_rate=args.learning_rate,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            # Batches by length cannot be drawn again where a run is resumed in the middle of an epoch.
            **({} if args.save_steps or args.resume_from_checkpoint else tasks.BY_LENGTH),
            seed=args.seed,
            logging_steps=16,
            save_strategy="steps" if args.save_steps else "no",
            save_steps=args.save_steps or 500,
            save_total_limit=2,
            report_to="none",
            average_tokens_across_devices=False,  # the mean of the ranks' losses, whatever their number
            ddp_broadcast_buffers=False,  # the patch is the same on all of them
            dataloader_pin_memory=state.device.type != "cpu",
        )
        callbacks = [AlphaCallback(held_out) if config.alpha == "auto" else GraftCallback()]
        options = {"args": training_args, "train_dataset": train, "data_collator": tasks.collator(tokenizer)}
        trainer = GraftTrainer(model, callbacks=callbacks, **options)
        resume = args.resume_from_checkpoint
        trainer.train(resume_from_checkpoint=last_checkpoint(training_args.output_dir) if resume == "last" else resume)
        model.trainer = trainer  # a sharded model runs as long as the engine of its Trainer lives
    return model.eval()


def helped(model: PeftModel) -> bool | None:
    """Return whether the training of a mask has lowered the calibration loss; None where none was trained."""
    trainer = getattr(model, "trainer", None)
    callbacks = [] if trainer is None else trainer.callback_handler.callbacks
    return next((each.helped for each in callbacks if isinstance(each, AlphaCallback)), None)


def own_donor(args: GraftArguments) -> tuple[Path, Path]:
    """Make a donor in the output directory, or find the one that was made there.

    Args:
        args: Flags, see `--help`. The donor is trained on the first `DONOR_ROWS` shuffled rows of train.

    Returns:
        Directories of base and donor.

    Raises:
        ValueError: The directory holds a donor that was made with other flags.
    """
    out, state = Path(args.output_dir), tasks.launched()
    donor_args = DonorArguments(
        train=args.train, validation=args.validation, max_train_samples=DONOR_ROWS, optimizer="adamw", seed=args.seed,
        text_columns=args.text_columns, label_column=args.label_column, output_dir=args.output_dir,
    )  # fmt: skip
    if (out / "donor" / "model.safetensors").exists():
        made = json.loads((out / "donor_metrics.json").read_text(encoding="utf-8"))["arguments"]
        if made != json.loads(json.dumps(asdict(donor_args))):
            raise ValueError(
                f"output_dir must hold no donor made with other flags, got {args.output_dir!r}. "
                "Choose another --output-dir, or name the donor with --base and --donor."
            )
    else:
        print("making the donor: a linear probe of the head, then fine-tuning ...", flush=True)
        make_donor(donor_args)
        if state.is_main_process:
            (out / "metrics.json").rename(out / "donor_metrics.json")
        state.wait_for_everyone()
    return out / "base", out / "donor"


def run(args: GraftArguments) -> dict[str, Any]:
    """Measure base and donor, graft, measure, save, and check the saved adapter.

    Args:
        args: Flags, see `--help`.

    Returns:
        The content of `metrics.json`.

    Raises:
        ValueError: The flags do not fit together, a checkpoint has no head for the task, or the reloaded graft differs.
    """
    if (args.base is None) != (args.donor is None):
        raise ValueError(f"base and donor must be given together, got {args.base!r} and {args.donor!r}. Give both.")
    state, out = tasks.launched(), Path(args.output_dir)
    if args.base is None:
        args.base, args.donor = (str(path) for path in own_donor(args))
        args.skip_train_samples += DONOR_ROWS
    skip = args.skip_train_samples
    tokenizer = AutoTokenizer.from_pretrained(args.base, trust_remote_code=args.trust_remote_code)
    base = load_classifier("base", args.base, args.trust_remote_code)
    names = [base.config.id2label[index] for index in range(base.config.num_labels)]
    options: dict[str, Any] = {"text_columns": args.text_columns, "label_column": args.label_column}
    embedded = args.train == tasks.DOCSTRINGS
    wanted = args.max_train_samples + args.calibration_samples
    rows = tasks.load_rows(args.train, "train", **options, limit=wanted, skip=skip, seed=args.seed)
    if not embedded:
        options["label_names"] = tasks.label_names(rows) or None
    args.objective = args.objective or ("labels" if "label" in rows.column_names else "donor")
    held_out = min(args.calibration_samples, len(rows) // 2)
    calibration = tasks.tokenize(rows.select(range(held_out)), tokenizer, args.max_length)
    train = tasks.tokenize(rows.select(range(held_out, len(rows))), tokenizer, args.max_length)
    measured_on = tasks.load_rows(
        args.validation or args.train, "test" if args.validation is None else "validation", **options,
        limit=args.max_validation_samples,
    )  # fmt: skip
    test = tasks.tokenize(measured_on, tokenizer, args.max_length)

    fresh = copy.deepcopy(base) if state.is_main_process else None  # engines change how models are loaded later
    base.to(state.device).eval()
    logits, labels = tasks.predict(base, test, tokenizer)
    scores = {"base": tasks.measure(logits, labels)}
    donor = load_classifier("donor", args.donor, args.trust_remote_code).to(state.device).eval()
    donor_logits, _ = tasks.predict(donor, test, tokenizer)
    scores["donor"] = tasks.measure(donor_logits, labels)
    del donor

    if state.is_main_process:
        fitted_to = "the labels" if args.objective == "labels" else "the donor's outputs"
        print(f"grafting: {args.selection} mask, alpha {args.alpha}, fitted to {fitted_to} ...", flush=True)
    started = time.perf_counter()
    model = fit(base, args.donor, tokenizer, train, calibration, args)
    seconds = time.perf_counter() - started
    graft_logits, _ = tasks.predict(model, test, tokenizer)
    scores["graft"] = tasks.measure(graft_logits, labels)
    for name, found in (("base", logits), ("donor", donor_logits), ("graft", graft_logits)):
        decisions = {"predictions": found.argmax(-1).tolist(), "references": donor_logits.argmax(-1).tolist()}
        scores[name] |= Agreement().compute(**decisions)
        scores[name]["kl"] = float(divergence(Distributions.of(donor_logits, donor_logits.shape[-1]), found).mean())
        if labels is not None:
            lost = (logits.argmax(-1) == labels) & (found.argmax(-1) != labels)
            scores[name]["forgotten"] = float(lost.float().mean())  # right with the base, wrong with this one

    model.save_pretrained(out, is_main_process=state.is_main_process)  # shards want every rank to do the same
    if state.is_main_process:
        reloaded, _ = tasks.predict(PeftModel.from_pretrained(fresh.to(state.device), out).eval(), test, tokenizer)
        if not torch.equal(reloaded, graft_logits):
            difference = float((reloaded - graft_logits).abs().max())
            raise ValueError(f"reloaded logits must equal the graft's, got a difference of {difference!r}.")
    config = model.peft_config["default"]
    accuracy = {name: found.get("accuracy") for name, found in scores.items()}
    gain = None if labels is None else accuracy["donor"] - accuracy["base"]
    report = {
        **scores,
        "share_of_accuracy": None if labels is None else accuracy["graft"] / accuracy["donor"],
        "share_of_gain": (accuracy["graft"] - accuracy["base"]) / gain if gain else None,
        "objective": args.objective,
        "training_helped": helped(model),
        "entries": config.record.entries,
        "eligible": config.record.eligible,
        "alpha": config.alpha,
        "bytes": sum((out / name).stat().st_size for name in ADAPTER_FILES) if state.is_main_process else None,
        "seconds": round(seconds, 2),
        "labels": names,
        "data": {"train": named(args.train, args), "validation": named(args.validation or args.train, args)},
        "rows": {"train": len(train), "calibration": len(calibration), "validation": len(test)},
        "arguments": asdict(args),
        "versions": {name: version(name) for name in ("peft-graft", "torch", "transformers", "peft", "accelerate")},
    }
    if args.validation not in (None, args.train) or embedded:
        report["note"] = "The measured split was not used for the mask or for alpha."
    if state.is_main_process:
        write_card(out, report)
        (out / "metrics.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def table(report: dict[str, Any]) -> str:
    """Return a table of base, donor and graft, and the size of the graft, as text."""
    columns = [name for name in ("accuracy", "f1", "ece", "loss", "agreement", "kl") if name in report["graft"]]
    lines = [f"{'':6}" + "".join(f"{name:>11}" for name in columns)]
    for name in ("base", "donor", "graft"):
        lines.append(f"{name:6}" + "".join(f"{report[name][column]:11.4f}" for column in columns))
    alpha = f"{report['alpha']:.3g}" if isinstance(report["alpha"], float | int) else "one per tensor"
    gain = "" if report["share_of_gain"] is None else f" and {report['share_of_gain']:.1%} of its gain over the base"
    reached = f"agrees with the donor in {report['graft']['agreement']:.1%} of the rows"
    if report["share_of_accuracy"] is not None:
        reached = f"reaches {report['share_of_accuracy']:.1%} of the donor's accuracy{gain}"
    if report["training_helped"] is False:
        lines.append("\nTraining the mask did not help; the mask and alpha that it started from are kept.")
    lines += [
        f"\nThe graft {reached}",
        f"with {report['entries']:,} of {report['eligible']:,} entries "
        f"({report['entries'] / report['eligible']:.4%}), {report['bytes'] / 1024:.1f} KiB on disk, alpha {alpha}, "
        f"found in {report['seconds']:.0f} s.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the flags, run, and print the table."""
    parser = HfArgumentParser(GraftArguments, description=__doc__.partition("\n")[0])
    (args,) = parser.parse_args_into_dataclasses()
    report = run(args)
    if tasks.launched().is_main_process:
        print("\n" + table(report))
        print(f"saved and reloaded with equal logits: {args.output_dir}/{', '.join(ADAPTER_FILES)}")
        print(f"model card: {args.output_dir}/README.md")


if __name__ == "__main__":
    main()
