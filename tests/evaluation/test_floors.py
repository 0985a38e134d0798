import pytest

from detguard import DetguardError
from detguard.evaluation.floors import read_floors, shortfalls

METRICS = {"a": {"clean": {"AP": 0.4, "AP50": 0.6}, "attack": {"AP": 0.1, "AP50": None}, "checks": {}}}
MEASURED = ("clean", "attack", "checks")


def test_a_figure_without_a_protocol_is_of_all_that_were_measured():
    assert read_floors("AP=.2, clean.AP50=1", MEASURED) == {
        ("clean", "AP"): 0.2, ("attack", "AP"): 0.2, ("clean", "AP50"): 1,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["clean.AP=.9,AP=.01", "AP=.01,clean.AP=.9"])
def test_what_is_said_of_one_protocol_holds_whatever_is_said_of_all(text):
    assert read_floors(text, MEASURED) == {("clean", "AP"): 0.9, ("attack", "AP"): 0.01}


def test_what_is_lower_or_not_there_falls_short():
    floors = read_floors("AP=.2,clean.AP50=.6,attack.AP50=0", MEASURED)
    assert list(shortfalls(METRICS, floors)) == [
        "a: attack AP 0.100, expected 0.200 or more",
        "a: attack AP50 not measured, expected 0.000 or more",
    ]


def test_what_is_short_by_little_does_not_look_as_if_it_reached_its_floor():
    found = {"a": {"clean": {"AP": 0.39996, "AP50": 0.6}}}
    assert list(shortfalls(found, {("clean", "AP"): 0.4, ("clean", "AP50"): 0.6})) == [
        "a: clean AP 0.399960, expected 0.400000 or more"
    ]


@pytest.mark.parametrize("text", ["", "AP", "AP=2", "AP=nan", "mAP=.2", "AP=.2,", "transfer.AP=.2", "checks.AP=.2"])
def test_what_is_no_figure_that_is_measured_is_refused(text):
    with pytest.raises(DetguardError, match="`fail_under`"):
        read_floors(text, MEASURED)


def test_without_ap_there_is_nothing_to_reach():
    with pytest.raises(DetguardError, match="no AP"):
        read_floors("AP=.2", ("checks",))
