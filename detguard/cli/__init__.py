"""The command line, one file per group of commands."""

from detguard.cli import attack, evaluate, harden, monitor
from detguard.cli.app import main

__all__ = ["attack", "evaluate", "harden", "main", "monitor"]
