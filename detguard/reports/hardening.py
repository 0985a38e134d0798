"""The page of a harden run: how each stage learned, and which expert the gate came to choose."""

from collections.abc import Mapping
from pathlib import Path

from detguard.detectors.gated import EXPERTS
from detguard.evaluation.run import mean
from detguard.hardening.judging import Judgement, judged_eps
from detguard.hardening.recipes import RECIPES
from detguard.hardening.run import Plan
from detguard.hardening.validation import AP50, ATTACKED, CLEAN, ONE_IN, STEPS
from detguard.reports.evaluation import number
from detguard.reports.judged import before_after, judged_table
from detguard.reports.page import render_page
from detguard.reports.plots import gate_plot, training_plot
from detguard.reports.tables import Table, counts, duration
from detguard.runs import Record, Run
from detguard.schema import Config
from detguard.workflows.harden import Cost

# The last records of a stage that its figures are the mean of.
LAST = 5
JUDGED_NOTE = (
    f"Attacked: each detector by PGD of {STEPS} steps on its own training loss, an attack of many: the least of all "
    "tells detguard evaluate, on more photos. Of an attacked stage, the best weights were chosen by these photos."
)


def hardening_page(run: Run, judged: Judgement) -> bytes:
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
        least = min(of_stage, key=lambda record: record[ATTACKED] + record[CLEAN], default=None)
        return [str(least["batch"]), number(least[ATTACKED]), number(least.get(AP50[ATTACKED]))] if least else [""] * 3

    # Going back further takes the records of earlier ones away, and counts them.
    setbacks = [max((r.get("setbacks", 0) for r in found if r["stage"] == stage), default=0) for stage in stages]
    rows = [
        [stage, str(last[stage][-1]["batch"]), f"{at_end(stage, 'photos_per_second'):.1f}"]
        + [number(at_end(stage, kind)) for kind in EXPERTS]
        + best(stage)
        + [str(times) if times else ""]
        for stage, times in zip(stages, setbacks, strict=True)
    ]
    note = (
        "Loss on training photos at the end of each stage: divergence from what the undefended detector says of the "
        "clean photo, or by --learn that of labels."
    )
    of_maps = [record for record in records if record["stage"] == "pretrain"]
    if of_maps:
        note += " That of pretrain is the error of its feature maps, and compares with no other stage's."
    if validated:
        note += (
            " Its weights are those whose losses were least on photos held out, under PGD and without, at the batch "
            "named. AP50: of what the undefended detector shows there, or by --learn of labels; of few photos, rough."
        )
    tables = [judged_before_after(judged)] if judged.photos else []
    tables.append(
        Table(
            "Stages",
            ["stage", "batches", "photos/s", *EXPERTS, "best batch", "held out, attacked: loss", "AP50", "went back"],
            rows,
            note,
        )
    )
    of_stages = [record for record in records if record["stage"] != "pretrain"]
    made = {"Error of feature maps": training_plot(of_maps, what="error")} if of_maps else {}
    made |= {"Losses": training_plot(of_stages)} if of_stages else {}
    if validated:
        made["On photos held out, under PGD and without"] = training_plot(validated, (ATTACKED, CLEAN))
    if found_in := [record for record in validated if AP50[ATTACKED] in record]:
        made["AP50 of photos held out, under PGD and without"] = training_plot(found_in, tuple(AP50.values()), "AP50")
    experts = Plan(**run.config["harden"]).experts
    shares = {
        kind: [at_end("joint", f"gate {kind} {i}") or 0.0 for i in range(len(experts))]
        for kind in EXPERTS
        if at_end("joint", f"gate {kind} 0") is not None
    }
    if shares:
        made["Gate weights on training photos"] = gate_plot(list(experts), shares)
    plan = run.config["harden"]
    seen = plan["batch"] * sum(last[stage][-1]["batch"] for stage in stages)
    length = f"{seen} photos seen, with repeats" + (f", in {plan['hours']:g} hours" if plan["hours"] else "")
    transforms = plan["transforms"]
    through = "" if transforms == "none" else f", through {transforms}"
    attacks = (
        f"attacked in training: {plan['attack']}, {counts(plan['steps'], 'step')}, budget {plan['eps']:g} of 255 levels"
    )
    subtitle = (
        f"{length}, in batches of {plan['batch']}; "
        + (f"{attacks}{through}" if RECIPES[plan["recipe"]].attacked else "not attacked in training")
        + f"; seed {plan['seed']}"
    )
    title = f"Hardening of {Path(run.config['model']).stem}: {plan['recipe']}"
    summary = verdict(judged, run.config)
    return render_page(title, summary, subtitle, ["detguard", *run.config["arguments"]], tables, made)


def cost_table(costs: Mapping[str, Cost]) -> Table:
    """What each stage of a run will take."""
    rows = [[name, f"{one.photos:,}", f"{one.passes:,}", duration(one.seconds)] for name, one in costs.items()]
    return Table("Stages", ["stage", "photos", "passes", "time"], rows)


def judged_before_after(judged: Judgement) -> Table:
    """Figures before and after on photos held out, clean and attacked."""
    return judged_table(judged, JUDGED_NOTE)


def verdict(judged: Judgement, config: Config) -> str:
    """One sentence: AP before and after on photos held out, clean and attacked. config: of the run."""
    if not judged.photos:
        return (
            f"No photos were held out (of fewer than {ONE_IN} different ones that can be read there are none): judge "
            "it by detguard evaluate"
        )
    what = f"Agreement with {judged.answers['clean']}, for want of labels," if judged.answers else "By labels,"
    return (
        f"{what} on {judged.photos['clean']} photos held out: clean {before_after(judged, 'clean')}; attacked at "
        f"{judged_eps(config['harden']['eps'])}/255 {before_after(judged, 'attacked')}"
    )
