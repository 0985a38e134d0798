"""The sentence on top of each page."""

import io
import re
from dataclasses import replace
from pathlib import Path

from PIL import Image
from rich.console import Console

from detguard.attacks.budgets import Linf
from detguard.attacks.group import AttackOptions
from detguard.evaluation.attacks import ATTACKS
from detguard.hardening.judging import Judgement
from detguard.hardening.monitor import DRIFT, MOST_WINDOWS, Deployment, needed
from detguard.reports import adaptation, attack, evaluation, hardening, monitoring
from detguard.reports.attack_tables import attack_summary, survival_table
from detguard.reports.judged import judged_table
from detguard.reports.page import short_names
from detguard.reports.tables import Table, counts, duration, percents
from detguard.runs import Run


def photo(key, **left):
    """A record of an attack, by the confidence that each member leaves; over .25 it is found."""
    success = {threshold: None for threshold in ("0.05", "0.1", "0.25", "0.5")}
    members = {
        name: {
            "fooled": conf <= 0.25,
            "confidence": conf,
            "success": success,
            "objects_not_kept": {threshold: [0, 0] for threshold in success},
        }
        for name, conf in left.items()
    }
    status = "fooled" if all(member["fooled"] for member in members.values()) else "failed"
    return {"key": key, "status": status, "members": members, "also": {}}


def test_an_attack_tells_how_many_and_after_what():
    records = [photo("a", photo=0.1, blur=0.2), photo("b", photo=0.2, blur=0.6)]
    for goal, spared in (("vanish", "without target"), ("flood", "flooded already")):
        told = attack.verdict([*records, {"key": "c", "status": "no-target"}], AttackOptions(), {"goal": goal})
        assert told == f"4 levels of 255: 1 of 2 photos fooled, also after blur (confidence 0.25); 1 {spared}"
    assert attack.failures(records, {"goal": "vanish"}, 0.25) == ["b: blur (confidence 0.60)"]
    told = attack.verdict([*records, {"key": "d", "status": "error"}], AttackOptions(), {"goal": "vanish"})
    assert told.endswith("(confidence 0.25); 1 not attacked, see the errors")


def test_photos_that_were_not_attacked_are_told_with_why_errors_first():
    left = [{"key": f"n{i}", "status": "no-target"} for i in range(attack.MOST_LEFT_OUT)]
    left[0]["detector"] = "other"
    records = [photo("a", photo=0.1), *left, {"key": "e", "status": "error", "error": "e.png: gone"}]
    table = attack.not_attacked(records, {"goal": "vanish"})
    assert table.rows[:3] == [["e", "e.png: gone"], ["n0", "without target for other"], ["n1", "without target"]]
    assert (len(table.rows), table.note) == (attack.MOST_LEFT_OUT, "And 1 more.")


def test_a_timeline_of_the_end_of_a_stream_has_the_detectors_that_came_then(tmp_path):
    of_photo = {"photo": "a.png", "objects": [], "f1": 0.5, "confidence": 0.5, "entropy": None, "began": None}
    records = [of_photo | {"number": number} for number in range(30_001, 30_017)]
    config = {"monitor": {"detector": "kswin", "window": 8}, "detector": {"model": "m"}, "arguments": []}
    event = {"event": "deployed", "model": "m", "why": "", "before": {}, "after": {}}
    for number, shown in ((5, False), (30_009, True)):
        page = monitoring.monitor_page(Run(tmp_path, config), records, [event | {"number": number}])
        assert (b"another detector" in page) is shown


def test_of_a_drop_of_many_photos_the_worst_are_shown_and_the_others_counted(tmp_path, bundled):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    of_photo = {"photo": str(tmp_path / "a.png"), "objects": [], "confidence": 0.5, "entropy": None, "began": None}
    records = [of_photo | {"number": number, "f1": 1 - number / 20} for number in range(1, 15)]
    records[-1]["began"] = 1
    config = {"monitor": {"detector": "kswin", "window": 8}, "detector": {"model": "m"}, "arguments": []}
    items = monitoring.drop_items(records, Deployment(bundled))
    assert [item.title for item in items] == [f"photo {number}: a.png" for number in range(14, 2, -1)]
    page = monitoring.monitor_page(Run(tmp_path, config), records, [], items).decode()
    assert page.count('class="card item"') == 12
    assert "2 more photos are not shown here" in page


