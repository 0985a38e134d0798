"""The program: its options, its errors, its consoles."""

import gc
import json
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout
from errno import EINVAL
from io import BufferedWriter, FileIO, TextIOWrapper
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TimeRemainingColumn
from rich.status import Status
from rich.text import Text
from typing_extensions import Buffer, override

from detguard import DetguardError, __version__, first_line, is_out_of_memory
from detguard.engine import keep_freed_memory
from detguard.files import printable

if TYPE_CHECKING:
    from detguard.detectors.base import Detector
    from detguard.ranks import Ranks
    from detguard.runs import Run


class Terminal(Console):
    """A console that shows text as it is: no markup, no emoji codes, and nothing that a terminal would obey.

    still: no live lines; rank: of this process among those of a launch; lost: whether it has told of photos that could
    not be read.
    """

    still = False
    rank = 0
    lost = False

    @override
    def status(self, *args: Any, **options: Any) -> Status:
        shown = super().status(*args, **options)
        return Status(shown.status, console=Console(quiet=True)) if self.still else shown

    @property
    def moves(self) -> bool:
        """Whether live lines are shown: of a progress that cannot, rich leaves an empty line behind."""
        return self.is_interactive and not self.still

    def say(self, text: str, **options: Any) -> None:
        """Print a line in one piece, and of one colour whatever it says."""
        self.print(text, highlight=False, soft_wrap=True, **options)

    @override
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options | {"markup": False, "emoji": False})


class Output(FileIO):
    """A stream of the program, whose reader may end before it does, as `head`: what is left is dropped, and noted."""

    unread = False

    @classmethod
    def through(cls, stream: TextIO) -> TextIO:
        """A stream, as one of these where it is of the program."""
        raw = getattr(stream, "buffer", None)
        raw = getattr(raw, "raw", raw)
        if not isinstance(stream, TextIOWrapper) or not isinstance(raw, FileIO):
            return stream
        stream.flush()
        return TextIOWrapper(
            BufferedWriter(cls(raw.fileno(), "w", closefd=False)), stream.encoding, stream.errors,
            line_buffering=stream.line_buffering or stream.write_through,
        )  # fmt: skip

    @override
    def write(self, data: Buffer) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and (os.name != "nt" or error.errno != EINVAL):
                raise
            Output.unread = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


class Description(ProgressColumn):
    """What is being done, as text of the console that it is shown on."""

    @override
    def render(self, task: Task) -> str:
        return task.description


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Attack object detectors, harden them, and prove both in COCO numbers.",
)
# Fields whose options are called otherwise.
OPTIONS = {
    "class_map": "map", "detector": "model", "drift": "detector", "keep": "lambda", "measure": "loss",
    "objects": "object", "targets": "target",
}  # fmt: skip
# Options that a resumed run takes anew.
KEPT_BY_NO_RUN = {"resume", "trust", "device", "workers", "roll_back", "fail_under", "as_json", "log"}
# Those of them with a value that change what a run ends with: the command to go on with repeats them, and --trust.
SAID_AGAIN = ("--device", "--workers", "--log", "--fail-under")
# Options of `load_detector` that commands have under the same names.
LOADING = ("imgsz", "top_k", "fusion", "iou", "trust", "end_to_end")
# How many new objects make Python look for garbage, by default 700: torch is imported sooner by not finding any.
GARBAGE_AFTER = 10_000
# The exit codes where nothing was attacked or judged, neither a success nor a failure; of what Ctrl-C stopped; and, as
# of a program that SIGPIPE ends, of what was done, though nobody read all that it said.
NOTHING, STOPPED, UNREAD = 3, 130, 141
out = Terminal()
err = Terminal(stderr=True)


def device_name(name: str) -> str:
    """A device that detectors run on; torch knows others, which they do not."""
    if re.fullmatch(r"\d{1,2}(,\d{1,2})+", name):
        raise DetguardError(f"--device {name}: expected one; several train together by accelerate launch or torchrun")
    if not re.fullmatch(r"auto|\d{1,2}|cpu|(cuda|xpu)(:\d{1,2})?|mps", name):
        raise DetguardError(f"--device {name}: expected cpu, cuda, 0 or cuda:0, xpu, mps, or auto")
    return name


