"""Parse the command line, run a command of the table, and report errors in one line."""

from __future__ import annotations

import argparse
import logging
import sys
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .commands import COMMANDS

PROGRAM = "peft-graft"
_EPILOG = f"""\
examples:
  {PROGRAM} extract org/base org/finetuned --output-dir skill --density 1e-3
  {PROGRAM} inspect skill
  {PROGRAM} push me/skill skill --private

`{PROGRAM} COMMAND --help` has more examples and all options.
Bases, donors and adapters are directories or Hub ids.
exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage, 130 interrupted,
128 + number ended by a signal"""


class Parser(argparse.ArgumentParser):
    """Argument parser that also takes `--snake_case` for `--kebab-case`, and no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(
            *args, **{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs}
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse the arguments of the process, or those given, after replacing `_` in the names of options by `-`."""
        given = sys.argv[1:] if args is None else list(args)
        end = given.index("--") if "--" in given else len(given)
        return super().parse_known_args([*map(_kebab_case, given[:end]), *given[end:]], namespace)


def _kebab_case(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def build_parser() -> Parser:
    """Build the parser of all commands."""
    parser = Parser(
        PROGRAM,
        description="Store the skill of a fine-tuned checkpoint as a small PEFT adapter. No model is loaded.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version(PROGRAM)}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=textwrap.fill(command.description, 79),
            epilog=f"examples:\n{command.examples}",
        )
        command.add_arguments(subparser)
        subparser.add_argument(
            "--quiet", action="store_true", help="print the result alone: no progress bars, notes or warnings"
        )
        subparser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments. Default: those of the process.

    Returns:
        The exit code: 0 for success, 1 for a failure, 130 for an interrupt, 128 + its number for another
        signal. Wrong usage exits with 2 instead.
    """
    args = build_parser().parse_args(argv)
    run = {command.name: command.run for command in COMMANDS}[args.command]
    before = _list_output(args)
    try:
        with _own_warnings(args.quiet), _progress_bars(not args.quiet):
            run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted{_outcome(args, before)}", file=sys.stderr)
        return 130
    except SystemExit as error:
        from ..patch.atomic import Terminated  # not before the command, which imports the library in its own time

        if not isinstance(error, Terminated):
            raise
        print(f"{PROGRAM}: ended by {error.name}{_outcome(args, before)}", file=sys.stderr)
        return int(error.code or 1)
    # DonorError, PatchError and SelectionError are ValueErrors; errors of the Hub and of the file system are OSErrors.
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        print(f"{PROGRAM}: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    return 0


_Listing = set[tuple[str, int, int]] | None


def _list_output(args: argparse.Namespace) -> _Listing:
    """Return the identities of the files in a command's output directory, None if there is no such directory."""
    directory = Path(args.output_dir) if hasattr(args, "output_dir") else None
    if directory is None or not directory.is_dir():
        return None
    stats = {file.name: file.stat() for file in directory.iterdir() if file.is_file()}
    return {(name, stat.st_mtime_ns, stat.st_ino) for name, stat in stats.items()}


def _outcome(args: argparse.Namespace, before: _Listing) -> str:
    """Describe the state that an interrupted command leaves behind, as far as it can be known."""
    if args.command == "push":
        return f"; look at {args.repo_id} on the Hub, which may have changed"
    if not hasattr(args, "output_dir"):
        return ""
    after = _list_output(args)
    if after == before:
        return f"; nothing was written to {args.output_dir}"
    if before is None:
        return f" after {args.output_dir} was written; it is complete"
    return f" while files in {args.output_dir} were replaced; run the command again with --overwrite"


@contextmanager
def _own_warnings(quiet: bool) -> Iterator[None]:
    """Show the warnings of this package in one line each, unless `quiet`, and no warnings of other libraries."""

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        print(f"{PROGRAM}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not quiet:
            warnings.filterwarnings("default", module=r"peft_graft(\.|$)")
            warnings.showwarning = show
        with _own_notes(quiet):
            yield


@contextmanager
def _own_notes(quiet: bool) -> Iterator[None]:
    """Show the log of this package in one line each, unless `quiet`."""
    log, handler = logging.getLogger("peft_graft"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{PROGRAM}: note: %(message)s"))
    level, propagate = log.level, log.propagate
    log.setLevel(logging.CRITICAL if quiet else logging.WARNING)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
        log.setLevel(level)


@contextmanager
def _progress_bars(enabled: bool) -> Iterator[None]:
    """Switch off the progress bars of huggingface_hub, which this package uses too, unless `enabled`."""
    if enabled:
        yield
        return
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