def test_failures_say_what_is_lacking_where_nothing_is_left():
    record = photo("a", photo=0.2)
    record["members"]["photo"]["fooled"] = False
    for goal, told in (
        ({"goal": "mislabel", "to": "train"}, "not found as train"),
        ({"goal": "mislabel", "to": None, "keep_others": True}, "not found as wanted, or others not kept"),
        ({"goal": "vanish", "strict": True}, "another class in its place"),
        ({"goal": "vanish", "keep_others": True}, "others not kept"),
    ):
        assert attack.failures([record], goal, 0.25) == [f"a: photo (png) ({told})"]


def test_several_detectors_are_named_and_nothing_is_said_of_what_fooled_none():
    records = [photo("a", photo=0.1, blur=0.2)]
    records[0]["also"] = {"other": records[0]["members"]}
    told = attack.verdict(records, AttackOptions(), {"goal": "vanish"})
    assert told == "4 levels of 255: 1 of 1 photos fooled, also after blur, and other as well (confidence 0.25)"
    told = attack.verdict([photo("b", photo=0.4, blur=0.2)], AttackOptions(), {"goal": "vanish"})
    assert told == "4 levels of 255: 0 of 1 photos fooled (confidence 0.25)"


def test_where_objects_were_to_be_found_failures_say_how_many_were():
    record = photo("a", photo=0.9)
    found = [{"class": name, "wrong": wrong} for name, wrong in (("person", False), ("person", True), ("bus", True))]
    record["members"]["photo"]["detections"] = found
    for goal, told in (
        ({"goal": "flood", "target": "all", "count": 50}, "a: photo (png) (3 of 50 found)"),
        ({"goal": "fabricate", "target": "Person", "count": None}, "a: photo (png) (1 of 1 new)"),
    ):
        assert attack.failures([record], goal, 0.25) == [told]


def test_all_members_are_those_of_the_group_though_more_are_judged():
    record = photo("a", photo=0.1, blur=0.2, more=0.9)
    *_, last = survival_table([record | {"group": ["photo", "blur"]}], "", 0.25).rows
    assert last[0] == "all members of the group"
    record["members"]["more"]["success"] = dict.fromkeys(("0.05", "0.1", "0.25", "0.5"), False)
    for name in ("photo", "blur"):
        record["members"][name]["success"] = dict.fromkeys(("0.05", "0.1", "0.25", "0.5"), True)
    assert survival_table([record | {"group": ["photo", "blur"]}], "", 0.25).rows[-1][1] == "100 % (1/1)"


def test_what_a_patch_costs_is_told_by_the_class_that_wears_it():
    worn = {"class": "person", "shown": {"clean": {"AP": 0.377}, "grey": {"AP": 0.342}, "patch": {"AP": 0.33}}}
    transfer = {"AP": 0.2, "eps": 4, "attacks": list(ATTACKS)}
    found = {"setting": {"photos": 16}, "clean": {"AP": 0.168}, "patch": worn, "transfer": transfer}
    assert evaluation.verdict({"a": found}) == (
        "a: AP .168 clean, .200 by transferred attacks at 4/255, "
        ".330 for person with the patch (.377 clean, .342 grey) (16 photos)"
    )


def test_the_confidence_that_decides_is_marked_and_shown_where_it_is_another():
    records = [photo("a", photo=0.1), photo("b", photo=0.6)]
    assert survival_table(records, "", 0.25).head[3] == "conf 0.25, decides"
    own = survival_table(records, "", 0.3)
    assert own.head[1] == "conf 0.3, decides"
    assert own.rows[0][1] == "50 % (1/2)"


def made_by(*attacks):
    """The figures of attacks, each from its first start."""
    parts = dict.fromkeys(("worst", *(f"{one}-0" for one in attacks)))
    return {"AP": 0.001, "eps": 4, "steps": 9, "budgets": {"4": {"attacks": parts}}}


def test_where_not_all_attacks_were_made_those_that_were_are_named():
    found = {"setting": {"photos": 12}, "attack": made_by("rank", "class"), "transfer": {"AP": 0.2, "eps": 4}}
    found["transfer"]["attacks"] = ["vanish"]
    assert evaluation.verdict({"a": found}) == (
        "a: AP .001 attacked at 4/255 by class, rank alone, "
        ".200 by transferred attacks at 4/255 by vanish alone (12 photos)"
    )
    shown = {title: show for _, title, show in evaluation.COLUMNS}
    assert shown["attack"](found) == "eps 4, 9 steps by class, rank alone"
    assert shown["transfer"](found) == "eps 4 by vanish alone"
    assert evaluation.alone(("class", "gate:1", "route:0")) == " by class alone and what is made for ensembles"
    assert evaluation.alone(("square",)) == evaluation.alone((*ATTACKS, "gate:1")) == ""


