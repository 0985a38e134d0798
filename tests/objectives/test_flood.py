from scenes import BUS, PERSON, SCENE, detections, loss_and_gradient, some_candidates

from detguard.objectives import Flood


def test_so_many_must_be_found():
    found = detections(*((PERSON, 0.9, x, 0, x + 40, 40) for x in range(5)))
    assert Flood((PERSON,), 5).success(detections(), found)
    assert not Flood((PERSON,), 6).success(detections(), found)
    assert not Flood((BUS,), 1).success(detections(), found)


def test_every_candidate_is_raised_by_its_best_target_class():
    logits, boxes = some_candidates()
    _, gradient = loss_and_gradient(Flood((PERSON, BUS)), logits, boxes, [SCENE] * 2)
    best = logits[..., :2].argmax(2, keepdim=True)
    assert (gradient.gather(2, best) < 0).all()
    assert (gradient != 0).sum() == best.numel()
