from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from detguard import DetguardError
from detguard.attacks.budgets import L2, Linf
from detguard.attacks.group import (
    STEADY,
    WAITING,
    AttackOptions,
    Member,
    Victim,
    _losses,
    attack_group,
    photo_gradient,
    photo_seed,
)
from detguard.attacks.steps import Steepest
from detguard.detections import Candidates, Detections
from detguard.detectors.load import load_detector
from detguard.objectives import Flood, Vanish
from detguard.objectives.base import outcomes
from detguard.photos import Letterbox, largest_difference
from detguard.transforms.base import seen
from detguard.transforms.parse import parse_transforms


def test_a_photos_seed_depends_on_the_run_and_on_the_photo():
    assert len({photo_seed(k, s) for k in ("a", "b") for s in (0, 1)}) == 4


def plain_members(letterbox, specs="", number=0):
    """Members of a photo that its letterbox fits: the photo, transforms by specs, and more of the photo."""
    transforms = [None, *parse_transforms(specs), *[None] * number]
    nobody: Any = None
    return [Member(nobody, transform, letterbox.photo, letterbox, nobody, nobody, None) for transform in transforms]


def gradients_of(letterbox, number):
    return torch.rand(number, 3, *letterbox.frame, generator=torch.Generator().manual_seed(number)).double()


@pytest.mark.parametrize("rule", ["straight-through", "exact"])
def test_aggregates_are_what_they_are_called(rule):
    letterbox = Letterbox.fit((50, 37), 64)
    gradients, photo = gradients_of(letterbox, 2), np.zeros((50, 37, 3), np.uint8)
    members = plain_members(letterbox, number=1)
    one, two = (letterbox.pull_back(g, spread=rule != "exact") for g in gradients)
    for options, wanted in (
        (AttackOptions(gradient=rule), (one + two) / 2),
        (AttackOptions(aggregate="max", gradient=rule), torch.where(one.abs() >= two.abs(), one, two)),
        (AttackOptions(aggregate="weighted", weights=(3.0, 1.0), gradient=rule), (3 * one + two) / 4),
    ):
        assert torch.allclose(photo_gradient(gradients, photo, members, options), wanted)


def test_exact_gradients_go_through_the_transforms(bus):
    letterbox = Letterbox.fit(bus.shape[:2], 320)
    members = plain_members(letterbox, "median:3")
    gradients = gradients_of(letterbox, 2).float()
    exact = photo_gradient(gradients, bus, members, AttackOptions(gradient="exact"))
    back = [letterbox.pull_back(g) for g in gradients]
    assert torch.allclose(exact, (back[0] + members[1].transform.pull_back(bus, back[1])) / 2, atol=1e-6)
    straight = photo_gradient(gradients, bus, members, AttackOptions())
    assert not torch.allclose(exact, straight, atol=1e-3)


def test_gradients_of_moved_pixels_are_brought_back_before_they_become_one(bundled, small):
    (flip,) = parse_transforms("flip:h")
    clean = bundled.predict(small, 0.25)
    victim = Victim(bundled, Vanish((0,)))
    members = [Member.of(victim, transform, small, clean, 0.25) for transform in (None, flip)]
    assert members[1].warp is not None
    gradient = gradients_of(members[0].letterbox, 1)[0].float()
    whole = photo_gradient([gradient, gradient.flip(2)], small, members, AttackOptions())
    alone = photo_gradient([gradient], small, members[:1], AttackOptions())
    assert torch.allclose(whole, alone, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        AttackOptions(aggregate="weighted"),
        AttackOptions(weights=(1.0, 1.0)),
        AttackOptions(aggregate="weighted", weights=(1.0,)),
    ],
)
def test_weights_must_match_the_group(options):
    with pytest.raises(DetguardError, match="`weights`"):
        options.check(2)


def attack(detector, photo, spec="median:3,jpeg:75", **options):
    clean = detector.predict(photo, 0.25)
    options = AttackOptions(**{"steps": 40, **options})
    return next(attack_group(detector, [("bus", photo, clean)], Vanish((0,)), parse_transforms(spec), options))


def test_the_group_attack_fools_every_member_within_its_budget(bundled, bus):
    before = bundled.state_hash()
    attempt = attack(bundled, bus)
    assert attempt.done
    assert largest_difference(attempt.adversarial, bus) <= 4
    for transform in [None, *parse_transforms("median:3,jpeg:75")]:
        shown = transform(attempt.adversarial) if transform else attempt.adversarial
        assert len(bundled.predict(shown, 0.25).of([0])) == 0
    assert bundled.state_hash() == before


