"""The page of a harden run: how each stage learned, and which expert the gate came to choose."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from detguard.detectors.gated import EXPERTS
from detguard.evaluation.run import mean
from detguard.hardening.run import Plan
from detguard.hardening.validation import ATTACKED, CLEAN
from detguard.reports.evaluation import number
from detguard.reports.page import Table, render_page
from detguard.reports.plots import gate_plot, training_plot
from detguard.reports.tables import duration
from detguard.runs import Record, Run
from detguard.workflows.harden import Cost

# The last records of a stage that its figures are the mean of.
LAST = 5


def hardening_page(run: Run) -> bytes:
    """report.html of a harden run, from its records; of what was done twice because of a kill, the last counts."""
    found = run.records()

    def of_kind(figure: str) -> list[Record]:
        return list({(record["stage"], record["batch"]): record for record in found if figure in record}.values())

    records, validated = of_kind("photos_per_second"), of_kind(ATTACKED)
    stages = list(dict.fromkeys(record["stage"] for record in records))
    last = {stage: [r for r in records if r["stage"] == stage][-LAST:] for stage in stages}

    def at_end(stage: str, figure: str) -> float | None:
        return mean(record.get(figure) for record in last.get(stage, []))

    def best(stage: str) -> list[str]:
        of_stage = [record for record in validated if record["stage"] == stage]
        least = min(of_stage, key=lambda record: record[ATTACKED], default=None)
        return [str(least["batch"]), number(least[ATTACKED])] if least else ["", ""]

    setbacks = [sum("setbacks" in r and r["stage"] == stage for r in found) for stage in stages]
    rows = [
        [stage, str(last[stage][-1]["batch"]), f"{at_end(stage, 'photos_per_second'):.1f}"]
        + [number(at_end(stage, kind)) for kind in EXPERTS]
        + best(stage)
        + [str(times) if times else ""]
        for stage, times in zip(stages, setbacks, strict=True)
    ]
    note = (
        "Loss on training photos at the end of each stage: divergence from what the undefended detector says of the "
        "clean photo, or by --learn that of labels. Its weights are those that were best on photos held out, under "
        "PGD, at the batch named. How good the detector is: detguard evaluate."
    )
    tables = [
        Table(
            "Stages",
            ["stage", "batches", "photos/s", *EXPERTS, "best batch", "held out, attacked", "went back"],
            rows,
            note,
        )
    ]
    made = {"Losses": training_plot(records)} if records else {}
    if validated:
        made["On photos held out, under PGD and without"] = training_plot(validated, (ATTACKED, CLEAN))
    experts = Plan(**run.config["harden"]).experts
    shares = {
        kind: [at_end("joint", f"gate {kind} {i}") or 0.0 for i in range(len(experts))]
        for kind in EXPERTS
        if at_end("joint", f"gate {kind} 0") is not None
    }
    if shares:
        made["Gate weights on training photos"] = gate_plot(list(experts), shares)
    plan = run.config["harden"]
    length = f"{plan['hours']:g} hours" if plan.get("hours") else f"{plan['photos']} photos"
    transforms = plan.get("transforms", "none")
    through = "" if transforms == "none" else f", through {transforms}"
    subtitle = (
        f"{length}, {plan['attack']} of {plan['steps']} steps, budget {plan['eps']:g} of 255 levels, "
        f"seed {plan['seed']}{through}"
    )
    title = f"Hardening of {Path(run.config['model']).stem}: {plan['recipe']}"
    return render_page(title, verdict(validated), subtitle, ["detguard", *run.config["arguments"]], tables, made)


def cost_table(costs: Mapping[str, Cost]) -> Table:
    """What each stage of a run will take."""
    rows = [[name, f"{one.photos:,}", f"{one.passes:,}", duration(one.seconds)] for name, one in costs.items()]
    return Table("Stages", ["stage", "photos", "passes", "time"], rows)


def verdict(validated: Sequence[Record]) -> str:
    """One sentence: what the last stage that was validated did to the loss on photos held out."""
    if not validated:
        return "No photos were held out, or training was too short to look at them: judge it by detguard evaluate"
    of_stage = [record for record in validated if record["stage"] == validated[-1]["stage"]]
    first, best = of_stage[0], min(of_stage, key=lambda record: record[ATTACKED])
    return (
        f"Loss on photos held out, under PGD: {number(first[ATTACKED])} at batch {first['batch']} of stage "
        f"{first['stage']}, {number(best[ATTACKED])} at batch {best['batch']}, whose weights are kept "
        f"(clean: {number(best.get(CLEAN))}); AP: detguard evaluate"
    )