def test_an_evaluation_tells_ap_and_checks_that_failed():
    found = {
        "setting": {"photos": 128},
        "clean": {"AP": 0.459},
        "attack": made_by(*ATTACKS),
        "checks": {"more steps": {"passed": False}, "large budget": {"passed": True}},
    }
    assert evaluation.verdict({"a": found}) == (
        "a: AP .459 clean, .001 attacked at 4/255, the attack's own checks FAILED (more steps) (128 photos)"
    )


def test_what_misses_a_limit_by_little_does_not_look_like_it():
    assert evaluation.apart(0.0104, 0.01) == (".0104", ".0100")
    assert evaluation.apart(0.3, 0.01) == (".300", ".010")
    assert evaluation.apart(0.01, 0.01) == (".010", ".010")
    assert evaluation.apart(None, 0.01) == ("-", ".010")


def test_a_photo_that_lost_an_object_is_not_called_unharmed():
    assert [evaluation._outcome(1.0, after) for after in (1.0, 0.95, 0.5, 0.0)] == [
        "unharmed", "a little worse", "worse", "nothing right left",
    ]  # fmt: skip


def test_names_of_models_are_no_severities_in_the_table_of_the_gate():
    shares = {
        "fog 1": [1.0],
        "fog 3": [0.0],
        "glass_blur 2": [0.5],
        "transfer from net 1": [0.1],
        "transfer from my_net": [0],
        "attack eps 2 class-0": [1.0],  # of which the worst per photo is made
        "attack eps 2 worst": [0.2],
    }
    assert evaluation.gate_by_kind(shares) == {
        "fog": [0.5], "glass blur": [0.5], "transfer from net 1": [0.1], "transfer from my_net": [0],
        "attack eps 2 worst": [0.2],
    }  # fmt: skip


def test_of_a_part_of_the_corruptions_and_of_few_queries_the_verdict_says_so():
    kinds = {"fog": {"AP": 0.7, "severities": {"3": {"AP": 0.7}}}}
    found = {"corruptions": {"AP": 0.7, "kinds": kinds}, "blackbox": {"AP": 0.6, "eps": 4, "queries": 50}}
    found["setting"] = {"photos": 12}
    told = evaluation.verdict({"a": found})
    assert told == "a: AP .700 corrupted (fog at severity 3), .600 by 50 black-box queries at 4/255 (12 photos)"
    kinds |= {kind: {"severities": dict.fromkeys("12345")} for kind in evaluation.PUBLISHED}
    assert evaluation.verdict({"a": found}).startswith("a: AP .700 corrupted, ")


def test_the_attack_of_the_headline_is_the_one_that_is_shown_by_size():
    attacks = {"worst": {"AP": 0.481, "APs": 0.3}, "class-1": {"AP": 0.038, "APs": 0.01}}
    found = {"clean": {"AP": 0.6}, "attack": {"eps": 2, "by": "class-1", "budgets": {"2": {"attacks": attacks}}}}
    table = evaluation.numbers_table({"a": found})
    assert table.head == ["", "clean", "eps 2, class, start 2"]
    assert table.rows[3] == [evaluation.NUMBERS["APs"], "-", ".010"]


