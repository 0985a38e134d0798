"""Which figures of two runs are compared, and when a difference is more than chance."""

import copy

import numpy as np
import pytest

from detguard.evaluation.compare import also_unlike, unlike
from detguard.reports.comparison import difference_cell, differences

FIRST = {
    "setting": {"photos": 40, "photos_sha256": "a", "imgsz": 320, "nms": 0.7, "seed": 0, "version": "1"},
    "clean": {"AP": 0.4},
    "attack": {
        "AP": 0.1, "eps": 4, "steps": 20, "restarts": 1,
        "budgets": {"4": {"attacks": {"class": {}, "box": {}, "worst": {}, "gate:1": {}}}},
    },
    "patch": {"class": "person", "size": 0.3, "file": "p.png", "content": "1f", "shown": {"patch": {"AP": 0.2}}},
}  # fmt: skip
NOISE = np.random.default_rng(0).normal(0, 0.02, 100)


def compared(better: float, apart: float, drawn=("attack", "patch"), **setting):
    """Differences in words, and warnings, of a model that is better by so much, and whose draws differ by so much."""
    other = copy.deepcopy(FIRST)
    other["clean"]["AP"] += better
    other["setting"] |= {key: value for key, value in setting.items() if key in other["setting"]}
    other["attack"] |= {key: value for key, value in setting.items() if key in other["attack"]}
    draws = {
        "first": {"clean": (0.4 + NOISE).tolist()},
        "other": {"clean": (0.4 + better + NOISE + apart * NOISE[::-1]).tolist()},
    }
    draws = {name: one | {protocol: [0.1] * 100 for protocol in drawn} for name, one in draws.items()}
    changes, warnings = differences({"first": FIRST, "other": other}, draws)
    return {figure: difference_cell(found) for figure, found in changes.get("other", {}).items()}, warnings


def test_a_difference_is_noise_where_its_interval_holds_none():
    assert compared(0.03, apart=1)[0]["clean AP"].endswith("noise")
    # As far apart, but on the same photos alike.
    assert not compared(0.03, apart=0.1)[0]["clean AP"].endswith("noise")
    assert compared(-0.03, apart=0.1)[0]["clean AP"].startswith("-.030 ±.00")


def test_other_photos_are_not_compared():
    figures, (warning,) = compared(0.1, apart=0, photos_sha256="b", photos=20)
    assert not figures
    assert "20 and 40 photos" in warning


@pytest.mark.parametrize("setting", [{"eps": 8}, {"steps": 40}, {"restarts": 2}])
def test_an_attack_of_another_budget_is_not_compared(setting):
    figures, (warning,) = compared(0.1, apart=0, **setting)
    assert list(figures) == ["clean AP", "patch AP"]
    assert figures["patch AP"] == "+.000, too few photos to tell"  # with an object of its class
    ((name, value),) = setting.items()
    assert f"attacked AP not compared with first: {name} {FIRST['attack'][name]}, {value}" in warning


def test_what_may_differ_is_told():
    figures, (warning,) = compared(0.1, apart=0, imgsz=640)
    assert len(figures) == 3
    assert "imgsz 320, 640" in warning


def test_a_figure_that_was_not_drawn_is_not_compared():
    figures, (warning,) = compared(0.1, apart=0, drawn=("attack",))
    assert list(figures) == ["clean AP", "attacked AP"]
    assert warning.startswith("other: patch AP not compared with first: not in every draws.json")


def corrupted(*kinds, severities="13"):
    return {"corruptions": {"kinds": {kind: {"severities": dict.fromkeys(severities)} for kind in kinds}}}


def test_means_over_other_corruptions_are_not_compared_but_in_any_order():
    assert unlike(corrupted("fog"), corrupted("snow"), "corruptions") == ["kinds fog, snow"]
    assert not unlike(corrupted("fog", "snow"), corrupted("snow", "fog", severities="31"), "corruptions")


@pytest.mark.parametrize("other", [{"steps": 4}, {"attacks": ["all"]}, {"sources": {"a": "22"}}])
def test_attacks_made_for_another_model_or_otherwise_are_not_compared(other):
    made = {"eps": 4, "steps": 20, "restarts": 2, "attacks": ["box", "class"], "sources": {"a": "11"}}
    same, apart = ({"transfer": made | part} for part in ({"attacks": ["class", "box"]}, other))
    assert not unlike({"transfer": made}, same, "transfer")
    assert len(unlike({"transfer": made}, apart, "transfer")) == 1


def test_the_least_of_other_attacks_is_not_compared():
    fewer, ensemble = copy.deepcopy(FIRST), copy.deepcopy(FIRST)
    del fewer["attack"]["budgets"]["4"]["attacks"]["class"]
    del ensemble["attack"]["budgets"]["4"]["attacks"]["gate:1"]
    assert unlike(FIRST, fewer, "attack") == ["attacks box+class, box"]
    assert not unlike(FIRST, ensemble, "attack")
    ensemble["attack"]["budgets"]["4"]["attacks"] |= {"dense": {}}
    assert not unlike(FIRST, ensemble, "attack")
    for row in (twice := copy.deepcopy(FIRST), ensemble):  # each from two starts
        attacks = row["attack"]["budgets"]["4"]["attacks"]
        row["attack"]["budgets"]["4"]["attacks"] = {f"{name}-{start}": {} for name in attacks for start in range(2)}
    assert not unlike(twice, ensemble, "attack")


def test_a_file_that_has_changed_is_another_one_and_a_copy_of_it_is_not():
    changed, moved = ({"patch": FIRST["patch"] | part} for part in ({"content": "2e"}, {"file": "q.png"}))
    assert unlike(FIRST, changed, "patch") == ["content 1f, 2e"]
    assert not unlike(FIRST, moved, "patch")


@pytest.mark.parametrize(
    ("protocol", "same", "other"),
    [
        ("blackbox", {"eps": 4, "queries": 200}, {"eps": 8}),
        ("blackbox", {"eps": 4, "queries": 200}, {"queries": 50}),
        ("universal", {"eps": 4, "content": "1f"}, {"eps": 8}),
        ("universal", {"eps": 4, "content": "1f"}, {"content": "2e"}),
        ("corruption_file", {"content": "1f"}, {"content": "2e"}),
    ],
)
def test_figures_of_other_settings_are_not_alike(protocol, same, other):
    ((name, value),) = other.items()
    told = unlike(FIRST | {protocol: same}, FIRST | {protocol: same | other}, protocol)
    assert told == [f"{name} {same[name]}, {value}"]


@pytest.mark.parametrize(("name", "value"), [("imgsz", 640), ("nms", 0.5), ("seed", 1), ("version", "2")])
def test_each_setting_that_may_differ_is_told(name, value):
    other = FIRST | {"setting": FIRST["setting"] | {name: value}}
    assert also_unlike(FIRST, other) == [f"{name} {FIRST['setting'][name]}, {value}"]
