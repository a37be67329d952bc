"""The table of commands: each adds its arguments, and imports what it needs when it runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .ahead import reading_ahead

_REGEX = set("*+?|()[]^$\\")


@dataclass(frozen=True)
class Command:
    """One row of the table of commands.

    Args:
        name: What the user types.
        summary: One line for `--help`.
        description: What it does, for the command's own `--help`.
        examples: Lines that can be pasted.
        arguments: Adds the command's arguments to its parser.
        run: Does it.
    """

    name: str
    summary: str
    description: str
    examples: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


# extract


def _extract_arguments(parser: argparse.ArgumentParser) -> None:
    _base_and_donor(parser, "; 'zeros' for a donor that is zero everywhere")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="the adapter's directory")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--density", type=float, metavar="D", help="share of the targeted entries to take, in (0, 1]")
    budget.add_argument("--num_params", type=int, metavar="N", help="the same as a number of entries")
    budget.add_argument("--exact", action="store_true", help="take every entry that differs: a lossless patch")
    parser.add_argument("--selection", default="magnitude", metavar="RULE", help="magnitude (default) or random")
    parser.add_argument("--scope", default="global", choices=("global", "tensor"), help="one budget, or one per tensor")
    parser.add_argument(
        "--granularity", default="entry", choices=("entry", "tensor", "layer"), help="take entries, tensors or layers"
    )
    parser.add_argument(
        "--target_modules",
        nargs="+",
        metavar="NAME",
        help="modules by the end of their names, or one regular expression, or 'all'; default: all but embeddings "
        "and the head",
    )
    parser.add_argument("--exclude_modules", nargs="+", metavar="NAME", help="modules to leave alone, in the same way")
    parser.add_argument("--modules_to_save", nargs="+", metavar="NAME", help="modules to take whole from the donor")
    parser.add_argument("--alpha", type=float, default=1.0, help="scale of the patch; 1 (default) gives donor's bits")
    parser.add_argument("--task_type", metavar="TYPE", help="PEFT's, such as CAUSAL_LM; default: the donor's class")
    parser.add_argument("--seed", type=int, default=0, help="of the random rule; default 0")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is in DIR")


def _extract(args: argparse.Namespace) -> None:
    with reading_ahead(args.base, args.donor):
        from ..tuner import GraftConfig
        from ..workflows.extract import extract
        from ..workflows.format import size

    config = GraftConfig(
        donor=args.donor,
        donor_revision=args.donor_revision,
        density=args.density,
        num_params=args.num_params,
        selection=args.selection,
        scope=args.scope,
        granularity=args.granularity,
        target_modules=_modules(args.target_modules),
        exclude_modules=_modules(args.exclude_modules),
        modules_to_save=args.modules_to_save,
        alpha=args.alpha,
        task_type=args.task_type,
        seed=args.seed,
    )
    start = time.perf_counter()
    done = extract(
        args.base,
        config,
        args.output_dir,
        base_revision=args.base_revision,
        exact=args.exact,
        overwrite=args.overwrite,
        progress=sys.stderr.isatty(),
    )
    seconds = time.perf_counter() - start
    print(
        f"{done.directory}: {done.entries:,} of {done.eligible:,} entries, {size(done.nbytes)}, "
        f"{done.nbytes / max(done.entries, 1):.2f} bytes an entry in all, in {seconds:.1f} s"
    )


# inspect


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    _adapter(parser)
    _json(parser)


def _inspect(args: argparse.Namespace) -> None:
    from ..workflows.inspect import read_anatomy

    found = read_anatomy(args.adapter, args.revision)
    print(_dumps(found.to_dict()) if args.json else found.to_text())


# diff


def _diff_arguments(parser: argparse.ArgumentParser) -> None:
    _base_and_donor(parser)
    parser.add_argument("--by", default="layer", choices=("layer", "tensor"), help="one row per layer, or per tensor")
    _json(parser)


def _diff(args: argparse.Namespace) -> None:
    with reading_ahead(args.base, args.donor):
        from tqdm import tqdm

        from ..workflows.diff import compare

    with tqdm(unit="B", unit_scale=True, desc="reading", disable=not sys.stderr.isatty()) as bar:

        def on_start(total: int) -> Callable[[int], object]:
            bar.reset(total)
            return bar.update

        found = compare(
            args.base,
            args.donor,
            base_revision=args.base_revision,
            donor_revision=args.donor_revision,
            on_start=on_start,
        )
    print(_dumps(found.to_dict()) if args.json else found.to_text(by_tensor=args.by == "tensor"))


# stitch


def _stitch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="directories or Hub ids (id@revision) of grafts")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="the new adapter's directory")
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="how far to go towards each; 1 (default) is all the way"
    )
    parser.add_argument(
        "--combination",
        default="linear",
        choices=("linear", "mean", "disjoint", "ties"),
        help="what becomes of an entry that several take: the sum of their deltas (linear, default), their mean, the "
        "base's own (disjoint), or the mean of the deltas with the majority's sign (ties)",
    )
    parser.add_argument("--base", metavar="BASE", help="the base's directory or Hub id; default: as the adapters say")
    parser.add_argument("--base_revision", metavar="REV", help="branch, tag or commit of a base on the Hub")
    parser.add_argument("--modules_to_save_from", metavar="ADAPTER", help="whose task head to take, where they differ")
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is in DIR")


def _stitch(args: argparse.Namespace) -> None:
    from ..workflows.format import size
    from ..workflows.stitch import stitch_adapters

    done = stitch_adapters(**_options(args))
    print(
        f"{done.directory}: {done.entries:,} entries, {size(done.nbytes)}; "
        f"taken by more than one of the {len(args.adapters)} adapters: {done.conflicts:,}"
    )


# export


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    _adapter(parser)
    parser.add_argument(
        "--to",
        required=True,
        choices=("checkpoint", "vllm", "shira", "lora"),
        help="checkpoint: the whole merged model. vllm: indices and values for CheckpointWeightPatch. shira, lora: "
        "adapters that PEFT loads without this package",
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="where to write")
    parser.add_argument("--base", metavar="BASE", help="the base's directory or Hub id; default: as the adapter says")
    parser.add_argument("--base_revision", metavar="REV", help="branch, tag or commit of a base on the Hub")
    parser.add_argument("--rank", type=int, default=8, help="of a LoRA adapter; default 8")
    parser.add_argument("--overwrite", action="store_true", help="write into a directory that is not empty")
    _json(parser)


def _export(args: argparse.Namespace) -> None:
    from ..workflows.export import export
    from ..workflows.format import table

    done = export(
        args.adapter,
        args.to,
        args.output_dir,
        base=args.base,
        base_revision=args.base_revision,
        revision=args.revision,
        rank=args.rank,
        overwrite=args.overwrite,
    )
    if args.json:
        print(_dumps(done.to_dict()))
        return
    print(f"{done.directory}: {done.carried:,} of {done.entries:,} entries of the patch")
    for kind, count in done.left_out.items():
        print(f"left out: {count:,} entries of {kind}")
    for note in done.notes:
        print(f"note: {note}")
    if done.errors:
        print(
            table(("module", "|delta - BA| / |delta|"), [(name, f"{error:.3f}") for name, error in done.errors.items()])
        )


# push


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="the adapter's directory")
    parser.add_argument("repo_id", metavar="REPO", help="owner/name; created where it does not exist")
    parser.add_argument("--private", action=argparse.BooleanOptionalAction, help="default: as the owner's new ones are")
    parser.add_argument("--revision", metavar="REV", help="branch, created where it does not exist")
    parser.add_argument("--commit_message", metavar="TEXT")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--metrics", metavar="FILE", help="JSON of what was measured, for the card")


def _push(args: argparse.Namespace) -> None:
    from ..workflows.push import push

    print(push(**_options(args)).commit_url)


# What several commands take


def _base_and_donor(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument("base", metavar="BASE", help="directory or Hub id of the pretrained checkpoint (safetensors)")
    parser.add_argument("donor", metavar="DONOR", help=f"the same of the fine-tuned one{more}")
    parser.add_argument("--base_revision", metavar="REV", help="branch, tag or commit of a base on the Hub")
    parser.add_argument("--donor_revision", metavar="REV", help="the same of the donor")


def _adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="the adapter's directory or Hub id")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of an adapter on the Hub")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What the command itself was told, for a function whose arguments have the same names."""
    return {key: value for key, value in vars(args).items() if key not in ("command", "traceback")}


