"""A file that finds something else does not pass."""

import pytest
import torch
from ultralytics.utils.ops import xyxy2xywh

from detguard.detections import Candidates, suppress
from detguard.export.base import Deployment
from detguard.export.check import Verdict, compare_candidates, compare_listed, default_photos, frames_of


@pytest.fixture(scope="module")
def wanted(bundled, bus):
    return Deployment(bundled, bundled.model, "", frames_of(bundled, [bus], square=False))


@pytest.fixture(scope="module")
def ours(wanted):
    with torch.no_grad():
        return wanted.detector.candidates(wanted.frames[0])


def whole(ours):
    return torch.cat([xyxy2xywh(ours.boxes), ours.logits.sigmoid()], 2).transpose(1, 2).clone()


def listed(ours, conf=0.25):
    (found,) = suppress(ours, conf, 0.7)
    rows = torch.zeros(1, 300, 6)
    rows[0, : len(found)] = torch.cat([found.boxes, found.scores[:, None], found.classes[:, None]], 1)
    return rows


def verdict(compare, found, ours, wanted):
    made = Verdict()
    compare(found, ours, wanted, made)
    return made


def test_the_same_passes(ours, wanted):
    for compare, found in ((compare_candidates, whole(ours)), (compare_listed, listed(ours))):
        same = verdict(compare, found, ours, wanted)
        assert same.passed
        assert (same.scores, round(same.boxes, 3)) == (0, 0)


@pytest.mark.parametrize(
    ("row", "change"), [(0, 0.7), (3, 1.2), (4, 0.01), (5, -0.01), (0, torch.nan), (16, torch.nan)]
)
def test_a_candidate_that_differs_does_not(ours, wanted, row, change):
    found = whole(ours)
    found[0, row, int(ours.logits[0].amax(1).argmax())] += change
    assert not verdict(compare_candidates, found, ours, wanted).passed


def test_boxes_that_nobody_is_shown_may_differ(ours, wanted):
    found = whole(ours)
    found[0, 0, int(ours.logits[0].amax(1).argmin())] += 100
    assert verdict(compare_candidates, found, ours, wanted).passed


def test_another_shape_does_not(ours, wanted):
    assert not verdict(compare_candidates, whole(ours)[:, :-1], ours, wanted).passed


@pytest.mark.parametrize("change", ["missing", "more", "moved", "surer", "another class", "nothing"])
def test_a_list_that_differs_does_not(ours, wanted, change):
    found = listed(ours)
    match change:
        case "missing":
            found[0, 1:-1] = found[0, 2:].clone()
        case "more":
            found[0, 299] = torch.tensor([1, 1, 9, 9, 0.5, 0])
        case "moved":
            found[0, 0, 2] += 0.7
        case "surer":
            found[0, 0, 4] += 0.005
        case "another class":
            found[0, 0, 5] += 1
        case "nothing":
            found.zero_()
    told = verdict(compare_listed, found, ours, wanted)
    assert not told.passed
    if change == "another class":
        assert told.record()["scores"] is None


def test_one_that_is_hardly_over_the_confidence_may_be_missing(wanted):
    boxes = torch.tensor([[[0.0, 0, 9, 9], [20, 20, 40, 40]]])
    ours = Candidates(torch.logit(torch.tensor([[[0.9], [0.2505]]])), boxes)
    found = listed(ours)
    found[0, 1] = 0
    assert verdict(compare_listed, found, ours, wanted).passed


def test_where_nothing_was_found_nothing_was_checked(wanted):
    ours = Candidates(torch.full((1, 2, 1), -9.0), torch.zeros(1, 2, 4))
    assert not verdict(compare_listed, torch.zeros(1, 300, 6), ours, wanted).passed


def test_there_are_eight_photos_without_any_given():
    assert len(default_photos()) == 8


def test_a_list_is_counted_once(ours, wanted):
    assert verdict(compare_listed, listed(ours), ours, wanted).compared == int((listed(ours)[0, :, 4] > 0.25).sum())
