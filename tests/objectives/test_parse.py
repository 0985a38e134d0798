from types import SimpleNamespace

import numpy as np
import pytest

from detguard import DetguardError
from detguard.detectors.base import Detector
from detguard.objectives import Fabricate, Flood, Mislabel, Untargeted, Vanish
from detguard.objectives.base import Selection
from detguard.objectives.mislabel import ANY
from detguard.objectives.parse import parse_goal, read_goal, wanted

PLAIN = {
    "goal": "vanish", "target": "person", "to": None, "strict": False, "object": None, "box": None,
    "keep_others": False, "loss": "logit", "count": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def classes():
    """All that is asked of a detector: three classes."""
    names = {0: "person", 1: "bus", 2: "train"}
    detector = SimpleNamespace(class_names=names, name="three")
    detector.class_index = lambda name: Detector.class_index(detector, name)
    return detector


@pytest.mark.parametrize(
    ("options", "goal"),
    [
        ({}, Vanish((0,))),
        ({"target": "bus, person", "strict": True}, Vanish((1, 0), True)),
        ({"goal": "mislabel", "target": "person,bus", "to": "train"}, Mislabel((0, 1), (2, 2))),
        ({"goal": "mislabel", "target": "person->bus,bus->person"}, Mislabel((0, 1), (1, 0))),
        ({"goal": "mislabel", "target": "person->bus,train", "to": "other"}, Mislabel((0, 2), (1, ANY))),
        ({"goal": "untargeted", "target": "all"}, Untargeted((0, 1, 2))),
        ({"goal": "fabricate"}, Fabricate((0,), 1)),
        ({"goal": "fabricate", "count": 7, "keep_others": True}, Fabricate((0,), 7, keep_others=True)),
        ({"goal": "flood", "target": "all"}, Flood((0, 1, 2), 100)),
        ({"object": [3, 1]}, Vanish((0,), only=Selection((3, 1)))),
        (
            {"box": [1, 2, 3, 4], "loss": "confidence"},
            Vanish((0,), only=Selection((), (1, 2, 3, 4)), measure="confidence"),
        ),
    ],
)
def test_options_become_goals(classes, options, goal):
    assert parse_goal(PLAIN | options, classes) == goal


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "persn"}, "did you mean 'person'"),
        ({"target": " ,"}, "name at least one class"),
        ({"target": "person->bus"}, "an arrow goes with `goal` mislabel"),
        ({"to": "bus"}, "`to`: goes with `goal` mislabel, not with vanish"),
        ({"goal": "mislabel"}, "give `to`"),
        ({"goal": "mislabel", "to": "person"}, "is a target itself"),
        ({"goal": "mislabel", "to": "all"}, "`to` all: expected one class"),
        ({"goal": "mislabel", "target": "person->bus,train"}, "`to` says what the others"),
        ({"goal": "mislabel", "target": "person->bus", "to": "train"}, "`to` train: each of `target`"),
        ({"goal": "mislabel", "target": "person->bus,person->train"}, "each class once"),
        ({"goal": "untargeted", "strict": True}, "`strict`: goes with `goal` vanish, not"),
        ({"goal": "fabricate", "object": [1]}, "`object`: goes with `goal` vanish or mislabel or untargeted"),
        ({"goal": "flood", "box": [1, 2, 3, 4]}, "`box`: goes with"),
        ({"count": 3}, "`count`: goes with `goal` fabricate or flood"),
        ({"box": [3, 2, 1, 4]}, "x1 < x2"),
    ],
)
def test_options_that_do_not_go_together_are_told(classes, options, reason):
    with pytest.raises(DetguardError, match=reason.replace("(", r"\(")):
        parse_goal(PLAIN | options, classes)


def test_a_detector_of_one_class_has_no_other():
    one = SimpleNamespace(class_names={0: "person"}, name="one", class_index=lambda name: 0)
    with pytest.raises(DetguardError, match="one class only"):
        parse_goal(PLAIN | {"goal": "mislabel", "to": "other"}, one)