def test_what_is_not_in_the_group_brings_people_back(bundled, bus):
    small = cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)
    for spec, left in (("none", True), ("median:3,jpeg:75", False)):
        attempt = attack(bundled, small, spec=spec)
        assert attempt.done
        filtered = [t(attempt.adversarial) for t in parse_transforms("median:3,jpeg:75")]
        assert any(len(bundled.predict(photo, 0.25).of([0])) for photo in filtered) == left


def test_no_budget_means_no_change_and_no_success(bundled, bus):
    attempt = attack(bundled, bus, budget=Linf(0), steps=2)
    assert attempt.failed
    assert np.array_equal(attempt.adversarial, bus)


def test_an_attack_is_repeatable(bundled, bus):
    first, second = (attack(bundled, bus, random_start=True, seed=3, steps=3) for _ in range(2))
    assert np.array_equal(first.adversarial, second.adversarial)
    assert not np.array_equal(first.adversarial, attack(bundled, bus, random_start=True, seed=4, steps=3).adversarial)


def test_fractions_of_a_level_add_up(bundled, bus):
    attempt = attack(bundled, bus, step=0.4, steps=4, budget=Linf(2))
    assert 1 <= largest_difference(attempt.adversarial, bus) <= 2


def test_photos_leave_the_batch_when_done_and_others_take_their_places(bundled, bus):
    clean = bundled.predict(bus, 0.25)
    smaller = np.ascontiguousarray(bus[:1000, :800])  # another frame shape: waits for its own batch
    photos = [("a", bus, clean), ("b", bus[:, ::-1].copy(), bundled.predict(bus[:, ::-1].copy(), 0.25))]
    photos += [("c", smaller, bundled.predict(smaller, 0.25)), ("d", bus, clean)]
    seen = []
    options = AttackOptions(steps=40, batch=2)
    finished = list(attack_group(bundled, photos, Vanish((0,)), parse_transforms("none"), options, seen.append))
    assert sorted(a.key for a in finished) == ["a", "b", "c", "d"]
    assert max(len(active) for active in seen) == 2
    alone = attack(bundled, bus, spec="none")
    together = next(a for a in finished if a.key == "d")
    # Convolutions of another batch size round differently, and a sign near zero may flip; the attack is the same.
    assert together.steps == alone.steps
    assert np.abs(together.adversarial.astype(int) - alone.adversarial).mean() < 0.05


@pytest.fixture(scope="module")
def small(bus):
    return cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)


@dataclass(frozen=True)
class Scripted(Vanish):
    """Vanish, whose loss is changed and whose success is told, each by how often it was asked before."""

    change: Callable[[Tensor, int], Tensor] = lambda loss, number: loss
    told: tuple[bool, ...] = ()
    losses: list[int] = field(default_factory=list)
    successes: list[int] = field(default_factory=list)
    aims: list[int] = field(default_factory=list)

    def loss(self, candidates, aims, conf, sure=None):
        self.losses.append(1)
        return self.change(super().loss(candidates, aims, conf), len(self.losses) - 1)

    def success(self, clean, found, attacked=None):
        self.successes.append(1)
        return self.told[len(self.successes) - 1] if self.told else super().success(clean, found, attacked)

    def aim(self, candidates, objects, attacked):
        self.aims.append(1)
        return super().aim(candidates, objects, attacked)


def scripted(detector, photo, objective, spec="none", **options):
    """The attempt of a failing attack, and the photos that it went through."""
    seen = [photo]
    options = AttackOptions(**{"budget": Linf(1), "steps": 4, "schedule": "group", **options})
    source = [("bus", photo, detector.predict(photo, 0.25))]
    transforms = parse_transforms(spec)
    (attempt,) = attack_group(detector, source, objective, transforms, options, lambda a: seen.append(a[0].levels))
    assert attempt.failed
    return attempt, seen


def test_a_failed_attack_gives_the_photo_of_least_loss_not_the_last(bundled, small):
    least_at_second = Scripted((0,), change=lambda loss, number: loss - 1000 * (number == 1))
    attempt, seen = scripted(bundled, small, least_at_second)
    assert np.array_equal(attempt.adversarial, seen[1])
    assert not np.array_equal(attempt.adversarial, seen[-1])