def test_a_stream_tells_since_when_and_what_is_too_short_is_not_perfect():
    def seen(f1, began=None):
        levels = {"before": 0.8, "photos_before": 6, "after": 0.5, "photos_after": 4}
        return {"f1": f1, "began": began} | ({} if began is None else {"levels": levels})

    records = [{"number": n, **one} for n, one in enumerate([seen(1.0)] * 8 + [seen(0.5)] * 3 + [seen(0.5, 9)], 1)]
    records[8]["time"] = "07:15"
    assert monitoring.verdict(records, "adwin", 8) == (
        "F1 dropped from .800 (6 photos) to .500 (4) since about photo 9 (07:15), detected at photo 12"
    )
    assert monitoring.verdict([*records, {"number": 13, "f1": 0.0, "began": 13}], "adwin", 8).endswith(
        ", and 1 more later"
    )
    assert (
        monitoring.verdict(records[:8], "likelihood-ratio", 8)
        == "No drop on 8 photos with known objects: mean F1 1.000"
    )
    assert monitoring.verdict(records[:3], "adwin", 8).startswith("Too few to judge: 3 photos")
    steady = [seen(0.6 + 0.1 * (-1) ** n) | {"number": n} for n in range(64)]
    assert monitoring.verdict(steady, "likelihood-ratio", 8) == (
        "No drop on 64 photos with known objects: mean F1 .600. "
        "One by less than .190 in the last 8, or .126 over half of them, might not show"
    )
    assert monitoring.verdict(steady[:16], "likelihood-ratio", 8).endswith(
        ". One by less than .258 over half of them might not show"
    )
    low = [one | {"f1": one["f1"] - 0.45} for one in steady]  # below what the last photos would have to lose
    assert monitoring.verdict(low, "likelihood-ratio", 8).endswith(
        ". One by less than .126 over half of them might not show"
    )
    month = [seen(0.6) | {"number": n} for n in range(MOST_WINDOWS * 8 + 20)]
    assert f"No drop on {len(month)} photos with known objects: mean F1 .600 of the last {MOST_WINDOWS * 8}. One" in (
        monitoring.verdict(month, "likelihood-ratio", 8)
    )
    late = [*records[:-1], records[-1] | {"through": 14}]
    assert monitoring.verdict(late, "adwin", 8).endswith("detected at photo 14")
    deployed, back = {"event": "deployed", "number": 9}, {"event": "rolled back", "number": 14}
    told = [monitoring.verdict(late, "adwin", 8, events=events) for events in ([deployed], [deployed, back])]
    assert told[0].endswith(
        "detected at photo 14. Adapted at photo 9: mean F1 .500 of 3 photos with known objects since"
    )
    assert told[1].endswith(". Rolled back at photo 14: 0 photos with known objects since")
    months = [late[8] | {"began": 9}, *(seen(0.5) | {"number": n} for n in range(90, 100))]
    assert monitoring.verdict(months, "adwin", 8, events=[deployed]).endswith(
        "mean F1 .500 of the last 10 photos with known objects since"
    )
    weak = [r | {"f1": float(r["number"] % 8 == 0)} for r in steady[:32]]
    assert monitoring.verdict(weak, "likelihood-ratio", 8) == (
        "Too little to judge by: mean F1 .125 of 32 photos with known objects is too low for a drop to show for certain"
    )
    assert monitoring.hides(weak, "likelihood-ratio", 8)
    assert not monitoring.hides(steady, "likelihood-ratio", 8)
    assert not monitoring.hides(weak, "adwin", 8)
    assert {kind: needed(kind, 32) for kind in DRIFT} == dict.fromkeys(DRIFT, 32) | {"kswin": 128}


def judged(kinds, answers):
    """A judgement of 12 photos of each kind, whose AP goes from .2 to .4."""
    before, after = ({kind: {"F1": 0.5, "AP": ap, "AP_error": 0.1, "AP50": 0.6} for kind in kinds} for ap in (0.2, 0.4))
    return Judgement(dict.fromkeys(kinds, 12), answers, before, after)


def test_training_tells_what_was_held_out_and_by_what_it_was_judged():
    config = {"harden": {"eps": 2.0}}
    assert hardening.verdict(judged(("clean", "attacked"), {}), config) == (
        "By labels, on 12 photos held out: clean AP .200 before, .400 after; "
        "attacked at 2/255 AP .200 before, .400 after"
    )
    taught = judged(("clean", "attacked"), dict.fromkeys(("clean", "attacked"), "detguard-n"))
    assert hardening.verdict(taught, config).startswith("Agreement with detguard-n, for want of labels, on 12 photos")
    assert "agreement with it, not accuracy" in judged_table(taught).note
    assert judged_table(taught).rows[0] == ["12 clean photos", "AP", ".200 ±.100", ".400 ±.100"]
    assert hardening.verdict(Judgement(), config).startswith("No photos were held out")
    told = adaptation.verdict(judged(("new", "old"), {"old": "ensemble"}))
    assert told == (
        "12 new photos held out: AP .200 before, .400 after; "
        "12 old photos held out (no labels: agreement with ensemble): AP .200 before by definition, .400 after"
    )
    table = judged_table(judged(("new", "old"), {"old": "ensemble"}))
    assert [row[2:] for row in table.rows if row[1] == "AP"] == [[".200 ±.100", ".400 ±.100"], [".200", ".400 ±.100"]]
    assert "1 by definition" in table.note
    assert "by definition" not in judged_table(judged(("new", "old"), {})).note
    assert adaptation.verdict(Judgement()).startswith("No photos were held out")