@pytest.mark.parametrize(
    ("words", "goal"),
    [
        ({}, Vanish("person")),
        ({"object": [1]}, Vanish("all", only=Selection((1,)))),
        ({"target": "bus", "to": "train"}, Mislabel({"bus": "train"})),
        ({"target": "bus->train"}, Mislabel({"bus": "train"})),
        ({"goal": "untargeted"}, Untargeted("all")),
        ({"goal": "flood", "target": "bus"}, Flood("bus")),
    ],
)
def test_what_is_not_said_is_understood(words, goal):
    assert read_goal(PLAIN | {"goal": None, "target": None} | words) == goal


def test_there_is_no_such_goal():
    with pytest.raises(DetguardError, match="expected one of vanish, mislabel"):
        read_goal(PLAIN | {"goal": "flod"})


@pytest.mark.parametrize(
    "goal",
    [
        Vanish(), Vanish(["bus", "person"], True), Vanish(only=Selection((2, 1), (1.0, 2.0, 3.0, 4.0))),
        Mislabel({"person": "bus", "bus": "other"}), Mislabel("bus", "train", keep_others=True),
        Mislabel(["person", "bus"], "other"), Untargeted(measure="confidence"), Fabricate("bus", count=3), Flood(),
        Flood(count=0),
    ],
)  # fmt: skip
def test_goals_are_kept_in_words(classes, goal):
    assert read_goal(goal.words(classes.class_names)) == goal
    assert parse_goal(goal.words(classes.class_names), classes) == goal.on(classes)
    assert parse_goal(goal.on(classes).words(classes.class_names), classes) == goal.on(classes)


def test_names_and_indices_mean_the_same_classes(classes):
    assert Vanish(["all", "bus", 2]).on(classes) == Vanish((0, 1, 2))
    assert Vanish(np.int64(1)).on(classes) == Vanish((1,))
    assert Mislabel(np.array([0, 1]), np.int64(2)).on(classes) == Mislabel((0, 1), 2)
    assert Mislabel({"bus": 2, 0: "other"}).on(classes) == Mislabel((1, 0), (2, ANY))
    assert Mislabel({"all": "other", "bus": "train"}).on(classes) == Mislabel((0, 1, 2), (ANY, 2, ANY))
    with pytest.raises(DetguardError, match=r"class 3: .* its indices are 0 to 2"):
        Vanish((0, 3)).on(classes)
    with pytest.raises(TypeError, match="by name"):
        Vanish("person").classes  # noqa: B018


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Vanish([]), "`targets`: name"),
        (lambda: Vanish(measure="odd"), "`measure` odd"),
        (lambda: Fabricate(only=Selection((1,))), "`only`: fabricate"),
        (lambda: Vanish("person", only=(3,)), r"`only`: expected a Selection, as in Selection\(objects=\(3,\)\)"),
        (lambda: Mislabel("bus"), "give `to`"),
        (lambda: Mislabel(["bus", "person"], ["train"]), "`to`: expected one class"),
        (lambda: Mislabel({"bus": "train"}, "person"), "`to`: the targets say"),
        (lambda: Mislabel("bus", 1.5), "`to` 1.5: expected names"),
        (lambda: Vanish(["bus", None]), "`targets` None: expected names"),
        (lambda: Selection((0,)), "`objects`: expected"),
        (lambda: Selection("3"), "`objects`: expected"),
        (lambda: Vanish("a,b").words({}), r'cannot be attacked; give several as \("person", "bus"\)'),
    ],
)
def test_goals_that_cannot_be_are_refused(make, reason):
    with pytest.raises(DetguardError, match=reason):
        make()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "person not found any more"),
        ({"target": "all", "object": [2]}, "objects of all classes not found any more (object 2)"),
        ({"goal": "mislabel", "to": "other", "keep_others": True}, "person found as any other class, the rest stays"),
        ({"goal": "mislabel", "target": "person->bus,bus->train"}, "person found as bus, bus found as train"),
        ({"goal": "flood", "target": "all"}, "objects of all classes found in masses (at least 100)"),
        ({"goal": "fabricate", "count": 3}, "person found where there is none (at least 3)"),
        ({"box": [1.0, 2.5, 3.0, 4.0]}, "person not found any more (within 1, 2.5, 3, 4)"),
    ],
)
def test_titles_say_what_is_wanted(options, words):
    assert wanted(PLAIN | options) == words