def test_a_failed_attack_rather_gives_the_photo_that_fools_more_members(bundled, small):
    one_at_second = Scripted(
        (0,), change=lambda loss, number: loss + 1000 * (number == 1), told=(False, False, True, True) + (False,) * 7
    )
    attempt, seen = scripted(bundled, small, one_at_second, spec="median:3")
    assert np.array_equal(attempt.adversarial, seen[1])


def test_losses_of_detectors_on_several_devices_come_together_on_one():
    objective = SimpleNamespace(loss=lambda candidates, aims, conf, sure: candidates.logits.sum((1, 2)))
    victim = SimpleNamespace(victim=SimpleNamespace(objective=objective))
    with FakeTensorMode():
        shown = [torch.zeros(2, 3, 8, 8, device=device) for device in ("cuda:0", "cpu", "cuda:1")]
        passes = [
            ([2 * i, 2 * i + 1], x, Candidates(x.new_zeros(2, 5, 1), x.new_zeros(2, 5, 4))) for i, x in enumerate(shown)
        ]
        losses = _losses(passes, [(victim, None)] * 6, [None] * 6, 0.25, 0.25)
        assert [loss.device for loss in losses] == [torch.device("cuda:0")] * 6


def test_what_is_aimed_at_is_fixed_at_the_first_pass(bundled, small):
    objective = Scripted((0,))
    scripted(bundled, small, objective, steps=2)
    assert len(objective.losses) == 3
    assert len(objective.aims) == 1


def test_momentum_weighs_steps_alike_however_large_their_gradients(bundled, small):
    louder = Scripted((0,), change=lambda loss, number: loss * 1024**number)
    attempts = [scripted(bundled, small, objective, momentum=0.9)[0] for objective in (louder, Scripted((0,)))]
    assert torch.equal(attempts[0].x, attempts[1].x)


def test_a_margin_has_the_attack_go_on_until_confidence_is_that_share_lower(bundled, small):
    left = {}
    for margin in (0.0, 0.8):
        attempt = attack(bundled, small, spec="none", margin=margin, steps=60)
        assert attempt.done
        left[margin] = len(bundled.detect([attempt.adversarial], 0.25 * (1 - 0.8))[0].of([0]))
    assert left[0.0] > 0
    assert left[0.8] == 0


@pytest.mark.parametrize(("sure", "fooled"), [(0.59, True), (0.61, False)])
def test_a_member_is_fooled_by_what_is_found_where_it_is_found_surely_enough(sure, fooled):
    victim: Any = Victim(None, Flood((0,), 1))
    (member,) = plain_members(Letterbox.fit((64, 64), 64))
    member = replace(member, victim=victim, clean=Detections.none(), attacked=torch.zeros(0, dtype=torch.bool))
    found = Detections(torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([0.6]), torch.tensor([0]))
    assert member.fooled(found, sure) is fooled


def test_momentum_takes_part_of_earlier_gradients_from_the_second_step_on(bundled, small):
    with_it, without = (
        [attack(bundled, small, spec="none", momentum=m, steps=n, stop=False) for n in (1, 4)] for m in (0.9, 0.0)
    )
    assert torch.equal(with_it[0].x, without[0].x)
    assert not torch.equal(with_it[1].x, without[1].x)


def test_straight_through_the_gradient_reaches_every_pixel_of_a_photo_larger_than_its_frame():
    letterbox = Letterbox.fit((200, 150), 64)
    gradients, photo = torch.ones(1, 3, *letterbox.frame), np.zeros((200, 150, 3), np.uint8)
    members = plain_members(letterbox)
    assert (photo_gradient(gradients, photo, members, AttackOptions()) > 0).all()
    assert (photo_gradient(gradients, photo, members, AttackOptions(gradient="exact")) == 0).any()


def test_a_step_is_as_long_as_it_is_told(bundled, small):
    attempt = attack(bundled, small, spec="none", step=0.4, steps=1)
    moved = (attempt.x - torch.from_numpy(small)).abs()
    assert moved.max().item() == pytest.approx(0.4, abs=1e-4)


@pytest.mark.parametrize("rule", ["steepest", "apgd", "adam", "normalized"])
def test_every_rule_fools_within_an_l2_budget(bundled, small, rule):
    budget = L2(8)
    step = {"adam": 2 / 255, "normalized": 2 / 255, "apgd": None}.get(rule, 2)
    attempt = attack(bundled, small, spec="none", budget=budget, rule=rule, step=step, steps=60)
    assert attempt.done
    assert budget.used(attempt.adversarial, small) <= 8


