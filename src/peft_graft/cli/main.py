"""The command line: parses, runs a command of the table, and tells errors in one line."""

from __future__ import annotations

import argparse
import sys
import textwrap
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from .commands import COMMANDS

PROGRAM = "peft-graft"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Store the skill of a fine-tuned checkpoint as a small PEFT adapter, without loading models.",
        epilog=f"Each command has examples: {PROGRAM} extract --help",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version(PROGRAM)}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        one = commands.add_parser(
            command.name,
            help=command.summary,
            description=textwrap.fill(command.description, 79),
            epilog=f"examples:\n{command.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(one)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments; by default those of the process.

    Returns:
        The exit code: 0, 2 where something given does not fit, or 130 when interrupted.
    """
    args = build_parser().parse_args(argv)
    run = {command.name: command.run for command in COMMANDS}[args.command]
    _show_own_warnings()
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; nothing was written", file=sys.stderr)
        return 130
    # DonorError, PatchError and SelectionError are ValueErrors; the Hub's and the file system's errors are OSErrors.
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        print(f"{PROGRAM}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _show_own_warnings() -> None:
    """Show what this package warns of, in one line; what its libraries tell developers is left out."""

    def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        print(f"{PROGRAM}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"peft_graft(\.|$)")
    warnings.showwarning = show
