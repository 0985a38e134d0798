"""What came of an attack, as tables on the terminal and on the page."""

from collections import Counter
from collections.abc import Sequence
from math import inf
from statistics import mean, median

from detguard import __version__
from detguard.attacks.group import AttackOptions
from detguard.attacks.run import PHOTO, THRESHOLDS
from detguard.objectives.parse import GOALS
from detguard.reports.tables import Table, counted, counts, percents
from detguard.runs import Record
from detguard.schema import Config

PHOTO_ROW = "photo (png)"


def survival_table(records: Sequence[Record], title: str, conf: float) -> Table:
    """Success rate of each member (rows) at each threshold (columns), over what was found clean at that threshold.

    conf: the confidence that decides, whose column says so.
    """
    of_each = [judged(r) for r in records]
    decides = f"{conf:g}"
    # At a threshold of its own, which nothing but the verdict is kept of.
    own = [] if conf in THRESHOLDS else [decides]
    columns = [*own, *(f"{t:g}" for t in THRESHOLDS)]
    head = ["judged from file", *(f"conf {t}" + (", decides" if t == decides else "") for t in columns)]

    def success(member: Record, threshold: str) -> bool | None:
        return member["fooled"] if threshold in own else member["success"][threshold]

    names = list(dict.fromkeys(name for one in of_each for name in one))
    rows = {name: [counted(success(one[name], t) for one in of_each if name in one) for t in columns] for name in names}
    gone = [[r["members"][PHOTO]["objects_not_kept"][f"{t:g}"] for r in records] for t in THRESHOLDS]
    if any(number for pairs in gone for _, number in pairs):
        shares = [(sum(g for g, _ in pairs), sum(n for _, n in pairs)) for pairs in gone]
        rows["objects not kept (png)"] = [(0, 0)] * len(own) + shares
    groups = [group_of(r, one) for r, one in zip(records, of_each, strict=True)]
    if max(map(len, groups), default=0) > 1:
        more = len(names) > max(map(len, groups))
        together = rows["all members of the group" if more else "all members"] = []
        for t in columns:
            values = [[success(one[n], t) for n in group] for one, group in zip(of_each, groups, strict=True)]
            together.append(counted(None if None in v else all(v) for v in values))
    note = "Photos that fool the detector at each confidence; - where nothing was found."
    if any(number for pairs in gone for _, number in pairs):
        note += " Objects not kept: of the attacked objects found before, those that vanished or were relabelled."
    shown = percents(list(rows.values()))
    return Table(title, head, [[name, *cells] for name, cells in zip(rows, shown, strict=True)], note)


def judged(record: Record) -> dict[str, Record]:
    """The members of a photo by the names of their rows, those before further detectors behind their own."""
    rows = {PHOTO_ROW if name == PHOTO else name: member for name, member in record["members"].items()}
    for detector, members in record.get("also", {}).items():
        rows |= {f"{PHOTO_ROW if name == PHOTO else name}, {detector}": one for name, one in members.items()}
    return rows


def group_of(record: Record, rows: dict[str, Record]) -> list[str]:
    """The rows by which a photo is fooled or not: all, but for what `verify` was asked to judge beside them."""
    return [PHOTO_ROW if name == PHOTO else name for name in record["group"]] if "group" in record else list(rows)


def least_budgets(attacked: Sequence[Record]) -> list[float | None]:
    """Of each photo the budget that its saved file uses; None where even the whole budget did not fool."""
    return [r["used"] if r["status"] == "fooled" else None for r in attacked]


def attack_summary(records: Sequence[Record], options: AttackOptions, goal: Config) -> list[list[str]]:
    """Rows of name and value: photos, objects, detections, iterations or queries, budget, quality and time of a run.

    options, goal: of the run.
    """
    attacked = [r for r in records if r["status"] in ("fooled", "failed")]
    statuses = Counter(r["status"] for r in records)
    skipped = [
        f"{statuses[s]} {label}"
        for s, label in (("no-target", GOALS[goal["goal"]].spared), ("error", "not attacked, see the errors"))
        if statuses[s]
    ]
    rows = [["photos", f"{statuses['fooled']} of {len(attacked)} fooled" + "".join(f", {s}" for s in skipped)]]
    if attacked:
        fates = Counter(o["outcome"] for r in attacked for o in r["objects"])
        spent = [r["queries" if options.black_box else "iterations"] for r in attacked]
        quality = f"{mean(r['psnr'] for r in attacked):.1f} dB, {mean(r['ssim'] for r in attacked):.3f}"
        seconds = [r["seconds"] for r in attacked]
        found = [d for r in attacked for d in r["members"][PHOTO]["detections"]]
        most = max(r["used"] for r in attacked)
        before, wrong = sum(len(r["clean"]) for r in attacked), sum(d["wrong"] for d in found)
        tried = " for each budget tried" if options.smallest else ""
        bound = "" if options.black_box else f"at most {counts(options.steps, 'step')}{tried}, "
        if fates:
            rows.append(
                ["objects", ", ".join(f"{fates[f]} {f}" for f in ("vanished", "relabelled", "kept") if fates[f])]
            )
        rows += [
            [
                "settings",
                f"confidence {options.conf:g}, {bound}seed {options.seed}, detguard {__version__}",
            ],
            ["detections", f"{before} before, {len(found)} after, {wrong} of them wrong (were not there before)"],
            [
                f"queries (black box, at most {options.queries})" if options.black_box else "iterations",
                f"median {median(spent):g}, mean {mean(spent):.1f}, most {max(spent)}",
            ],
            ["largest difference", f"{max(r['difference'] for r in attacked)} of 255 levels"],
            ["budget used", f"at most {most:.4g} of {options.budget}{_unspent(attacked, options)}"],
            *([["least budget", _least(attacked)]] if options.smallest else []),
            ["PSNR, SSIM", quality],
            ["time", f"{sum(seconds):.1f} s, {mean(seconds):.1f} s per photo"],
        ]
    return rows


def _unspent(attacked: Sequence[Record], options: AttackOptions) -> str:
    """Why photos that were not fooled did not get all of the budget, where it is too few and too short steps."""
    unspent = any(r["status"] == "failed" and r["used"] < options.budget.eps for r in attacked)
    # How far values that move one by one come together, a sum of squares does not say.
    apart = options.budget.scale != 1 and not options.moves.by_budget
    own_steps = options.black_box or "step" in options.moves.unused or apart
    if own_steps or not unspent or options.steps * options.length >= options.budget.eps:
        return ""
    return f"; {options.steps} steps of {options.length:g} cannot use all of it: give more --steps, or a larger --step"


def _least(attacked: Sequence[Record]) -> str:
    """Like "median 2, most 5", photos that no budget fooled counted as more than the largest."""
    least = least_budgets(attacked)
    sizes = [inf if size is None else size for size in least]
    middle, more = median(sizes), sizes.count(inf)
    words = [f"median {middle:.4g}" if middle < inf else "median over the whole budget"]
    words += [f"most {max(size for size in sizes if size < inf):.4g}"] if more < len(sizes) else []
    return ", ".join(words + ([f"not reached by {more} of {len(sizes)} photos"] if more else []))
