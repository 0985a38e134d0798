import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detguard import DetguardError
from detguard.attacks.budgets import BUDGETS, L2, WHITE, Linf, Masked, parse_budget
from detguard.detections import Detections

SIZES = st.sampled_from([0.0, 0.5, 1.0, 4.0, 255.0])


def photo_and_wild(seed, spread):
    rng = np.random.default_rng(seed)
    original = rng.integers(0, 256, (9, 7, 3), np.uint8)
    return original, torch.from_numpy(original + rng.normal(0, spread, original.shape)).float()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.3, 2.0, 50.0]), st.sampled_from(sorted(BUDGETS)), SIZES)
def test_what_is_saved_keeps_the_budget_and_the_range_of_pixels(seed, spread, kind, eps):
    original, wild = photo_and_wild(seed, spread)
    budget, levels = BUDGETS[kind](np.floor(eps) if kind == "linf" else eps), torch.from_numpy(original).float()
    saved = budget.levels(budget.project(wild, levels), levels)
    assert torch.equal(saved, saved.round())
    assert saved.min() >= 0
    assert saved.max() <= 255
    assert budget.used(saved.to(torch.uint8).numpy(), original) <= budget.eps


@pytest.mark.parametrize("budget", [Linf(4), L2(0.5)])
def test_projecting_moves_nothing_that_is_within_the_budget(budget):
    original = torch.full((4, 4, 3), 100.0)
    x = torch.full((4, 4, 3), 103.0)
    assert torch.allclose(budget.project(x, original), x)


@pytest.mark.parametrize("budget", [Linf(4), L2(0.5)])
def test_photos_of_a_batch_are_projected_each_for_itself_in_any_range(budget):
    original = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    x = original + torch.tensor([0.001, 3.0])[:, None, None, None] * torch.randn(original.shape)
    both = budget.project(x, original, white=1.0)
    alone = budget.project(255 * x[1], 255 * original[1])
    assert torch.allclose(255 * both[1], alone, atol=1e-3)
    near = original + 1e-4 * (x - original)
    assert torch.allclose(budget.project(near, original, white=1.0), near.clamp(0, 1), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([Linf(2), L2(2)]))
def test_no_step_of_length_1_raises_a_linear_loss_more_than_the_direction(seed, budget):
    generator = torch.Generator().manual_seed(seed)
    gradient, other = torch.randn(2, 5, 4, 3, generator=generator)
    best = budget.direction(gradient)
    size = {"linf": lambda x: x.abs().max(), "l2": lambda x: x.norm()}[budget.kind]
    assert size(best) == pytest.approx(1, abs=1e-5)
    assert (gradient * best).sum() >= (gradient * other / size(other)).sum() - 1e-5


def test_rounding_an_l2_change_costs_little_of_it():
    rng = np.random.default_rng(0)
    original, budget = torch.full((64, 64, 3), 128.0), L2(1.0)
    x = budget.project(original + torch.from_numpy(rng.normal(0, 40, original.shape)).float(), original)
    assert budget.used(budget.levels(x, original).to(torch.uint8).numpy(), original.to(torch.uint8).numpy()) > 0.98


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 1.4])
def test_of_a_change_that_is_alike_everywhere_rounding_leaves_nearly_all(share):
    """`share`: of a level in every value."""
    original = torch.full((64, 64, 3), 128.0)
    budget = L2(share * math.sqrt(original.numel()) / WHITE)
    levels = budget.levels(budget.project(original + 40, original), original)
    assert 0.97 < budget.used(levels.to(torch.uint8).numpy(), original.to(torch.uint8).numpy()) / budget.eps <= 1
    upper, lower = (float(half.sum()) for half in (levels - original).split(32))
    assert upper == pytest.approx(lower, rel=0.5 if share < 0.2 else 0.1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 4, 8]))
def test_random_starts_are_whole_levels_that_use_the_whole_budget(seed, eps):
    original = torch.full((30, 30, 3), 128.0)
    start = Linf(eps).start(original, seed)
    assert torch.equal(start, start.round())
    assert set((start - 128).unique().tolist()) == set(range(-eps, eps + 1))
    assert torch.equal(start, Linf(eps).start(original, seed))


def test_an_l2_start_is_at_the_surface():
    original = torch.full((30, 30, 3), 128.0)
    assert (L2(1.5).start(original, 3) - original).norm() / 255 == pytest.approx(1.5, abs=1e-4)


def test_the_length_of_a_change_is_that_of_all_its_values():
    assert L2(9).used(np.full((1, 3, 3), 255, np.uint8), np.zeros((1, 3, 3), np.uint8)) == pytest.approx(3)


@pytest.mark.parametrize("kind", sorted(BUDGETS))
def test_photos_of_two_shapes_are_not_compared(kind):
    with pytest.raises(ValueError, match="shape"):
        BUDGETS[kind](4).used(np.zeros((2, 2, 3), np.uint8), np.zeros((2, 3, 3), np.uint8))


@pytest.mark.parametrize(
    ("norm", "eps"),
    [
        ("linf", 1.5), ("linf", 256), ("linf", math.inf), ("linf", math.nan), ("linf", "8"), ("l2", -1),
        ("l2", math.nan), ("l1", 4),
    ],
)  # fmt: skip
def test_what_is_no_budget_is_refused(norm, eps):
    with pytest.raises(DetguardError, match="`norm`" if norm == "l1" else "`eps`"):
        parse_budget(norm, eps)


