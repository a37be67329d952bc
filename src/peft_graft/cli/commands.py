"""List the commands. Each adds its arguments to a parser, and imports the library when it runs.

The options of a command have the names, defaults and meaning of the arguments of the function `peft_graft.<command>`,
except for `CLI_ONLY`, which concern the output.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .read_ahead import read_ahead
from .tables import format_size, print_diff, print_inspection, print_json, print_table

CLI_ONLY = frozenset({"command", "quiet", "traceback", "json", "by"})
_REGEX = set("*+?|()[]^$\\")


@dataclass(frozen=True)
class Command:
    """Row of the table of commands.

    Args:
        name: Name of the command.
        summary: One line for `peft-graft --help`.
        description: Description for the command's own `--help`.
        examples: Lines that can be pasted into a shell.
        add_arguments: Function that adds the command's arguments to its parser.
        run: Function that runs the command.
    """

    name: str
    summary: str
    description: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


# extract


def _add_extract(parser: argparse.ArgumentParser) -> None:
    _add_base_and_donor(parser, "; 'zeros' for a donor that is zero everywhere")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="directory of the adapter")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--density", type=float, metavar="D", help="share of the targeted entries to take, in (0, 1]")
    budget.add_argument("--num-params", type=int, metavar="N", help="the same as a number of entries")
    budget.add_argument("--exact", action="store_true", help="take every entry that differs, everywhere: lossless")
    parser.add_argument("--selection", default="magnitude", metavar="RULE", help="magnitude (default) or random")
    parser.add_argument(
        "--budget-scope", default="global", choices=("global", "tensor"), help="one budget, or one per tensor"
    )
    parser.add_argument(
        "--granularity",
        default="entry",
        choices=("entry", "tensor", "layer"),
        help="take single entries (default), or whole tensors or layers",
    )
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="modules to graft, by the end of their names, or one regular expression, or 'all'; default: all but "
        "embeddings and head",
    )
    parser.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="modules to leave alone, in the same way")
    parser.add_argument("--modules-to-save", nargs="+", metavar="NAME", help="modules to take whole from the donor")
    parser.add_argument(
        "--allow-extra", action="store_true", help="accept a donor with more tensors than the base; take what both have"
    )
    parser.add_argument(
        "--alpha", type=_number_or_norm, default=1.0, metavar="NUMBER|norm",
        help="scale of the patch; 1 (default) gives donor's bits, norm estimates it from the norms of the delta",
    )  # fmt: skip
    parser.add_argument(
        "--values",
        default="donor",
        choices=("donor", "sign", "int4", "int8"),
        help="what is stored of an entry: the donor's value (default), or a code of its delta, of 1, 4 or 8 bits",
    )
    parser.add_argument("--task-type", metavar="TYPE", help="PEFT's, such as CAUSAL_LM; default: the donor's class")
    parser.add_argument("--seed", type=int, default=0, help="seed of the rule random; default 0")
    _add_token(parser)
    _add_trust(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is in DIR")


def _run_extract(args: argparse.Namespace) -> None:
    with read_ahead(args.base, args.donor):
        from ..workflows.extract import extract

    options = _options(args)
    for key in ("target_modules", "exclude_modules"):
        options[key] = _names_or_pattern(options[key])
    start = time.perf_counter()
    done = extract(**options, show_progress_bar=_shows_progress(args))
    seconds = time.perf_counter() - start
    if args.quiet:
        print(done.directory)
        return
    print(
        f"{done.directory}: {done.entries:,} of {done.eligible:,} entries, {format_size(done.nbytes)}, "
        f"{done.nbytes / max(done.entries, 1):.2f} bytes per entry in all, in {seconds:.1f} s"
    )


# inspect


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add_adapter(parser)
    _add_token(parser)
    _add_json(parser)


def _run_inspect(args: argparse.Namespace) -> None:
    from ..workflows.inspect import inspect

    found = inspect(**_options(args))
    if args.json:
        print_json(found.to_dict())
    else:
        print_inspection(found)


# diff


def _add_diff(parser: argparse.ArgumentParser) -> None:
    _add_base_and_donor(parser)
    parser.add_argument("--by", default="layer", choices=("layer", "tensor"), help="one row per layer, or per tensor")
    _add_token(parser)
    _add_json(parser)


def _run_diff(args: argparse.Namespace) -> None:
    with read_ahead(args.base, args.donor):
        from ..workflows.diff import diff

    found = diff(**_options(args), show_progress_bar=_shows_progress(args))
    if args.json:
        print_json(found.to_dict())
    else:
        print_diff(found, args.by)


# stitch


def _add_stitch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="directories or Hub ids (id@revision) of grafts")
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="directory of the new adapter")
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="a factor for each adapter's deltas; 1 (default) is as it is",
    )
    parser.add_argument(
        "--combination-type",
        default="linear",
        choices=("linear", "mean", "disjoint", "ties"),
        help="value of an entry that several adapters take: the sum of their deltas (linear, default), their mean, the "
        "base's value (disjoint), or the mean of the deltas that have the majority's sign (ties)",
    )
    _add_base(parser, "the base that the adapters name")
    parser.add_argument(
        "--modules-to-save-from", metavar="ADAPTER", help="adapter whose task head is taken, if their heads differ"
    )
    _add_token(parser)
    _add_trust(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is in DIR")


def _run_stitch(args: argparse.Namespace) -> None:
    from ..workflows.stitch import stitch

    done = stitch(**_options(args))
    if args.quiet:
        print(done.directory)
        return
    print(
        f"{done.directory}: {done.entries:,} entries, {format_size(done.nbytes)}; "
        f"taken by more than one of the {len(args.adapters)} adapters: {done.conflicts:,}"
    )


# compress


def _add_compress(parser: argparse.ArgumentParser) -> None:
    _add_adapter(parser)
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="directory of the new adapter")
    parser.add_argument(
        "--values",
        default="sign",
        choices=("donor", "sign", "int4", "int8"),
        help="code of the deltas, of 1 (default), 4 or 8 bits; donor: keep the values, and pack an older file",
    )
    _add_base(parser, "the base that the adapter names")
    _add_token(parser)
    _add_trust(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is in DIR")


def _run_compress(args: argparse.Namespace) -> None:
    from ..workflows.compress import compress

    done = compress(**_options(args))
    if args.quiet:
        print(done.directory)
        return
    print(
        f"{done.directory}: {done.entries:,} entries, {format_size(done.nbytes)} instead of "
        f"{format_size(done.nbytes_before)}, {done.values_error:.1%} of the deltas' norm lost"
    )


# export


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_adapter(parser)
    parser.add_argument(
        "--to",
        required=True,
        choices=("checkpoint", "vllm", "weight_delta", "shira", "lora"),
        help="checkpoint: the whole merged model. vllm: indices and values in the base's files. weight_delta: changed "
        "bytes of the base's files, for SGLang. shira, lora: adapters that PEFT loads without this package",
    )
    parser.add_argument("--output-dir", required=True, metavar="DIR", help="directory to write")
    _add_base(parser, "the base that the adapter names")
    parser.add_argument("--rank", type=int, default=8, help="rank of a LoRA adapter; default 8")
    _add_token(parser)
    _add_trust(parser)
    parser.add_argument("--overwrite", action="store_true", help="write into a directory that is not empty")
    _add_json(parser)


def _run_export(args: argparse.Namespace) -> None:
    from ..workflows.export import export

    done = export(**_options(args))
    if args.json:
        print_json(done.to_dict())
        return
    if args.quiet:
        print(done.directory)
        return
    print(f"{done.directory}: {done.carried:,} of {done.entries:,} entries of the patch")
    for kind, count in done.left_out.items():
        print(f"left out: {count:,} entries of {kind}")
    for note in done.notes:
        print(f"note: {note}")
    if done.errors:
        rows = [(name, f"{error:.3f}") for name, error in done.errors.items()]
        print_table(("module", "|delta - BA| / |delta|"), rows)


# push


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo_id", metavar="REPO", help="owner/name; created if it does not exist")
    parser.add_argument("directory", metavar="DIR", help="directory of the adapter")
    parser.add_argument(
        "--private", action=argparse.BooleanOptionalAction, help="visibility of REPO; default: as the owner's new ones"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, created if it does not exist")
    parser.add_argument("--commit-message", metavar="TEXT", help="default: 'Upload graft with peft-graft'")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--metrics", metavar="FILE", help="JSON file of measurements, for the card")
    _add_token(parser)


def _run_push(args: argparse.Namespace) -> None:
    from ..workflows.push import push

    print(push(**_options(args)).commit_url)


# Arguments that several commands share


def _add_base_and_donor(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument("base", metavar="BASE", help="directory or Hub id of the pretrained checkpoint (safetensors)")
    parser.add_argument("donor", metavar="DONOR", help=f"directory or Hub id of the fine-tuned checkpoint{more}")
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of a base on the Hub")
    parser.add_argument("--donor-revision", metavar="REV", help="branch, tag or commit of a donor on the Hub")
    parser.add_argument("--base-subfolder", metavar="DIR", help="folder in BASE that holds its checkpoint")
    parser.add_argument("--donor-subfolder", metavar="DIR", help="folder in DONOR that holds its checkpoint")


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", help="directory or Hub id of the adapter")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of an adapter on the Hub")


def _add_base(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--base", metavar="BASE", help=f"directory or Hub id of the base; default: {default}")
    parser.add_argument("--base-revision", metavar="REV", help="branch, tag or commit of a base on the Hub")


def _add_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token", metavar="TOKEN", help="token for the Hub; default: HF_TOKEN, or `hf auth login`")


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with a model which transformers lacks"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments for the function of the same name as the command."""
    return {key: value for key, value in vars(args).items() if key not in CLI_ONLY}