def levels(eps: str) -> float:
    """From "4" or "4/255" to 4: levels of 255, whole ones as int.

    Raises:
        DetguardError: it is neither.
    """
    if not (read := re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*(?:/\s*255\s*)?", eps, re.ASCII)):
        raise DetguardError(f"--eps {eps}: expected levels of 255, as 4 or 4/255")
    value = float(read[1])
    return int(value) if value.is_integer() else value


def warned(trust: bool) -> bool:
    """The option --trust, with one line of what it means."""
    if trust:
        show_warning(
            "--trust: a .pt is unpickled, a module:factory is called; both may run any code: for your own only"
        )
    return trust


MODELS = (
    "Bundled name, .pt, .safetensors or .onnx file, a name of Ultralytics or torchvision such as yolo11n, a folder or "
    "hub name of transformers', or module:function of yours (--trust)"
)
Model = Annotated[str, typer.Option(help=f"{MODELS}.")]
ImageSize = Annotated[
    int | None, typer.Option(min=32, max=4096, help="Longest side of a frame, px; default: the model's own.")
]
CONFIDENCE = "Confidence over which an object counts as found; default: the family's own, 0.25, of transformers 0.5"
Confidence = Annotated[float | None, typer.Option(min=0.001, max=0.999, help=f"{CONFIDENCE}.")]
# Of commands that take several detectors.
ConfidenceOfAll = Annotated[
    float | None,
    typer.Option(min=0.001, max=0.999, help=f"{CONFIDENCE} (of several detectors, the first's for all)."),
]
Recursive = Annotated[bool, typer.Option("--recursive", "-r", help="Folders with the folders in them, too.")]
Every = Annotated[int, typer.Option("--every", min=1, help="Of videos and cameras, every so many frames.")]
Frames = Annotated[
    int, typer.Option("--frames", min=1, max=10_000, help="Of a camera, which never ends, so many frames.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust", callback=warned, help="Unpickle a .pt, or call a module:factory, either of which may run any code."
    ),
]
EndToEnd = Annotated[bool, typer.Option("--end-to-end", help="Use the head without NMS of YOLOv10 and YOLO26.")]
NmsIou = Annotated[
    float | None,
    typer.Option(
        "--iou", min=0, max=1, help="Overlap over which NMS drops the worse of two boxes; default: the family's own."
    ),
]
TopK = Annotated[
    int | None, typer.Option(min=1, help="Experts that a gated ensemble evaluates per photo; default: as it was made.")
]
Fusion = Annotated[
    str | None,
    typer.Option(
        metavar="RULE:NUMBER",
        help="How experts become one answer: by bounded:B the adversarial expert's, each logit moved by at most B; by "
        "average:F that of all by the gate's weights, of which the adversarial expert has at least F.",
    ),
]
Device = Annotated[
    str,
    typer.Option(help="cpu, 0 or cuda:0, ...; auto: a GPU where CUDA finds one, else the CPU.", callback=device_name),
]
Workers = Annotated[
    int | None, typer.Option(min=1, max=256, help="Processes that make training batches; default: one per core.")
]
# Read by `levels`.
Eps = Annotated[str, typer.Option(metavar="LEVELS", help="Largest change of a pixel value, as 4 or 4/255.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all that is random.")]
PatchSize = Annotated[
    float, typer.Option(min=0.01, max=2, help="Side of a patch, as a share of the root of the area of an object's box.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object per photo instead of tables.")]
JsonMade = Annotated[bool, typer.Option("--json", help="Print one JSON object of what was made instead of text.")]
OutFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder for the results; default: the next runs/COMMAND/NNN.")
]
RunName = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Instead of --out: results go to runs/COMMAND/NAME.")
]
ExistOk = Annotated[bool, typer.Option("--exist-ok", help="Of --name: replace the run of that name, if there is one.")]
# What a command's photos are, whether or not it needs some.
PHOTOS = typer.Argument(
    help="Photos, videos, folders, patterns, web addresses, or the number of a camera.",
    metavar="PHOTO|VIDEO|FOLDER|GLOB|URL|CAMERA...",
)
Split = Annotated[str, typer.Option(help="Which split of a data.yaml.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the photos of a COCO json; default: beside it.")]
ClassMap = Annotated[
    str | None,
    typer.Option(
        "--map",
        metavar="NAME=CLASS,...",
        help="Classes of the data, by the detector's names where these are others: pedestrian=person,rider=person.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say how much there is to do and about how long it takes, and do nothing.")
]
Resume = Annotated[Path | None, typer.Option(help="Go on with the run in this folder, with its own options.")]


def main() -> None:
    """Run the command line; errors that the user can mend become one line and exit code 2."""
    keep_freed_memory()
    gc.set_threshold(GARBAGE_AFTER)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # our own limits say it better
    warnings.showwarning = show_python_warning
    logging.getLogger("ultralytics").setLevel(logging.ERROR)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a terminal that cannot show every letter
    Output.unread = False
    with redirect_stdout(Output.through(sys.stdout)) as shown, redirect_stderr(Output.through(sys.stderr)) as told:
        code = run_app()
        for stream in (shown, told):
            if stream is not None:  # the caller may have closed it
                stream.flush()
    sys.exit(UNREAD if Output.unread and code in (None, 0, 1, NOTHING) else code)


