import cv2
import pytest

from detguard.attacks.budgets import L2, Linf
from detguard.attacks.group import AttackOptions, attack_group
from detguard.attacks.smallest import attack_smallest
from detguard.detectors.load import load_detector
from detguard.objectives import Vanish
from detguard.photos import largest_difference


@pytest.fixture(scope="module")
def detector():
    return load_detector(imgsz=160)


@pytest.fixture(scope="module")
def small(bus):
    return cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("budget", [Linf(16), L2(16)])
def test_the_least_budget_fools_and_a_smaller_one_does_not(detector, small, budget):
    clean = detector.predict(small, 0.25)
    options = AttackOptions(budget=budget, step=budget.eps / 4, steps=15)
    (least,) = attack_smallest(detector, [("bus", small, clean)], Vanish((0,)), [], options)
    assert least.done
    assert not len(detector.predict(least.adversarial, 0.25).of([0]))
    assert least.used < budget.eps / 2
    below = least.used - 1 if budget.kind == "linf" else 0.9 * least.used
    step = options.step * below / budget.eps
    weaker = AttackOptions(budget=type(budget)(below), step=step, steps=15)
    (failed,) = attack_group(detector, [("bus", small, clean)], Vanish((0,)), [], weaker)
    assert failed.failed
    assert least.steps > 15


def test_where_the_whole_budget_is_not_enough_that_attempt_is_told(detector, small):
    clean = detector.predict(small, 0.25)
    options = AttackOptions(budget=Linf(1), steps=1)
    (attempt,) = attack_smallest(detector, [("bus", small, clean)], Vanish((0,)), [], options)
    assert attempt.failed
    assert attempt.steps == 1
    assert 0 < attempt.used == largest_difference(attempt.adversarial, small)


def test_the_queries_of_all_its_attempts_are_told(detector, small, monkeypatch):
    clean, shown, ask = detector.predict(small, 0.25), [], type(detector).candidates
    monkeypatch.setattr(type(detector), "candidates", lambda self, x: shown.append(len(x)) or ask(self, x))
    options = AttackOptions(budget=Linf(8), step=4, steps=5)
    (found,) = attack_smallest(detector, [("bus", small, clean)], Vanish((0,)), [], options)
    assert found.queries == sum(shown)