def _shows_progress(args: argparse.Namespace) -> bool:
    return not args.quiet and sys.stderr.isatty()


def _number_or_norm(text: str) -> float | str:
    if text == "norm":
        return text
    try:
        return float(text)
    except ValueError:
        hint = " To fit it on data, load the adapter and call fit_alpha." if text == "auto" else ""
        raise argparse.ArgumentTypeError(f"must be a number or 'norm', got {text!r}.{hint}") from None


def _names_or_pattern(names: list[str] | None) -> list[str] | str | None:
    """Return a single word as a string if it is a regular expression or one of PEFT's words for a set of modules."""
    if names is not None and len(names) == 1 and (names[0] in ("all", "all-linear") or _REGEX & set(names[0])):
        return names[0]
    return names


# The table


COMMANDS: tuple[Command, ...] = (
    Command(
        "extract",
        "make an adapter from the files of a base and a donor",
        "Write the adapter that holds the entries in which a donor differs most from its base. Both are streamed from "
        "their files, so memory does not grow with the models.",
        """\
  # one entry in a thousand, by |donor - base|
  peft-graft extract org/base org/finetuned --output-dir skill --density 1e-3

  # every entry that differs: lossless, and small where the donor changed few (RL)
  peft-graft extract org/base org/finetuned --output-dir skill --exact

  # attention only, of local checkpoints, with the donor's whole head
  peft-graft extract ./base ./donor --output-dir skill --num-params 10000 \\
      --target-modules q_proj v_proj --modules-to-save lm_head""",
        _add_extract,
        _run_extract,
    ),
    Command(
        "inspect",
        "show bytes, layers and origin of an adapter",
        "Show the bytes of an adapter, its entries by layer and kind of module, the fingerprint of its base and how it "
        "was made. No model is loaded.",
        """\
  peft-graft inspect skill
  peft-graft inspect me/skill --revision v1 --json | jq .bytes_per_entry""",
        _add_inspect,
        _run_inspect,
    ),
    Command(
        "diff",
        "show how far apart two checkpoints are, layer by layer",
        "Compare two checkpoints layer by layer: the share of entries that differ, and their distances (mean |d|, |d| "
        "and the angle between them). It shows which layers were fine-tuned, and so which to target.",
        """\
  peft-graft diff org/base org/finetuned
  peft-graft diff ./base ./donor --by tensor --json > distances.json""",
        _add_diff,
        _run_diff,
    ),
    Command(
        "stitch",
        "combine several adapters of one base into one",
        "Write one adapter that combines others, each scaled by its own alpha times its weight. The new adapter needs "
        "neither them nor their donors. Of the base, only the patched entries are read.",
        """\
  # the sum of two skills, and the number of entries that both take
  peft-graft stitch reviews news --output-dir both

  # half of an adapter from the Hub, by majority of signs, with the other one's head
  peft-graft stitch reviews me/news@v1 --weights 1 0.5 --combination-type ties \\
      --modules-to-save-from reviews --output-dir both""",
        _add_stitch,
        _run_stitch,
    ),
    Command(
        "compress",
        "write an adapter with its values in 1, 4 or 8 bits",
        "Write an adapter whose values are a code of the deltas: signs times one scale in each tensor, or 4 or 8 bits. "
        "The entries stay the same. Of the base, only the patched entries are read.",
        """\
  # signs: enough for donors of AdamW
  peft-graft compress skill --output-dir smaller

  # 4 bits, where |delta| varies more
  peft-graft compress me/skill --values int4 --output-dir smaller""",
        _add_compress,
        _run_compress,
    ),
    Command(
        "export",
        "write an adapter as a checkpoint, for vLLM or SGLang, or as SHiRA or LoRA",
        "Write an adapter in a format that other programs load, and show which entries that format cannot hold.",
        """\
  # the whole model, merged; equal to the base outside of the patch, bit for bit
  peft-graft export skill --to checkpoint --output-dir merged

  # for a running server: indices and values in the base's own files for vLLM, changed bytes of them for SGLang
  peft-graft export skill --to vllm --output-dir patch
  peft-graft export skill --to weight_delta --output-dir versions

  # for PEFT without this package: the Linear weights exactly, or their best rank-16 approximation
  peft-graft export skill --to shira --output-dir skill-shira
  peft-graft export skill --to lora --rank 16 --output-dir skill-lora""",
        _add_export,
        _run_export,
    ),
    Command(
        "push",
        "publish an adapter on the Hub, with its card, in one commit",
        "Publish an adapter: its two files, its card and the card's pictures, in one commit. Local paths are left out.",
        """\
  peft-graft push me/skill skill --private
  peft-graft push me/skill skill --metrics metrics.json --create-pr""",
        _add_push,
        _run_push,
    ),
)