def run_app() -> str | int | None:
    """Run the command that the arguments name; returns the exit code."""
    stopped, err.lost = raise_noted(), False
    try:
        try:
            code = app(standalone_mode=False)
            if code == STOPPED:  # by Typer, of a KeyboardInterrupt
                show_error("stopped")
        except SystemExit as ended:
            code = ended.code
        return 2 if err.lost and code in (None, 0, 1, NOTHING) else code
    except Exception as error:
        if stopped:  # which libraries make errors of: an import cut short, weights that seem damaged
            show_error("stopped")
            return STOPPED
        if is_out_of_memory(error):
            why = f"out of memory ({first_line(error)}); try a smaller `batch` or `imgsz`, or smaller photos"
            show_error(why, of_all=True)
        elif isinstance(error, DetguardError):
            show_error(str(error), of_all=not error.told)
        elif isinstance(error, RuntimeError) and "gloo" in str(error):  # by which processes of a launch agree
            show_error(f"another process of this launch has ended, and says why ({first_line(error)})")
        elif not isinstance(error, typer.TyperException):
            raise
        elif str(error):  # without arguments there is only the help
            show_error(_told_of_use(error))
        return 2


def _told_of_use(error: typer.TyperException) -> str:
    """What is wrong with a command line, with where --quiet goes, and what to do with files that seem to be options."""
    message, option = error.format_message(), getattr(error, "option_name", "")
    if type(error).__name__ != "NoSuchOption":
        return message
    if option in ("--quiet", "-q"):
        return f"{option}: goes before the command, as in detguard {option} detect bus.jpg"
    file = next((word for word in sys.argv[1:] if word.startswith(option) and os.path.lexists(word)), None)
    return f"{message}; for the file of that name give ./{file}, or -- before it" if file else message


def with_dashes(message: str) -> str:
    """A message in which fields are named in backticks, as `keep_others`, with the options that set them.

    A mapping that is given, as `class_map={"rider": "person"}`, becomes pairs: --map rider=person.
    """

    def option(found: re.Match[str]) -> str:
        name = "--" + OPTIONS.get(found[1], found[1]).replace("_", "-")
        pairs = (found[2] or "").replace('": "', "=").replace('", "', ",")
        return f"{name} {shlex.quote(pairs)}" if pairs else name

    return re.sub(r"`([a-z][a-z_]*)(?:=\{\"(.*?)\"\})?`", option, message)


def given(context: typer.Context) -> dict[str, str]:
    """The parameters of a command that its line has, by name: as users write them, as in --photos or MODEL."""
    found = dict[str, str]()
    for one in context.command.params:
        source = context.get_parameter_source(str(one.name))
        if source is not None and source.name == "COMMANDLINE":
            found[str(one.name)] = one.opts[0] if one.opts[0].startswith("-") else str(one.name).upper()
    return found


def only_with(context: typer.Context, names: Collection[str], other: str) -> None:
    """See that a command is given none of the options `names`, which go with another alone.

    Raises:
        DetguardError: it is.
    """
    if alone := [option for name, option in given(context).items() if name in names]:
        raise DetguardError(f"{alone[0]}: goes with {other}")


def only_of_splits(context: typer.Context, sources: Sequence[str]) -> None:
    """See that --split is not given where none of the data has any.

    Raises:
        DetguardError: it is.
    """
    if all(one == "-" or one.lower().endswith((".json", ".jsonl")) for one in sources):
        only_with(context, ("split",), "a data.yaml")


def only_resumes(context: typer.Context) -> None:
    """See that a command that goes on with a run is given nothing that the run says already.

    Raises:
        DetguardError: it is.
    """
    if others := sorted(option for name, option in given(context).items() if name not in KEPT_BY_NO_RUN):
        raise DetguardError(f"--resume: takes all options from the run; leave out {', '.join(others)}")


def run_folder(context: typer.Context) -> Path | None:
    """Where a command's new run goes, by its --out or --name; None: to the next number.

    Raises:
        DetguardError: both are given, the name is none, or there is a run of that name, which is not to be replaced.
    """
    from detguard.runs import refuse_taken

    folder, name, exist_ok = (context.params[one] for one in ("out_folder", "name", "exist_ok"))
    if name is None:
        if exist_ok:
            raise DetguardError("--exist-ok: goes with --name")
        return folder
    if folder:
        raise DetguardError("--name: says where results go, as --out does; leave one of them out")
    if not re.fullmatch(r"\w[\w.-]{0,63}", name):
        raise DetguardError(f"--name {name}: expected a plain name of letters, digits, _, - and ., as exp1")
    command = str(context.command.name)
    folder = Path("runs") / command / name
    if not exist_ok:
        refuse_taken(folder, command, "choose another --name, replace it by --exist-ok")
    for given in context.params.values():
        for one in given if isinstance(given, list) else [given]:
            if isinstance(one, str | Path) and Path(os.path.abspath(one)).is_relative_to(folder.absolute()):  # noqa: PTH100
                raise DetguardError(f"--name {name}: {one} is in that run, which would be replaced; choose another")
    return folder