def test_a_mirrored_member_is_fooled_and_what_was_clean_is_not_taken_for_gone(bundled, small):
    mirrored = bundled.predict(small[:, ::-1].copy(), 0.25)
    (flip,) = parse_transforms("flip:h")
    clean = bundled.predict(small, 0.25)
    there, attacked = seen(flip, small.shape[:2], clean, clean.classes == 0)
    assert "kept" in outcomes(there[attacked], mirrored)
    attempt = attack(bundled, small, spec="flip:h", steps=60)
    assert attempt.done
    assert len(bundled.predict(flip(attempt.adversarial), 0.25).of([0])) == 0


def test_members_of_other_frame_shapes_share_an_attack(bundled, small):
    attempt = attack(bundled, small, spec="crop:0.9,stretch:1.6,median:3", steps=80)
    assert len({member.letterbox.frame for member in attempt.members}) > 1
    assert attempt.done
    for transform in attempt.drawn:
        assert len(bundled.predict(transform(attempt.adversarial), 0.25).of([0])) == 0


def test_a_random_member_is_drawn_anew_in_each_step_and_its_last_draw_is_told(bundled, small):
    seen = []
    options = AttackOptions(steps=4, stop=False)
    source = [("bus", small, bundled.predict(small, 0.25))]
    group = parse_transforms("rotate:-5..5")
    on_step = lambda active: seen.append(str(active[0].members[1].transform))  # noqa: E731
    (attempt,) = attack_group(bundled, source, Vanish((0,)), group, options, on_step)
    assert len(set(seen)) == len(seen) == 5
    assert str(attempt.drawn[0]) not in seen  # it failed: its best photo is not judged by the draws that chose it
    (again,) = attack_group(bundled, source, Vanish((0,)), group, options)
    assert np.array_equal(again.adversarial, attempt.adversarial)


@pytest.mark.parametrize(("spec", "steps"), [("flip:h", 0), ("noise:1", STEADY - 1)])
def test_random_members_count_as_fooled_after_some_draws_in_a_row(bundled, small, spec, steps):
    always = Scripted((0,), told=(True,) * 20)
    source = [("bus", small, bundled.predict(small, 0.25))]
    (attempt,) = attack_group(bundled, source, always, parse_transforms(spec), AttackOptions())
    assert attempt.done
    assert attempt.steps == steps


def test_one_photo_fools_two_detectors_each_in_its_own_classes(bundled, small):
    other = load_detector("detguard-n-hard")
    clean = bundled.predict(small, 0.25)
    assert len(other.predict(small, 0.25).of([0]))
    options = AttackOptions(budget=Linf(16), step=2, steps=60)
    also = [Victim(other, Vanish((0, 4)))]
    source, group = [("bus", small, clean)], parse_transforms("median:3")
    (attempt,) = attack_group(bundled, source, Vanish((0,)), group, options, also=also)
    assert attempt.done
    assert len(attempt.fooled) == 4
    assert [str(transform) for transform in attempt.drawn] == ["median:3"]
    for picture in (attempt.adversarial, group[0](attempt.adversarial)):
        assert not len(bundled.predict(picture, 0.25).of([0]))
        assert not len(other.predict(picture, 0.25).of([0, 4]))


def test_the_worst_member_alone_is_stepped_against_until_it_is_fooled(bundled, small, monkeypatch):
    backward, grad, looked, frame = list[int](), torch.autograd.grad, list[object](), Member.frame

    def counted(*given, **options):
        found = grad(*given, **options)
        backward.append(sum(len(frames) for frames in found if frames is not None))
        return found

    def noted(self, photo):
        looked.append((self.transform, photo.tobytes()))
        return frame(self, photo)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    monkeypatch.setattr(Member, "frame", noted)
    alone, told = [], []

    def note(active):
        alone.append(active[0].alone)
        told.append(active[0].progress)

    clean = bundled.predict(small, 0.25)
    transforms = parse_transforms("median:3,jpeg:75")
    options = AttackOptions(steps=40)  # by default
    (attempt,) = attack_group(bundled, [("bus", small, clean)], Vanish((0,)), transforms, options, note)
    assert attempt.done
    assert backward == [1] * attempt.steps
    assert None not in alone  # after the first look at all
    assert attempt.queries == len(looked) == len(transforms) + len(alone)  # one at a time from then on
    assert len(looked) == len(set(looked))  # none is shown the same photo twice
    names = ["the photo", *map(str, transforms)]
    assert told[0] == f"iteration 1, against {names[alone[0]]}"
    for transform in [None, *transforms]:
        shown = transform(attempt.adversarial) if transform else attempt.adversarial
        assert len(bundled.predict(shown, 0.25).of([0])) == 0


