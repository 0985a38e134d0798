import pytest
import torch
from scenes import BUS, CLEAN, PERSON, SCENE, TRAIN, detections, loss_and_gradient

from detguard import DetguardError
from detguard.detections import Candidates
from detguard.objectives import Mislabel
from detguard.objectives.base import Selection
from detguard.objectives.mislabel import ANY, Renamed

AS_TRAIN = Renamed(SCENE.attacked, SCENE.others, torch.tensor([TRAIN]))


def test_mislabel_wants_the_new_class_in_the_same_place():
    goal = Mislabel((BUS,), (TRAIN,))
    assert goal.success(CLEAN, detections((TRAIN, 0.5, 105, 0, 300, 100)))
    assert not goal.success(CLEAN, detections((TRAIN, 0.5, 250, 0, 450, 100)))
    assert not goal.success(CLEAN, detections())


def test_a_class_does_not_become_two(bundled):
    with pytest.raises(DetguardError, match="person is to become two classes"):
        Mislabel({"person": "bus", "Person": "car"}).on(bundled)
    assert Mislabel({"person": "bus", "Person": "bus"}).on(bundled).targets == (0,)


@pytest.mark.parametrize("targets", [{"person": "bus", "all": "other"}, {"all": "other", "person": "bus"}])
def test_what_is_said_of_one_class_is_an_exception_from_what_is_said_of_all(bundled, targets):
    goal = Mislabel(targets).on(bundled)
    assert dict(zip(goal.targets, goal.to, strict=True)) == dict.fromkeys(range(13), ANY) | {0: 4}


def test_what_another_may_become_may_be_found_anywhere():
    clean = detections((PERSON, 0.9, 0, 0, 50, 100), (BUS, 0.8, 100, 0, 300, 100))
    found = detections((BUS, 0.9, 0, 0, 50, 100), (TRAIN, 0.8, 100, 0, 300, 100))
    assert Mislabel((PERSON, BUS), (ANY, TRAIN)).success(clean, found)
    assert not Mislabel((PERSON, BUS), (TRAIN, TRAIN)).success(clean, found)


def test_mislabel_fails_while_the_old_class_is_found():
    found = detections((TRAIN, 0.9, 100, 0, 300, 100), (BUS, 0.3, 100, 0, 300, 100))
    assert not Mislabel((BUS,), (TRAIN,)).success(CLEAN, found)


def test_mislabel_wants_every_object():
    clean = detections((BUS, 0.9, 0, 0, 50, 50), (BUS, 0.9, 100, 100, 150, 150))
    found = detections((TRAIN, 0.9, 0, 0, 50, 50))
    assert not Mislabel((BUS,), (TRAIN,)).success(clean, found)


def test_mislabel_gradient_raises_the_new_class_and_lowers_the_old_on_the_object():
    logits, boxes = (
        torch.full((1, 3, 4), -2.0),
        torch.tensor([[[20, 20, 60, 60], [22, 20, 60, 60], [300, 0, 310, 9.0]]]),
    )
    logits[0, :2, BUS] = 4.0
    _, gradient = loss_and_gradient(Mislabel((BUS,), (TRAIN,)), logits, boxes, [AS_TRAIN])
    assert gradient[0, 0, TRAIN] < 0 < gradient[0, 0, BUS]


def test_mislabel_gradient_lowers_a_third_class_under_the_new_one():
    logits = torch.full((1, 1, 4), -2.0)
    logits[0, 0, 3] = 4.0
    _, gradient = loss_and_gradient(Mislabel((BUS,), (TRAIN,)), logits, SCENE.attacked.boxes[None], [AS_TRAIN])
    assert gradient[0, 0, 3] > 0


def test_mislabel_takes_each_class_to_its_own():
    both = Mislabel((PERSON, BUS), (TRAIN, PERSON))
    swapped = detections((TRAIN, 0.9, 0, 0, 50, 100), (PERSON, 0.8, 100, 0, 300, 100))
    assert both.success(CLEAN, swapped)
    assert not both.success(CLEAN, detections((TRAIN, 0.9, 0, 0, 50, 100), (TRAIN, 0.8, 100, 0, 300, 100)))
    assert not both.success(CLEAN, swapped[:1])


def test_mislabel_to_other_wants_any_class_but_the_objects_own_in_its_place():
    goal = Mislabel((BUS,), (ANY,))
    for other in (PERSON, TRAIN):
        assert goal.success(CLEAN, detections((other, 0.5, 105, 0, 300, 100)))
    assert not goal.success(CLEAN, detections())
    assert not goal.success(CLEAN, detections((TRAIN, 0.9, 100, 0, 300, 100), (BUS, 0.3, 100, 0, 300, 100)))


def test_mislabel_to_other_raises_the_class_that_comes_second_where_the_object_was_found():
    logits = torch.full((1, 2, 4), -2.0)
    logits[0, 0, BUS], logits[0, 0, 3] = 4.0, 1.0
    logits[0, 1, PERSON] = 6.0
    boxes = torch.stack([SCENE.attacked.boxes[0], SCENE.others.boxes[0]])[None]
    goal = Mislabel((BUS,), (ANY,))
    aim = goal.aim(Candidates(logits, boxes), SCENE.attacked, goal.attacked(SCENE.attacked))
    assert aim.classes.tolist() == [3]
    _, gradient = loss_and_gradient(goal, logits, boxes, [aim])
    assert gradient[0, 0, 3] < 0 < gradient[0, 0, BUS]


def test_mislabel_lowers_the_old_class_on_every_candidate_of_the_object_whatever_it_becomes():
    logits = torch.full((1, 15, 4), -9.0)
    logits[0, :, BUS] = 3.0
    boxes = torch.tensor([20.0, 20, 60, 60]).repeat(1, 15, 1)
    boxes[0, 14] += 200
    for goal in (Mislabel((BUS,), (ANY,)), Mislabel((PERSON, BUS), (BUS, PERSON))):
        _, gradient = loss_and_gradient(goal, logits, boxes, [AS_TRAIN])
        assert (gradient[0, :, BUS] > 0).tolist() == [True] * 14 + [False]


def test_mislabel_lowers_a_class_that_nothing_becomes_elsewhere_too_if_all_are_attacked():
    logits, boxes = torch.full((1, 1, 4), 2.0), torch.tensor([[[200.0, 200, 240, 240]]])
    away = Renamed(SCENE.attacked[:0], SCENE.others, torch.zeros(0, dtype=torch.int64))
    _, gradient = loss_and_gradient(Mislabel((BUS,), (TRAIN,)), logits, boxes, [away])
    assert gradient[0, 0, BUS] > 0
    _, gradient = loss_and_gradient(Mislabel((BUS,), (TRAIN,), only=Selection((1,))), logits, boxes, [away])
    assert gradient[0, 0, BUS] == 0
