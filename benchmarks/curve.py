"""What more photos bring: the adversarial expert of a training's checkpoints, clean and attacked.

    python benchmarks/curve.py --run runs/harden/001 'kept/adversarial-*.pt'

Checkpoints are copies of a run's state/adversarial.pt that were made while it went on; of each the averaged weights
are judged. Attacked: PGD on the whole loss, made for each.
"""

from pathlib import Path
from typing import Annotated

import typer
from gate import ap, attacked, detected
from rich.console import Console
from rich.progress import track
from rich.table import Table

from detguard.data.sources import read_labelled
from detguard.detectors.checkpoint import read_state
from detguard.detectors.gated import GatedDetector, GatedNetwork
from detguard.detectors.load import fused, load_model
from detguard.engine import keep_freed_memory
from detguard.hardening.run import Plan, split_layer
from detguard.hardening.train import learned_parameters
from detguard.photos import read_photo
from detguard.reports.evaluation import number
from detguard.runs import Run


def expert(run: Run, file: Path) -> tuple[int, GatedDetector]:
    """How many photos a checkpoint has seen, and its adversarial expert alone."""
    plan, state = Plan(**run.config["harden"]), read_state(file)
    base = fused(load_model(run.config["model"])[0])
    network = GatedNetwork(base, split_layer(base, plan.split), plan.experts)
    network.load_state_dict(state["network"])
    learned = learned_parameters(network, plan.stage("adversarial", 1))
    for parameter, value in zip(learned, state["average"], strict=True):
        parameter.data.copy_(value)
    alone = GatedNetwork(network.single(network.robust), 0, ("adversarial",)).eval().requires_grad_(False)
    imgsz = run.config["detectors"][0]["imgsz"]
    return state["progress"]["number"] * plan.batch, GatedDetector(alone, file.stem, imgsz)


def main(
    states: list[Path],
    run: Annotated[Path, typer.Option(help="The run that they are of.")],
    data: str = "../shared/data/coco256/data.yaml",
    limit: int = 32,
    eps: Annotated[list[float], typer.Option(help="Levels of 255.")] = [2, 4],  # noqa: B006
    steps: int = 10,
) -> None:
    keep_freed_memory()
    training = Run.open(run, "harden")
    rows = []
    for file in track(states, "judging", transient=True):
        seen, detector = expert(training, file)
        labelled = [one for one in read_labelled(data, "val", detector.class_names) if len(one.objects)][:limit]
        shown = [[read_photo(one.file) for one in labelled]]
        shown += [attacked(detector, "all", labelled, budget, steps) for budget in eps]
        found = [ap(labelled, detected(detector, labelled, photos)) for photos in shown]
        rows.append((seen, [" / ".join(map(number, values)) for values in found]))
    table = Table(title=f"AP / AP50, {limit} photos, PGD-{steps} by the loss, seed 0")
    for column in ("photos seen", "clean", *(f"attacked at {budget:g}" for budget in eps)):
        table.add_column(column, justify="right")
    for seen, cells in sorted(rows):
        table.add_row(f"{seen:,}", *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
