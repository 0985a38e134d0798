"""The command line, one file per group of commands."""

from detguard.cli import adapt, attack, contract, evaluate, export, harden, monitor, pictures
from detguard.cli.app import main

__all__ = ["adapt", "attack", "contract", "evaluate", "export", "harden", "main", "monitor", "pictures"]
