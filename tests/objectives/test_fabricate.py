import torch
from scenes import BUS, CLEAN, PERSON, detections, loss_and_gradient

from detguard.detections import Candidates
from detguard.objectives import Fabricate


def test_a_new_person_is_one_where_none_was():
    goal = Fabricate((PERSON,))
    assert goal.success(CLEAN, detections((PERSON, 0.9, 100, 0, 300, 100)))  # a bus was there, but no person
    assert not goal.success(CLEAN, CLEAN)
    assert not goal.success(CLEAN, detections((PERSON, 0.9, 2, 0, 50, 100), (BUS, 0.9, 400, 0, 450, 100)))
    assert goal.success(detections(), CLEAN)


def test_so_many_must_be_new():
    found = detections(*((PERSON, 0.9, x, 0, x + 40, 40) for x in (400, 500, 600)))
    assert Fabricate((PERSON,), 3).success(CLEAN, found)
    assert not Fabricate((PERSON,), 4).success(CLEAN, found)


def test_the_best_candidates_that_lie_on_no_object_and_apart_are_raised():
    logits = torch.full((1, 5, 3), -9.0)
    logits[0, :, PERSON] = torch.tensor([3.0, -1.0, -2.0, -3.0, -4.0])
    # On the person, free, on the same place, free, on the bus.
    boxes = torch.tensor(
        [[[0.0, 0, 50, 100], [400, 0, 450, 100], [402, 0, 450, 100], [500, 0, 550, 90], [100, 0, 300, 98]]]
    )
    goal = Fabricate((PERSON,))
    places = goal.aim(Candidates(logits, boxes), CLEAN, goal.attacked(CLEAN))
    _, gradient = loss_and_gradient(goal, logits, boxes, [places])
    assert (gradient[0, :, PERSON] < 0).tolist()[:4] == [False, True, False, True]
    assert (gradient[0, :, BUS] == 0).all()


def test_no_more_places_than_are_of_use_are_chosen():
    x = torch.arange(40.0) * 100
    boxes = torch.stack([x, x * 0, x + 50, x * 0 + 50], 1)[None]
    candidates = Candidates(torch.randn(1, 40, 3), boxes)
    sizes = [len(Fabricate((PERSON,), n).aim(candidates, detections(), torch.zeros(0).bool()).index) for n in (1, 3)]
    assert sizes == [4, 12]


def test_places_stay_where_they_are_though_candidates_change_theirs():
    x = torch.arange(40.0) * 100
    boxes = torch.stack([x, x * 0, x + 50, x * 0 + 50], 1)[None]
    logits, goal, order = torch.randn(1, 40, 3) - 5, Fabricate((PERSON,), 2), torch.randperm(40)
    aim = goal.aim(Candidates(logits, boxes), detections(), torch.zeros(0).bool())
    before, after = (
        loss_and_gradient(goal, logits[:, rows], boxes[:, rows], [aim]) for rows in (torch.arange(40), order)
    )
    assert torch.allclose(before[0], after[0])
    assert torch.allclose(before[1][:, order], after[1])