def test_runs_are_named_by_as_little_as_tells_them_apart():
    assert short_names([Path("runs/evaluate/001"), Path("runs/evaluate/002")]) == ["001", "002"]
    assert short_names([Path("a/001"), Path("b/001")]) == ["a/001", "b/001"]


def test_times_are_in_units_that_can_be_read():
    assert [duration(seconds) for seconds in (0.2, 61, 720, 12_600)] == ["1 s", "61 s", "12 min", "3.5 h"]


def test_percents_of_few_have_no_more_digits_than_they_tell():
    assert percents([[(4, 7), (71, 72)], [(0, 0)]]) == [["57 % (4/7)", "99 % (71/72)"], ["-"]]
    assert percents([[(93, 94), (192, 193)]]) == [["98.9 % (93/94)", "99.5 % (192/193)"]]
    assert percents([[(1568, 1569)]]) == [["99.94 % (1568/1569)"]]


def test_of_one_there_is_no_plural():
    assert [counts(n, what) for n, what in ((1, "step"), (2, "step"), (1, "class"), (0, "class"), (3, "box"))] == [
        "1 step", "2 steps", "1 class", "0 classes", "3 boxes",
    ]  # fmt: skip


def shown_in(table, width):
    """A table as a terminal of so many letters shows it: its lines."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    console.print(table)
    return console.file.getvalue()


def test_on_a_narrow_terminal_neither_words_nor_numbers_are_broken():
    rows = [["skateboard", ".444 ±.031", "under the worst of them"], ["motorcycle", ".500 ±.120", "-"]]
    table = Table("title", ["class", "AP", "found"], rows, "12 photos, AP .444")
    for width in (80, 40, 20):
        shown = shown_in(table, width)
        assert all(word in shown for word in ("skateboard", "motorcycle", ".444 ±.031", ".500 ±.120", "under"))
        assert "\x1b[1;36m" not in shown  # numbers of what is said
        assert max(map(len, re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines())) <= width
    assert "skateboard\n  AP: .444 ±.031\n  found: under the" in shown_in(table, 20)


def test_the_summary_of_an_attack_counts_objects_detections_budgets_and_quality():
    whole = {
        "status": "fooled", "objects": [{"outcome": "kept"}, {"outcome": "vanished"}], "clean": [0, 0, 0],
        "members": {"photo": {"detections": [{"wrong": True}, {"wrong": False}]}}, "iterations": 3, "queries": 9,
        "difference": 4, "used": 2.0, "psnr": 40.0, "ssim": 0.98, "seconds": 1.0,
    }  # fmt: skip
    failed = whole | {"status": "failed", "used": 4.0, "psnr": 38.0, "ssim": 0.96}
    options = AttackOptions(budget=Linf(4), steps=20, smallest=True)
    told = dict(attack_summary([whole, failed, {"status": "no-target"}], options, {"goal": "flood"}))
    assert told["photos"] == "1 of 2 fooled, 1 flooded already"
    assert told["objects"] == "2 vanished, 2 kept"
    assert told["detections"] == "6 before, 4 after, 2 of them wrong (were not there before)"
    assert told["PSNR, SSIM"] == "39.0 dB, 0.970"
    assert told["least budget"] == "median over the whole budget, most 2, not reached by 1 of 2 photos"
    assert "at most 20 steps for each budget tried" in told["settings"]
    told = dict(attack_summary([whole, failed], replace(options, smallest=False), {"goal": "vanish"}))
    assert "least budget" not in told


def test_where_the_checks_alone_were_made_it_says_whether_they_hold():
    found = {"checks": {"more steps": {"passed": True}, "larger budget": {"passed": True}}}
    assert evaluation.verdict({"m": found}) == "m: the attack's own checks hold"
    found["checks"]["larger budget"]["passed"] = False
    assert evaluation.verdict({"m": found}) == "m: the attack's own checks FAILED (larger budget)"
    found["checks"]["more steps"]["passed"] = None
    told = "m: the attack's own checks FAILED (larger budget) and have too little to judge by (more steps)"
    assert evaluation.verdict({"m": found}) == told
    assert evaluation._checks(found) == "failed: larger budget; too little to judge: more steps"
    found["checks"]["larger budget"]["passed"] = None
    assert evaluation._checks(found) == "too little to judge: more steps, larger budget"
    own = {"setting": {"photos": 3}, "corruption_file": {"AP": 0.25}}
    assert evaluation.verdict({"m": own}) == "m: AP .250 corrupted by your own (3 photos)"
