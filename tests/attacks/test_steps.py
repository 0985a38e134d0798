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


def auto_pgd(original, eps, losses, gradients):
    """Algorithm 1 of Croce & Hein (2020), down in L-inf and of 100 steps: its photos, and the steps that it halves at.

    It is told `losses` and `gradients` of its photos; from a best photo it goes on without momentum, as the rule does.
    """
    way, sizes, lowest, halved = [original], [2.0 * eps], [losses[0]], []
    x = before = original
    periods = dict((k, since) for since, k in pairwise([0, 22, 41, 57, 70, 80, 87, 93, 99]))
    for k in range(100):
        size, gradient, momentum = sizes[k], gradients[k], k > 0
        if (since := periods.get(k)) is not None:
            oscillates = sum(losses[i + 1] < losses[i] for i in range(since, k)) < 0.75 * (k - since)
            stuck = sizes[since] == sizes[k] and lowest[since] == lowest[k]
            if oscillates or stuck:
                best = losses.index(lowest[k])
                x, gradient, size, momentum = way[best], gradients[best], size / 2, False
                halved.append(k)
        moved = (x - size * gradient.sign()).clamp(original - eps, original + eps)
        if momentum:
            moved = (x + 0.75 * (moved - x) + 0.25 * (x - before)).clamp(original - eps, original + eps)
        before, x = x, moved
        way.append(moved)
        sizes.append(size)
        lowest.append(min(losses[: k + 2]))
    return way, halved


def test_auto_pgd_goes_the_way_of_its_paper():
    steadily, stuck = [-float(i) for i in range(23)], [99.0 - i for i in range(19)]
    astray = [99.0, -50.0] * 5  # the best of all is among them
    losses = [*steadily, *stuck, *stuck[:16], *stuck[:13], *astray, *astray[:7], *stuck[:6], *stuck[:6]]
    gradients = torch.randn(100, 2, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    original = torch.full((2, 2, 3), 128.0).double()
    wanted, halved = auto_pgd(original, 4, losses, gradients)
    assert halved == [41, 70, 80, 87, 99]  # of being stuck not at 57 and 93, as steps are halved just before
    rule, way = RULES["apgd"](Linf(4), original, 1, 100), [original]
    for gradient, loss in zip(gradients, losses, strict=True):
        way.append(rule(way[-1], gradient, loss))
    assert torch.allclose(torch.stack(way), torch.stack(wanted), rtol=0, atol=1e-9)


def test_gradients_have_one_mean_size_before_momentum_adds_them():
    rule = RULES["normalized"](Linf(9), torch.full((1, 1, 3), 128.0), 1, 2, 0.5)
    x = rule(rule.original, torch.tensor([[[4.0, -4.0, 4.0]]]), 0.0)
    moved = rule(x, torch.tensor([[[-0.03, 0.0, 0.06]]]), 0.0) - x
    together = torch.tensor([0.5 - 1, -0.5, 0.5 + 2])
    assert moved.flatten().tolist() == pytest.approx((-together / together.abs().mean()).tolist(), abs=1e-4)


def test_adam_moves_alike_however_large_gradients_are():
    gradients = torch.randn(4, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    alike, varied = (RULES["adam"](Linf(99), torch.full((1, 1, 3), 128.0), 0.5, 4) for _ in range(2))
    x = other = alike.original
    for gradient, size in zip(gradients, (2.0**-40, 2.0**-30, 1.0, 2.0**20), strict=True):
        x, other = alike(x, gradient, 0.0), varied(other, size * gradient, 0.0)
        assert torch.equal(x, other)


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
