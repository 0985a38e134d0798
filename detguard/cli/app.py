"""The program: its options, its errors, its consoles."""

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeRemainingColumn

from detguard import DetguardError, __version__
from detguard.engine import keep_freed_memory

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Attack object detectors, harden them, and prove both in COCO numbers.",
)
out = Console()
err = Console(stderr=True)

Model = Annotated[
    str,
    typer.Option(
        help="Bundled name, .pt or .safetensors file, or a name of Ultralytics or torchvision such as yolo11n."
    ),
]
ImageSize = Annotated[
    int | None, typer.Option(min=32, max=4096, help="Longest side of a frame, px; default: the model's own.")
]
Confidence = Annotated[
    float, typer.Option(min=0.001, max=0.999, help="Confidence over which an object counts as found.")
]
Trust = Annotated[bool, typer.Option("--trust", help="Unpickle a .pt without the allow-list: it may run any code.")]
EndToEnd = Annotated[bool, typer.Option("--end-to-end", help="Use the head without NMS of YOLOv10 and YOLO26.")]
TopK = Annotated[
    int | None, typer.Option(min=1, help="Experts that a gated ensemble asks per photo; default: as it was made.")
]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda:0, ...")]
OutFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder for the results; default: the next runs/COMMAND/NNN.")
]
Resume = Annotated[Path | None, typer.Option(help="Go on with the run in this folder, with its own options.")]


def main() -> None:
    """Run the command line; errors that the user can mend become one line and exit code 2."""
    keep_freed_memory()
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    try:
        app()
    except DetguardError as error:
        show_error(str(error))
        sys.exit(2)


def show_error(message: str) -> None:
    """One line on stderr."""
    err.print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def show_warning(message: str) -> None:
    """One line on stderr."""
    err.print(f"warning: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def stop_signals() -> list[int]:
    """Have SIGINT and SIGTERM noted in the list that is returned, instead of ending the program."""
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: stopped.append(n))
    return stopped


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Print the version when asked."""
    if version:
        out.print(f"detguard {__version__}", highlight=False)
        raise typer.Exit


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A live line on stderr that leaves nothing behind: what is done, a bar, `columns`, and the time left."""
    description = TextColumn("{task.description}")
    return Progress(
        SpinnerColumn(), description, BarColumn(), *columns, TimeRemainingColumn(), console=err, transient=True
    )