def test_a_text_that_reads_as_a_number_is_shown_as_the_text_that_it_is():
    with pytest.raises(DetguardError, match=r"^`eps` '8': expected a number"):
        parse_budget("linf", "8")


def test_a_part_is_that_of_a_budget_of_whole_photos():
    for within in (8, Masked.of(Linf(8), "inside")):
        with pytest.raises(DetguardError, match="`within`"):
            Masked.of(within, "inside")


MASKS = {"inside": (slice(3, 6), slice(2, 5)), "outside": None, "0,0,4,0,4,8,0,8": (slice(0, 9), slice(0, 5))}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("norm", sorted(BUDGETS))
def test_a_masked_budget_is_spent_in_its_part_only(mask, norm):
    original, wild = photo_and_wild(1, 50)
    budget = parse_budget(norm, 4, mask).on((9, 7), torch.tensor([[2.0, 3.04, 4.9, 5.5]]))
    levels = torch.from_numpy(original).float()
    part = np.zeros((9, 7), bool)
    if mask == "outside":
        part[:] = True
        part[MASKS["inside"]] = False
    else:
        part[MASKS[mask]] = True
    for x in (budget.project(wild, levels), budget.start(levels, 3), levels + budget.direction(wild - levels)):
        assert ((x != levels).any(2).numpy() <= part).all()
    saved = budget.levels(budget.project(wild, levels), levels).to(torch.uint8).numpy()
    assert (saved[part] != original[part]).any()
    assert budget.used(saved, original) <= 4
    where = np.argwhere(~part)[0]
    saved[tuple(where)] ^= 1
    assert budget.used(saved, original) == float("inf")
    assert parse_budget(**budget.config()).config() == budget.config() == {"norm": norm, "eps": 4, "mask": mask}


@pytest.mark.parametrize("mask", ["inside", "outside"])
def test_a_mask_is_the_same_by_boxes_as_they_were_found_and_as_records_keep_them(mask):
    found = Detections(torch.tensor([[1.96, 2.96, 5.04, 6.04]]), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    kept = torch.tensor([record["box"] for record in found.records({0: "person"})])
    assert not torch.equal(kept, found.boxes)
    budget = parse_budget("linf", 4, mask)
    assert torch.equal(budget.on((9, 7), found.boxes).mask, budget.on((9, 7), kept).mask)


@pytest.mark.parametrize("mask", ["", "middle", "1,2,3", "1,2,3,4,5,x", "-1,0,4,4,5,5"])
def test_what_is_no_mask_is_refused(mask):
    with pytest.raises(DetguardError, match="`mask`"):
        parse_budget("linf", 4, mask)


CORNERS = "1,1,12,2,9,20"  # of a triangle


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(sorted(BUDGETS)),
    st.sampled_from([None, "inside", "outside", CORNERS]),
    st.sampled_from([0.0, 0.5, 2.0, 16.0, 200.0]),
    st.sampled_from([(8, 8), (8, 30), (37, 23)]),
)
def test_every_proposal_of_a_random_search_keeps_the_budget(seed, norm, mask, eps, shape):
    rng = np.random.default_rng(seed)
    # Black and white among the pixels: a change must stay within their range, too.
    photo = np.clip(rng.integers(-100, 356, (*shape, 3)), 0, 255).astype(np.uint8)
    budget = parse_budget(norm, np.floor(eps) if norm == "linf" else eps, mask).on(
        shape, torch.tensor([[2.0, 1, 7, 6]])
    )
    original = torch.from_numpy(photo).float()
    x = budget.scattered(original, rng)
    for share in (1, 1, 0.5, 0.1, 0.01, 0.001):
        saved = budget.levels(x, original)
        assert torch.equal(saved, saved.round())
        assert saved.min() >= 0
        assert saved.max() <= 255
        assert budget.used(saved.to(torch.uint8).numpy(), photo) <= budget.eps
        x = budget.moved(x, original, share, rng)


@pytest.mark.parametrize("mask", [None, CORNERS])
@pytest.mark.parametrize("norm", sorted(BUDGETS))
def test_a_random_search_spends_nearly_all_of_the_budget(norm, mask):
    photo, rng = np.full((40, 30, 3), 128, np.uint8), np.random.default_rng(0)
    original = torch.from_numpy(photo).float()
    budget = parse_budget(norm, 2, mask).on((40, 30), torch.zeros(0, 4))
    x = budget.scattered(original, rng)
    for _ in range(20):
        x = budget.moved(x, original, 1, rng)
        assert budget.used(budget.levels(x, original).to(torch.uint8).numpy(), photo) > (1.9 if mask is None else 0.2)


def test_a_proposal_in_l2_empties_one_window_and_fills_another():
    original, rng, budget = torch.full((60, 60, 3), 128.0), np.random.default_rng(1), L2(4)
    x = budget.scattered(original, rng)
    moved = budget.moved(x, original, 0.1, rng)
    same = (moved == x).all(2)
    assert 0.9 < same.float().mean() < 1
    grown = (moved - original).square() > (x - original).square()
    assert grown.any()
    assert ((moved == original) & (x != original)).any()


def test_a_part_that_is_not_in_the_photo_takes_no_proposal():
    original, rng = torch.full((9, 9, 3), 100.0), np.random.default_rng(0)
    budget = parse_budget("l2", 4, "20,20,30,20,30,30").on((9, 9), torch.zeros(0, 4))
    assert torch.equal(budget.moved(budget.scattered(original, rng), original, 1, rng), original)
