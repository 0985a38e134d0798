"""Black-box attacks: by the scores of the group alone."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from detguard import DetguardError
from detguard.attacks.budgets import L2, Linf, parse_budget
from detguard.attacks.group import STEADY, AttackOptions, Victim, attack_group
from detguard.attacks.square import Square, share
from detguard.detections import Detections
from detguard.detectors.ultralytics import UltralyticsDetector
from detguard.objectives import Degrade, Fabricate, Vanish
from detguard.photos import frames_tensor
from detguard.transforms.parse import parse_transforms


class Blind(UltralyticsDetector):
    """Only predicts."""

    differentiable = False
    asked = 0

    def candidates(self, frames):
        assert not torch.is_grad_enabled()
        self.asked += len(frames)
        return super().candidates(frames)


@pytest.fixture(scope="module")
def small(bus):
    return cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)


@pytest.fixture
def blind(bundled_model):
    return Blind(bundled_model, "blind", 160)


def attack(detector, photo, spec="none", objective=None, **options):
    clean = detector.predict(photo, 0.25)
    options = AttackOptions(**{"black_box": True, "queries": 60, **options})
    transforms, objective = parse_transforms(spec), objective or Vanish((0,))
    return next(attack_group(detector, [("bus", photo, clean)], objective, transforms, options))


def test_it_lowers_its_loss_within_its_budget_and_repeats(bundled, small):
    found = bundled.detect([small], 0.25)[0]
    objects = Detections(found.boxes, torch.ones(len(found)), found.classes)
    options = AttackOptions(budget=Linf(8), black_box=True, queries=40, stop=False, seed=3)
    goal, box = Degrade(tuple(bundled.class_names)), bundled.letterbox(small.shape[:2])
    asked = bundled, [("bus", small, objects)], goal, [], options
    first, second = (next(attack_group(*asked)).adversarial for _ in range(2))
    assert np.array_equal(first, second)
    assert 1 <= np.abs(first.astype(int) - small).max() <= 8
    before, after = (bundled.candidates(frames_tensor([box(p)])) for p in (small, first))
    placed = replace(objects, boxes=box.boxes_to_frame(objects.boxes))
    aims = [goal.aim(before, placed, torch.ones(len(placed), dtype=torch.bool))]
    assert goal.loss(after, aims, 0.25) < goal.loss(before, aims, 0.25)


@pytest.mark.parametrize("budget", [Linf(32), L2(70), parse_budget("l2", 60, "inside")])
def test_it_fools_what_only_predicts_and_counts_its_queries(blind, small, budget):
    attempt = attack(blind, small, "flip:h", budget=budget, queries=400)
    assert attempt.done
    assert attempt.used <= budget.eps
    assert attempt.queries == blind.asked == 2 * (attempt.steps + 1) <= 400
    for shown in (attempt.adversarial, attempt.adversarial[:, ::-1].copy()):
        assert not len(blind.predict(shown, 0.25).of([0]))


def test_it_ends_where_its_queries_do(blind, small):
    attempt = attack(blind, small, "median:3,jpeg:75", budget=Linf(1), queries=20)
    assert attempt.failed
    assert attempt.queries == blind.asked == 18


def test_looks_at_copies_of_the_clean_photo_count_where_they_are_compared_with_at_every_draw(blind, small, monkeypatch):
    looks = []
    predict = Blind.predict
    monkeypatch.setattr(Blind, "predict", lambda self, *rest: looks.append(1) or predict(self, *rest))
    spec, objective = "rotate:-5..5,brightness:-0.2..0.2", Fabricate((0,), 50)
    attempt = attack(blind, small, spec, objective, budget=Linf(1), queries=30)
    assert attempt.failed
    drawn = 2 * (attempt.steps + 1)
    assert attempt.queries == blind.asked + drawn <= 30
    assert len(looks) == 1 + drawn + 2  # the clean photo first, and the draws that it is judged by


@pytest.mark.parametrize("aggregate", ["mean", "max", "weighted"])
def test_the_losses_of_members_become_one_as_is_asked(blind, small, aggregate, monkeypatch):
    told = []
    monkeypatch.setattr("detguard.attacks.square.Square.__call__", lambda self, x, _, loss: told.append(loss) or x)
    weights = {"weighted": (3.0, 1.0)}.get(aggregate)
    alone = [attack(blind, photo, queries=2, budget=Linf(1)).best_rank[1] for photo in (small, small[:, ::-1].copy())]
    told.clear()
    attack(blind, small, "flip:h", aggregate=aggregate, weights=weights, queries=4, budget=Linf(1))
    one, other = -alone[0], -alone[1]
    wanted = {"mean": (one + other) / 2, "max": max(one, other), "weighted": (3 * one + other) / 4}[aggregate]
    assert told[0] == pytest.approx(wanted, rel=1e-3)


def test_random_members_are_asked_again_until_they_are_steady(blind, small):
    seen = []
    clean = blind.predict(small, 0.25)
    options = AttackOptions(budget=Linf(48), black_box=True, queries=600)
    photos = [("bus", small, clean)]
    spec = parse_transforms("brightness:-0.1..0.1")
    (attempt,) = attack_group(
        blind, photos, Vanish((0,)), spec, options, lambda active: seen.append((active[0].in_a_row, active[0].levels))
    )
    assert attempt.done
    assert [row for row, _ in seen[-STEADY:]] == [1, 2, 3, 4, 5]
    assert all(np.array_equal(photo, attempt.adversarial) for _, photo in seen[-STEADY:])


def test_all_detectors_are_asked(blind, bundled, small):
    other = Victim(bundled, Vanish((0,)))
    options = AttackOptions(budget=Linf(1), black_box=True, queries=9)
    photos = [("bus", small, blind.predict(small, 0.25))]
    (attempt,) = attack_group(blind, photos, Vanish((0,)), [], options, also=[other])
    assert attempt.queries == 8
    with pytest.raises(DetguardError, match="`queries` 3: expected 4"):
        list(attack_group(blind, photos, Vanish((0,)), [], replace(options, queries=3), also=[other]))


def test_a_gradient_is_not_asked_of_what_has_none(blind, small):
    with pytest.raises(DetguardError, match="blind: has no gradient; give `black_box`"):
        attack(blind, small, black_box=False, queries=5000)


@pytest.mark.parametrize(
    ("name", "value"),
    [("smallest", True), ("rule", "apgd"), ("step", 2.0), ("steps", 7), ("momentum", 0.5), ("gradient", "exact"),
     ("random_start", True)],
)  # fmt: skip
def test_options_of_a_gradient_are_refused(name, value):
    with pytest.raises(DetguardError, match=f"`{name}`: does not go with `black_box`"):
        AttackOptions(black_box=True, **{name: value}).check(1)


def test_queries_are_of_a_black_box():
    with pytest.raises(DetguardError, match="`queries`"):
        AttackOptions(queries=9).check(1)


@pytest.mark.parametrize(("loss", "kept"), [(4.0, 0), (2.0, 1)])
def test_it_goes_on_from_the_photo_of_lowest_loss(loss, kept):
    original, nothing = torch.full((40, 40, 3), 128.0), torch.empty(0)
    search = Square(Linf(8), original, 1, 50, seed=3)
    best = search(original, nothing, 5.0)
    proposed = search(best, nothing, 3.0)
    after = search(proposed, nothing, loss)
    rows, columns = (after != (best, proposed)[kept]).any(2).nonzero(as_tuple=True)
    side = round((0.3 * share(2, 50)) ** 0.5 * 40)
    assert 0 < len(rows) <= side**2
    assert max(rows.max() - rows.min(), columns.max() - columns.min()) < side
    other = (after != (proposed, best)[kept]).any(2).nonzero(as_tuple=True)[0]
    assert len(other) > len(rows)


def test_squares_halve_as_the_search_goes_on():
    shares = [share(number, 10_000) for number in (1, 11, 60, 300, 1500, 3000, 5000, 7000, 9000)]
    assert shares == [0.5**i for i in range(9)]