def test_members_in_turn_are_looked_at_together_when_steps_run_out(bundled, small):
    def bounded(active):
        assert active[0].steps <= 3

    source = [("bus", small, bundled.predict(small, 0.25))]
    options = AttackOptions(schedule="worst", budget=Linf(1), step=0.1, steps=3)
    (attempt,) = attack_group(bundled, source, Vanish((0,)), parse_transforms("median:3,jpeg:75"), options, bounded)
    assert attempt.failed
    assert attempt.steps == 3
    assert len(attempt.fooled) == 3


def test_of_members_looked_at_in_turn_the_photo_that_is_known_to_fool_more_is_given(bundled, small):
    # At first neither is fooled, then the first looked at, and from then on none.
    objective = Scripted((0,), told=(False, False, True, True) + (False,) * 7)
    attempt, seen = scripted(bundled, small, objective, spec="median:3", schedule="worst")
    assert np.array_equal(seen[1], seen[2])  # the other was looked at without a step
    assert np.array_equal(attempt.adversarial, seen[1])
    assert not np.array_equal(attempt.adversarial, seen[-1])


def test_a_photo_is_ranked_by_its_own_losses_once_it_is_left(bundled, small):
    # By the second photo the first member is fooled, and the other is far from it; by the third, which is looked at as
    # a whole, it is nearer.
    more = {0: 10, 3: 1000, 4: 50, 5: 50}
    objective = Scripted(
        (0,),
        change=lambda loss, number: loss + more.get(number, 0),
        told=(False, False, True, True, False, True, True, False),
    )
    attempt, seen = scripted(bundled, small, objective, spec="median:3", schedule="worst", steps=2)
    assert len(objective.losses) == 6
    assert np.array_equal(attempt.adversarial, seen[-1])
    assert not np.array_equal(attempt.adversarial, seen[1])
    assert attempt.progress == "iteration 2"  # of the last look nothing was known before it


@pytest.mark.parametrize(
    ("spec", "options"),
    [("median:3,rotate:-5..5", {}), ("median:3", {"rule": "apgd"}), ("median:3", {"aggregate": "max"})],
)
def test_random_members_rules_that_compare_losses_and_other_aggregates_take_the_group(bundled, small, spec, options):
    group, worst = (attack(bundled, small, spec, schedule=name, steps=2, **options) for name in ("group", "worst"))
    assert np.array_equal(group.adversarial, worst.adversarial)
    assert group.queries == worst.queries


def test_few_photos_of_other_shapes_wait_in_memory(bundled):
    read, stepped = list[int](), list[int]()

    def photos():
        for number in range(30):
            read.append(number)
            yield str(number), np.full((64, 64 + 96 * number, 3), 114, np.uint8), Detections.none()

    options = AttackOptions(steps=1, batch=2)
    search = attack_group(bundled, photos(), Flood((0,)), [], options, lambda _: stepped.append(len(read)))
    next(search)
    assert stepped[0] <= WAITING * options.batch < 30


def test_the_loss_that_rules_are_told_is_weighted_as_the_gradient_is(bundled, small, monkeypatch):
    told = list[float]()

    def noted(self, x, gradient, loss):
        told.append(loss)
        return x

    monkeypatch.setattr(Steepest, "__call__", noted)
    clean = bundled.predict(small, 0.25)
    for specs, options in (
        ("none", {}), ("jpeg:10", {"aggregate": "weighted", "weights": (1.0, 0.0)}), ("jpeg:10", {"schedule": "group"})
    ):  # fmt: skip
        next(
            attack_group(
                bundled, [("a", small, clean)], Vanish((0,)), parse_transforms(specs), AttackOptions(steps=1, **options)
            )
        )
    alone, weighted, mean = told
    assert weighted == pytest.approx(alone, rel=1e-4)
    assert mean != pytest.approx(alone, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rule": "apgd", "step": 7.0}, "step"),
        ({"rule": "apgd", "momentum": 0.5}, "momentum"),
        ({"rule": "adam", "momentum": 0.9}, "momentum"),
        ({"smallest": True, "batch": 2}, "batch"),
        ({"rule": "sign", "budget": L2(4)}, "rule"),
        ({"rule": "adam", "budget": L2(4)}, "rule"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, named):
    with pytest.raises(DetguardError, match=f"^`{named}`"):
        AttackOptions(**options).check(1)
