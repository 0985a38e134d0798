"""Teach hardened ensembles photos of a new kind, from Python."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detguard import DetguardError, defaults
from detguard.data.sources import OnData, photo_files, read_labelled, unlabelled, warn_of
from detguard.data.stream import Labelled
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import load_model
from detguard.hardening.adapt import Adaptation
from detguard.ranks import Ranks
from detguard.runs import Run
from detguard.workflows.harden import Trained, listed, named

# Photos seen by default: so many for each new one, and at most.
VIEWS, MOST_VIEWS = 50, 5_000
AUTO = defaults.Adapt.mode
# Of a run, its new photos and the old ones that are labelled.
KEPT = ("new.jsonl", "replay.jsonl")
# By kind of photos, new and old: F1, AP and AP50.
Figures = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class Adapted(Trained):
    """What came of teaching; before, after: F1, AP and AP50 on labelled photos kept for that, `new` and `old`."""

    before: Figures
    after: Figures


def load_ensemble(model: str, trust: bool) -> tuple[GatedNetwork, int]:
    """A gated ensemble and the frame size that it was made for.

    Raises:
        DetguardError: it is none, or cannot be read.
    """
    network, imgsz = load_model(model, trust)
    if not isinstance(network, GatedNetwork):
        raise DetguardError(f"{model}: expected a gated ensemble; make one of it with detguard harden")
    return network, imgsz


# Of a run, what the ensemble knew of photos before and after.
FIGURES = "figures.json"


def read_sources(
    new: Sequence[str], replay: Sequence[str], split: str, class_names: dict[int, str], on_data: OnData
) -> tuple[list[Labelled], list[Labelled], list[Path]]:
    """New photos, and old ones with labels or without; a photo that is new is not replayed.

    Raises:
        DetguardError: there are none of a kind, or sources with labels and without.
    """

    def labelled(sources: Sequence[str]) -> list[Labelled]:
        return [one for source in sources for one in read_labelled(source, split, class_names, on_data)]

    shown = labelled(new)
    if not shown:
        raise DetguardError(f"`new` {', '.join(new)}: no photos there")
    folders = [source for source in replay if unlabelled(source)]
    if folders and len(folders) < len(replay):
        raise DetguardError("`replay`: give labelled photos or folders, not both")
    taken = {one.file.resolve() for one in shown}
    old = [one for one in labelled([] if folders else replay) if one.file.resolve() not in taken]
    files = [file for source in folders for file in photo_files(source) if file.resolve() not in taken]
    if replay and not (old or files):
        raise DetguardError(f"`replay` {', '.join(replay)}: no photos there but those that are new")
    return shown, old, files


@dataclass
class Adapting:
    """A run of `adapt`. network: the ensemble that learns; imgsz: of its frames; ranks: the first of them writes."""

    run: Run
    network: GatedNetwork
    imgsz: int
    ranks: Ranks

    @classmethod
    def begin(
        cls,
        model: str,
        new: Sequence[str],
        plan: dict[str, Any],
        ranks: Ranks,
        *,
        replay: Sequence[str] = (),
        split: str = defaults.Adapt.split,
        max_experts: int = defaults.Adapt.max_experts,
        corruptions: Sequence[str] | None = None,
        out: Path | None = None,
        trust: bool = False,
        arguments: Sequence[str] = (),
        told: Callable[[str], object] = warnings.warn,
        on_data: OnData = warn_of,
    ) -> "Adapting":
        """A new run, once all that it asks for is known to go together.

            plan: the fields of `Adaptation`: `experts`, `expert` (adapter, head, whole), `mode` (full, frozen, or by default
                auto: by how many photos are new), `init`, `keep`, `photos` (by default 50 for each new one, 5,000 at most),
                `batch`, `rate` and `seed`.

        Raises:
            DetguardError: the ensemble or photos cannot be read, or options do not go together.
            KeyboardInterrupt: `on_batch` asked for it; go on with `resume`.

        Example:
            >>> import detguard
            >>> made = detguard.adapt("hard.safetensors", "dropped.jsonl", replay="day/data.yaml")  # doctest: +SKIP
            >>> made.before["new"]["AP50"], made.after["new"]["AP50"]  # doctest: +SKIP
        """

    if unknown := sorted(set(plan) - (Adaptation.__dataclass_fields__.keys() - {"eps"})):
        raise TypeError(f"adapt() got an unexpected keyword argument '{unknown[0]}'")
    if resume is not None:
        if detector or new or replay or corruptions or out or plan:
            raise DetguardError("`resume`: takes its model, data and options from the run; give no others")
        job = Adapting.resume(Path(resume), Ranks.start(device), trust)
    else:
        model, sources = named(detector), listed(new)
        if not sources:
            raise DetguardError("`new`: give labelled photos: a data.yaml, a COCO json or a .jsonl file (or `resume`)")
        job = Adapting.begin(
            model, sources, plan, Ranks.start(device), replay=listed(replay), split=split, max_experts=max_experts,
            corruptions=corruptions, out=None if out is None else Path(out), trust=trust,
        )  # fmt: skip
    job.load(workers)
    for message in job.unread:
        warnings.warn(message, stacklevel=2)
    before = job.figures()
    made = job.train(on_batch)
    return Adapted(made, job.run.folder, job.unread, before, job.figures())
