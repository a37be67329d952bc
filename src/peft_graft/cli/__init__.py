"""Parse and run the command line. Nothing heavy is imported before a command runs."""

from .main import main

__all__ = ["main"]