def loaded(context: typer.Context, *names: str, device: str) -> "list[Detector]":
    """Detectors by name, by what a command's options say of how to load them."""
    from detguard.detectors.load import load_detector

    options = {name: context.params[name] for name in LOADING if name in context.params}
    with err.status("Loading the detector"):
        detectors = [load_detector(name, device=device, **options) for name in names]
    tell_size(options.get("imgsz"), detectors)
    return detectors


def tell_size(imgsz: int | None, detectors: "Sequence[Detector]") -> None:
    """Warn, once, where frames are of another size than --imgsz, for they are whole strides of a detector."""
    if other := next((one for one in detectors if imgsz not in (None, one.imgsz)), None):
        stride = f", a multiple of {other.stride}" if hasattr(other, "stride") else ""
        show_warning(f"--imgsz {imgsz}: rounded up to {other.imgsz}{stride}")


def tell_apart(detectors: "Sequence[Detector]") -> None:
    """Have those of one name be called by the last parts of their files: a/best.pt and b/best.pt, not best twice.

    Those of one file keep their name.
    """
    from detguard.reports.page import short_names

    names = [one.name for one in detectors]
    alike = [one for one in detectors if names.count(one.name) > 1]
    if len({one.source for one in alike}) < 2:
        return
    for one, name in zip(alike, short_names([Path(one.source) for one in alike]), strict=True):
        one.name = name


def show_error(message: str, *, of_all: bool = False) -> None:
    """Print an error as one line on stderr.

    of_all: not by the first process of a launch alone, but by any, with its rank.
    """
    if of_all and err.rank:
        err.quiet, message = False, f"rank {err.rank}: {message}"
    err.say(f"error: {with_dashes(message)}", style="red")


def show_lost(message: str) -> None:
    """Print why an input is left out, of which the exit code tells, too."""
    err.lost = True
    show_error(message)


def show_warning(message: str) -> None:
    """Print a warning as one line on stderr."""
    err.say(f"warning: {with_dashes(message)}", style="yellow")


def show_python_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print what `warnings.warn` was told: by detguard as a warning of its own, by others as Python does."""
    if category is UserWarning and Path(filename).is_relative_to(Path(__file__).parents[1]):
        show_warning(str(message))
        return
    for one in warnings.formatwarning(message, category, filename, lineno).splitlines():
        err.say(one)


def show_stopped(run: "Run") -> int:
    """Say how a run that was stopped goes on; returns the exit code."""
    command = ["detguard", run.config["command"], "--resume", str(run.folder), *_said_again(sys.argv)]
    piped = "... | " if run.config.get("stream", {}).get("source") == "-" else ""
    show_error(f"stopped; go on with: {piped}{shlex.join(command)}")
    return STOPPED


def _said_again(words: Sequence[str]) -> list[str]:
    """The words of a command line that a run does not keep, which a resumed one needs, too."""
    kept = list[str]()
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        if word == "--trust" or (word.partition("=")[0] in SAID_AGAIN and "=" in word):
            kept.append(word)
        elif word in SAID_AGAIN:
            kept += [word, following]
    return kept


def show_made(text: str, *, as_json: bool, **made: object) -> None:
    """What a command has made, in one line, or as one JSON object."""
    if as_json:
        print(json.dumps(made, default=str))
    else:
        out.say(text)


def stop_signals() -> list[int]:
    """Have SIGINT and SIGTERM noted in the list that is returned, instead of ending the program."""
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: stopped.append(n))
    return stopped


def raise_noted() -> list[int]:
    """Have SIGINT noted in the list that is returned, beside the KeyboardInterrupt that it raises."""
    noted: list[int] = []

    def interrupt(number: int, _: object) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as of a program in the background
        signal.signal(signal.SIGINT, interrupt)
    return noted


def start_ranks(device: str) -> "Ranks":
    """The processes of this launch, of which the first alone is heard, and others by the errors that end them."""
    from detguard.ranks import Ranks

    ranks = Ranks.start(device)
    if not ranks.first:
        out.quiet = err.quiet = True
        err.rank = ranks.rank
    return ranks


@app.callback(invoke_without_command=True)
def top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Before the command: only errors, warnings, and what --json prints.")
    ] = False,
) -> None:
    """Print the version when asked."""
    if quiet:
        out.quiet = err.still = True
    if version:
        out.say(f"detguard {__version__}")
        raise typer.Exit


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A live line on stderr that leaves nothing behind: what is done, a bar, `columns`, and the time left."""
    return Progress(
        SpinnerColumn(),
        Description(),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.moves,
    )