def _modules(names: list[str] | None) -> list[str] | str | None:
    """One value may be a regular expression or PEFT's word for a set of modules; several are names."""
    if names is not None and len(names) == 1 and (names[0] in ("all", "all-linear") or _REGEX & set(names[0])):
        return names[0]
    return names


def _dumps(fields: dict[str, Any]) -> str:
    return json.dumps(fields, indent=2)


# The table


COMMANDS: tuple[Command, ...] = (
    Command(
        "extract",
        "a base and a donor in files -> an adapter, without loading either",
        "Write the adapter that holds the entries in which a donor differs most from its base. Both are read piece by "
        "piece, and memory does not grow with them.",
        """\
  # one entry in a thousand, by |donor - base|
  peft-graft extract org/base org/finetuned --output_dir skill --density 1e-3

  # every entry that differs: lossless, and small where the donor changed few (RL)
  peft-graft extract org/base org/finetuned --output_dir skill --exact

  # attention only, of local checkpoints, with the donor's whole head
  peft-graft extract ./base ./donor --output_dir skill --num_params 10000 \\
      --target_modules q_proj v_proj --modules_to_save lm_head""",
        _extract_arguments,
        _extract,
    ),
    Command(
        "inspect",
        "bytes, layers and origin of an adapter",
        "Show what an adapter is made of: its bytes, its entries by layer and kind of module, the fingerprint of its "
        "base and how it was made. No model is loaded.",
        """\
  peft-graft inspect skill
  peft-graft inspect me/skill --revision v1 --json | jq .bytes_per_entry""",
        _inspect_arguments,
        _inspect,
    ),
    Command(
        "diff",
        "how close two checkpoints are, layer by layer",
        "Compare two checkpoints: how many entries differ, and their distances (mean |d|, |d| and cosine), layer by "
        "layer. What was fine-tuned, and what is worth targeting?",
        """\
  peft-graft diff org/base org/finetuned
  peft-graft diff ./base ./donor --by tensor --json > closeness.json""",
        _diff_arguments,
        _diff,
    ),
    Command(
        "stitch",
        "several adapters of one base -> one that holds all their skills",
        "Write the adapter that combines others, each taken with its own alpha times its weight. It needs neither "
        "them nor their donors. The base's files are read where the patches are; no model is loaded.",
        """\
  # the sum of two skills, and how often they get in each other's way
  peft-graft stitch reviews news --output_dir both

  # half of one from the Hub, by majority of signs, with the other one's head
  peft-graft stitch reviews me/news@v1 --weights 1 0.5 --combination ties \\
      --modules_to_save_from reviews --output_dir both""",
        _stitch_arguments,
        _stitch,
    ),
    Command(
        "export",
        "an adapter -> a checkpoint, a patch for vLLM, a SHiRA or LoRA adapter",
        "Write an adapter in a form that others load, and say what that form cannot hold.",
        """\
  # the whole model, merged; equal to the base outside of the patch, bit for bit
  peft-graft export skill --to checkpoint --output_dir merged

  # flat indices and values in the base's own files, for vLLM's CheckpointWeightPatch
  peft-graft export skill --to vllm --output_dir patch

  # for whoever has PEFT alone: the Linear weights exactly, or their best rank-16 approximation
  peft-graft export skill --to shira --output_dir skill-shira
  peft-graft export skill --to lora --rank 16 --output_dir skill-lora""",
        _export_arguments,
        _export,
    ),
    Command(
        "push",
        "an adapter -> the Hub, with its card, in one commit",
        "Publish an adapter: its two files, its card and the card's pictures, in one commit. Local paths are not "
        "published.",
        """\
  peft-graft push skill me/skill --private
  peft-graft push skill me/skill --metrics metrics.json --create_pr""",
        _push_arguments,
        _push,
    ),
)
