"""Records of a training for TensorBoard and the like, by Accelerate's trackers."""

import warnings
from collections.abc import Callable
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from detguard import DetguardError, first_line
from detguard.runs import Record, Run


def check_tracker(name: str) -> Any:
    """The class of a tracker.

    Args:
        name: as Accelerate calls it: tensorboard, wandb, mlflow, ...

    Raises:
        DetguardError: there is none of that name, or its package is not installed.
    """
    if name not in LOGGER_TYPE_TO_CLASS:
        raise DetguardError(f"`log` {name}: expected one of {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}")
    if name not in map(str, get_available_trackers()):
        raise DetguardError(f"`log` {name}: not installed; pip install {name}")
    return LOGGER_TYPE_TO_CLASS[name]


def track(run: Run, name: str, on_warning: Callable[[str], object] = warnings.warn) -> None:
    """Have a tracker log the numbers of every record that is appended to the run from now on, as stage/name by batch.

    Stages count their batches anew: Weights & Biases, whose steps only grow, gets the number as stage/batch.

    Trackers that write files write them into the run: tensorboard --logdir RUN. One that fails, as without a network,
    ends no training, whose records the run has: `on_warning` is called the first time.

    Raises:
        DetguardError: as `check_tracker`.
    """
    kind = check_tracker(name)
    place = (name, run.folder) if kind.requires_logging_directory else (f"detguard-{run.config['command']}",)
    failed = list[Exception]()

    def fails(error: Exception) -> None:
        if not failed:
            on_warning(f"`log` {name}: fails ({first_line(error)}); training goes on, and {run.folder} has it all")
        failed.append(error)

    try:
        tracker = kind(*place)
        tracker.start()
    except Exception as error:
        return fails(error)

    def log(record: Record) -> None:
        stage, batch = record.get("stage", ""), record.get("batch")
        numbers = {f"{stage}/{k}": v for k, v in record.items() if k != "batch" and isinstance(v, int | float)}
        try:
            if name == "wandb":
                tracker.log(numbers | {f"{stage}/batch": batch})
            else:
                tracker.log(numbers, step=batch)
        except Exception as error:
            fails(error)

    run.on_record = log
