from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detguard import DetguardError
from detguard.attacks.budgets import L2, Linf
from detguard.attacks.steps import RULES, rule_named

TARGET = torch.tensor([[[131.0, 120.0, 128.0]]])


def follow(rule, steps):
    """The way of a rule down the squared distance to TARGET, losses beside it."""
    x, way = rule.original, []
    for _ in range(steps):
        loss = (x - TARGET).square().sum()
        way.append((x, loss.item()))
        x = rule(x, 2 * (x - TARGET), loss.item())
    return [*way, (x, (x - TARGET).square().sum().item())]


@pytest.mark.parametrize("budget", [Linf(20), L2(20 / 255)])
@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_goes_down(name, budget):
    step = (0.05 if name == "raw" else 0.3) / budget.scale
    rule = RULES[name](budget, torch.full((1, 1, 3), 128.0), step, 60)
    way = follow(rule, 60)
    assert min(loss for _, loss in way) < 0.1 * way[0][1]


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_stays_within_the_budget(name):
    rule = RULES[name](Linf(2), torch.full((1, 1, 3), 128.0), 5, 20)
    assert all((x - 128).abs().max() <= 2 for x, _ in follow(rule, 20))


def test_steps_are_as_long_as_they_are_told_in_the_budgets_own_measure():
    gradient = torch.tensor([[[3.0, -4.0, 0.0]]])
    original = torch.full((1, 1, 3), 128.0)
    for budget, wanted in ((Linf(9), [-2, 2, 0]), (L2(9), [-2 * 255 * 0.6, 2 * 255 * 0.8, 0])):
        moved = RULES["steepest"](budget, original, 2, 5)(original, gradient, 0.0) - original
        assert moved.flatten().tolist() == pytest.approx([max(-128, min(127, w)) for w in wanted], abs=1e-3)


def test_auto_pgd_starts_with_twice_the_budget_and_ends_in_ever_smaller_steps():
    rule = RULES["apgd"](Linf(4), torch.full((1, 1, 3), 128.0), 1, 100)
    way = [x for x, _ in follow(rule, 100)]
    moves = [(b - a).abs().max().item() for a, b in pairwise(way)]
    assert moves[0] == 4
    assert moves[-1] < 1
    assert (way[-1] - TARGET.clamp(124, 132)).abs().max() < 1


def test_auto_pgd_counts_the_times_that_the_loss_fell():
    for falls, halved in ((17, False), (16, True)):  # of 22 steps; three quarters of them are 16.5
        rule = RULES["apgd"](Linf(4), torch.full((1, 1, 3), 128.0), 1, 100)
        x, size = torch.full((1, 1, 3), 128.0), rule._size
        for loss in (10.0, *(9.0 - step for step in range(falls)), *[99.0] * (22 - falls)):
            x = rule(x, torch.ones(1, 1, 3), loss)
        assert (rule._size < size) is halved


def test_momentum_adds_to_gradients_as_they_are_where_steps_are_as_long_as_these():
    rules = (RULES["raw"](Linf(20), torch.full((1, 1, 3), 128.0), 0.05, 5, momentum) for momentum in (0, 0.01, 0.9))
    plain, little, much = (follow(rule, 5)[-1][0] for rule in rules)
    assert (little - plain).abs().max() < 0.1
    assert (much - TARGET).abs().max() < (plain - TARGET).abs().max()


def test_an_unknown_rule_is_refused():
    with pytest.raises(DetguardError, match="`rule`"):
        rule_named("lbfgs")


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["steepest", "sign"]), st.integers(1, 255), st.integers(1, 255), st.sampled_from([0.0, 0.75]),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_steps_in_bytes_are_those_in_floats(name, eps, step, momentum, by_channel, seed):
    generator = torch.Generator().manual_seed(seed)
    original = torch.randint(256, (5, 4, 3), generator=generator).float()
    gradients = torch.randn(4, 5, 4, 3, generator=generator)
    gradients[:, 0] = 0
    gradients = gradients.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if by_channel else gradients
    start = Linf(eps).start(original, seed)
    rules = [rule_named(name)(Linf(eps), original, step, 4, momentum) for _ in range(2)]
    exact, fast = start, rules[1].begin(start)
    assert fast.dtype == torch.uint8
    for gradient in gradients:
        exact, fast = rules[0](exact, gradient, 0.0), rules[1](fast, gradient, 0.0)
        assert torch.equal(fast.float(), exact)


@pytest.mark.parametrize(
    ("name", "budget", "step"),
    [("sign", Linf(4), 0.5), ("normalized", Linf(4), 1), ("raw", Linf(4), 1), ("steepest", L2(2), 1)],
)
def test_where_photos_are_not_in_whole_levels_steps_are_in_floats(name, budget, step):
    photo = torch.full((4, 4, 3), 9.0)
    assert rule_named(name)(budget, photo, step, 4).begin(photo).is_floating_point()
