"""A detector before and after a training, on photos that were held out, as pages and the terminal show it."""

from collections.abc import Callable

from detguard.hardening.judging import LABELS, Judgement, OfKind
from detguard.reports.evaluation import number, with_error
from detguard.reports.tables import Table

# Photos of before an adapting, whose labels may be what the ensemble itself answered.
OLD = "old"
FIGURES: dict[str, Callable[[OfKind], str]] = {
    "AP": with_error,
    "AP50": lambda of: number(of["AP50"]),
    "F1": lambda of: number(of["F1"]),
}


def before_after(judged: Judgement, kind: str) -> str:
    """Like "AP .512 before, .498 after"."""
    before = "before by definition" if _own_answers(judged, kind) else "before"
    return f"AP {number(judged.before[kind]['AP'])} {before}, {number(judged.after[kind]['AP'])} after"


def _own_answers(judged: Judgement, kind: str) -> bool:
    """Whether what is to be found is what the same detector answered before: its figures of then say nothing."""
    return kind == OLD and kind in judged.answers


def _without_error(judged: Judgement, kind: str) -> OfKind:
    """Figures of before, without an error where they are so by definition."""
    before = judged.before[kind]
    return {**before, "AP_error": None} if _own_answers(judged, kind) else before


def judged_table(judged: Judgement, note: str = "") -> Table:
    """Figures before and after, of each kind of photos; note: what more a reader must know."""
    rows = [
        [f"{count} {kind} photos", figure, show(_without_error(judged, kind)), show(judged.after[kind])]
        for kind, count in judged.photos.items()
        for figure, show in FIGURES.items()
    ]
    notes = [
        "Of photos that were not trained on; ± is half of the 95 % interval, of 10 photos or more. F1 at IoU .50 and "
        "confidence .25, of photos with objects."
    ]
    for name in dict.fromkeys(judged.by.values()):
        kinds = " and ".join(kind for kind, of in judged.by.items() if of == name)
        if name == LABELS:
            notes.append(f"What is to be found in the {kinds} photos is what their labels say.")
            continue
        notes.append(
            f"The {kinds} photos have no labels: what {name} showed of them as they are (confidence .25) counts as "
            f"right, so that these figures tell agreement with it, not accuracy, and its own AP on them is 1."
        )
    if _own_answers(judged, OLD):
        notes.append(f"Those of {OLD} photos before are 1 by definition: the ensemble against its own answers.")
    return Table("Before and after", ["photos", "figure", "before", "after"], rows, " ".join([*notes, note]).strip())
