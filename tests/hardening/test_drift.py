from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from detguard import DetguardError
from detguard.data.stream import Labelled
from detguard.detections import Detections
from detguard.evaluation.coco import metrics_of_photos
from detguard.hardening.monitor import (
    DRIFT,
    MOST_WAITING,
    Deployment,
    LikelihoodRatio,
    Monitor,
    Numbered,
    Waiting,
    Watch,
    Windows,
    alarmed,
    least_told,
    quality,
)


def stream(seed, *parts):
    """F1 of photos: (mean, how many) after one another, as scattered as F1 is."""
    rng = np.random.default_rng(seed)
    return [float(v) for mean, count in parts for v in rng.beta(3 * mean, 3 * (1 - mean), count)]


def alarms(kind, values, window=32):
    watching = Monitor(kind, window)
    found = [(number, watching.add(value)) for number, value in enumerate(values, 1)]
    return [(number, number - began + 1) for number, began in found if began is not None]


@pytest.mark.parametrize("kind", DRIFT)
def test_a_drop_is_told_within_two_windows_and_where_it_began(kind):
    told = alarms(kind, stream(0, (0.7, 128), (0.25, 96)))
    assert len(told) == 1
    assert 128 < told[0][0] <= 128 + 64
    assert abs(told[0][1] - 129) <= 12


def test_a_photo_whose_labels_come_after_a_resume_keeps_its_time_and_whether_it_judges():
    watch = Watch(Deployment(None), "likelihood-ratio", 8)
    record = {"number": 1, "photo": "a.png", "objects": [], "id": "a", "labelled": False, "confidence": 0.5}
    watch.again(record | {"time": "noon", "judges": True})
    assert (watch.waiting["a"].photo.time, watch.waiting["a"].photo.judges) == ("noon", True)


def test_a_drop_is_told_with_the_photos_that_it_was_told_by():
    watch = Watch(Deployment(None), "likelihood-ratio", 8)
    records = []
    for number, share in enumerate([3] * 40 + [8] * 24 + [4] * 24, 1):  # of ten objects found: a rise, then a drop
        boxes = torch.arange(10.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
        objects = Detections(boxes, torch.ones(10), torch.zeros(10, dtype=torch.int64))
        photo = Labelled(Path("a.jpg"), objects)
        found = Detections(boxes[:share], torch.ones(share), torch.zeros(share, dtype=torch.int64))
        records.append(watch.judged(number, photo, found))
    (alarm,) = [r for r in records if r["began"] is not None]
    assert alarm["began"] == 65
    levels = alarm["levels"]
    assert (levels["before"], levels["after"]) == pytest.approx((16 / 18, 8 / 14))
    assert (levels["photos_before"], levels["photos_after"]) == (24, records.index(alarm) + 1 - 64)


@pytest.mark.parametrize("kind", DRIFT)
def test_a_rise_is_no_alarm_and_a_second_drop_is_one(kind):
    told = alarms(kind, stream(1, (0.3, 96), (0.75, 128), (0.2, 96)))
    assert len(told) == 1
    assert told[0][0] > 96 + 128


@pytest.mark.parametrize("kind", ["either", "likelihood-ratio", "adwin"])
def test_steady_streams_raise_no_alarm(kind):
    assert [alarms(kind, stream(seed, (0.6, 256))) for seed in range(15)] == [[]] * 15


@pytest.mark.parametrize(("known", "share", "within"), [(40, 0.6, 64), (96, 0.45, 64)])
def test_a_weak_detector_that_collapses_is_told_of_within_two_windows(known, share, within):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        # Of a weak detector many photos count 0, before as well.
        before = np.where(rng.random(known) < share, rng.beta(4, 1, known), 0)
        after = np.where(rng.random(within) < 0.03, 0.8, 0)
        told = alarms("likelihood-ratio", [*map(float, before), *map(float, after)])
        assert [known < number for number, _ in told] == [True]


@pytest.mark.parametrize("after", [8, 32, 128])
@pytest.mark.parametrize("scattered", [0.0, 0.1, 0.3])
def test_a_drop_is_told_if_it_is_larger_than_noise_hides(after, scattered):
    steady = [0.6 + scattered * (-1) ** number for number in range(128 + after)]
    least = least_told(steady, after)
    for share, told in ((0.95, False), (1.05, True)):
        fallen = [value - share * least * (number >= 128) for number, value in enumerate(steady)]
        assert bool(alarms("likelihood-ratio", fallen)) is told


def test_either_tells_as_soon_as_the_first_of_its_two():
    decay = stream(0, (0.5, 128), (0.4, 128), (0.3, 128))
    collapse = stream(0, (0.7, 128), (0.25, 96))
    for values, first in ((decay, "adwin"), (collapse, "likelihood-ratio")):
        told = {kind: alarms(kind, values)[0] for kind in ("either", "likelihood-ratio", "adwin")}
        assert told["likelihood-ratio"] != told["adwin"]
        assert told["either"] == told[first] == min(told.values())


def test_slow_decay_is_told_of():
    told = alarms("likelihood-ratio", stream(3, (0.7, 60), *[(0.7 - 0.1 * severity, 40) for severity in range(1, 6)]))
    assert 60 < told[0][0] <= 60 + 120


def test_what_is_remembered_of_a_long_stream_is_bounded():
    watching = Monitor(window=8)
    for value in stream(0, (0.5, 1000)):
        watching.add(value)
    assert len(watching.values) <= 256


def test_an_unknown_kind_is_named():
    with pytest.raises(DetguardError, match="`drift` magic"):
        Monitor("magic")


def test_the_quality_of_a_photo_needs_labels_and_its_hints_do_not():
    box = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    objects = Detections(box, torch.ones(2), torch.tensor([0, 1]))
    found = Detections(box, torch.tensor([0.8, 0.1]), torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
    told = quality(objects, found)
    assert told.f1 == pytest.approx(2 / 3)
    assert told.confidence == pytest.approx(0.8)
    assert told.entropy == pytest.approx(np.log(2))
    assert quality(objects, found[[1]]).confidence == 0


class Replaced(Deployment):
    """Another detector sees the photos from 41 on."""

    def since(self, number):
        return 40 if number > 40 else 0


def test_a_detector_that_is_deployed_is_judged_by_itself_from_then_on():
    watch, boxes, told = Watch(Replaced(None), "likelihood-ratio", 8), torch.arange(10.0)[:, None] * 20, []
    boxes = boxes + torch.tensor([0.0, 0, 10, 10])
    objects = Detections(boxes, torch.ones(10), torch.zeros(10, dtype=torch.int64))
    for number, share in enumerate([9] * 40 + [5] * 40 + [1] * 24, 1):  # of ten objects found
        photo = Labelled(Path("a.jpg"), objects)
        told.append(watch.judged(number, photo, objects[list(range(share))])["began"])
    assert [began for began in told if began] == [81]  # that it finds less than the one before it is no drop
    watch.judged(40, photo, objects)  # of the one before, whose labels come late
    assert 40 not in watch.accuracy.numbers
    watch.judged(40, replace(photo, labelled=False), objects)
    watch.judged(105, replace(photo, labelled=False), objects)
    assert [*watch.hints.numbers] == [105]


def test_an_alarm_by_late_labels_tells_up_to_where_photos_were_judged():
    watch, box = Watch(Deployment(None), "likelihood-ratio", 8), torch.tensor([[0.0, 0, 10, 10]])
    objects, told = Detections(box, torch.ones(1), torch.tensor([0])), []
    for number in [*range(1, 31), *range(60, 30, -1)]:
        found = objects if number <= 30 else objects[[]]
        told += [record] if (record := watch.judged(number, Labelled(Path("a"), objects), found))["began"] else []
    (alarm,) = told
    assert alarm["through"] == 60
    assert alarmed(alarm | {"number": alarm["began"]}) == 60
    assert alarmed({"number": 7}) == 7


def test_of_very_many_photos_without_labels_the_oldest_are_given_up():
    watch = Watch(Deployment(None), "likelihood-ratio", 8)
    for number in range(1, MOST_WAITING + 3):
        watch.wait(Waiting(number, Labelled(Path("a"), Detections.none(), id=str(number), labelled=False)))
    assert [*watch.waiting] == [str(number) for number in range(3, MOST_WAITING + 3)]


@pytest.mark.parametrize("labelled", range(3))
def test_hints_are_told_where_some_photos_have_labels(labelled):
    watching = Watch(Deployment(None), "likelihood-ratio", 8)
    box, hints = torch.tensor([[0.0, 0, 10, 10]]), []
    for number in range(1, 90):
        found = Detections(box, torch.tensor([0.8 if number < 45 else 0.4]), torch.tensor([0]))
        photo = Labelled(Path("a"), found, labelled=number % 3 == labelled)
        hints += [number] if "hint" in watching.judged(number, photo, found) else []
    assert len(hints) == 1


def test_a_photo_without_known_objects_judges_nobody():
    box = torch.tensor([[0.0, 0, 10, 10]])
    found = Detections(box, torch.tensor([0.8]), torch.tensor([0]))
    assert quality(found[[]], found[[]]).f1 is None
    assert quality(found[[]], found).f1 is None


def test_ap_of_some_photos_is_one_where_all_is_found_and_zero_where_nothing_is():
    box = torch.tensor([[0.0, 0, 100, 100], [120, 120, 140, 160]])
    objects = Detections(box, torch.ones(2), torch.tensor([0, 3]))
    none = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert metrics_of_photos([objects, none], [objects, none]).stats["AP50"] == pytest.approx(1)
    assert metrics_of_photos([objects], [none]).stats["AP50"] == 0
    assert metrics_of_photos([none], [none]).stats["AP50"] is None
    assert metrics_of_photos([objects, objects], [objects, objects[[0]]]).stats["AP50"] == pytest.approx(0.75, abs=0.01)


def test_a_lasting_change_too_small_to_tell_is_not_looked_at_from_the_start_with_each_photo(monkeypatch):
    made = []

    def counted(make):
        return lambda window: made.append(make(window)) or made[-1]

    monkeypatch.setitem(DRIFT, "either", tuple(map(counted, DRIFT["either"])))
    assert alarms("either", [0.7] * 200 + [0.61] * 200) == []
    ratio, *adaptive = made
    assert isinstance(ratio, LikelihoodRatio)
    assert ratio.drift_detected
    assert len(adaptive) == 2  # that which saw the change forgot what was before it, and is told of it again


def test_a_drop_begins_with_the_first_of_its_photos_in_whatever_order_their_labels_come():
    watching = Numbered("likelihood-ratio", 8)
    order = [*range(1, 31), *range(60, 30, -1)]
    (began,) = filter(None, (watching.add(number, 0.9 if number <= 30 else 0.0) for number in order))
    added = order[: 1 + order.index(began)]
    assert began == min(n for n in added if n > 30)


def test_an_old_photo_whose_labels_come_late_is_not_where_a_drop_begins():
    watching = Numbered("likelihood-ratio", 8)
    order = [*range(1, 5), *range(6, 36), 5, *range(36, 60)]
    (began,) = filter(None, (watching.add(number, 0.9 if 5 < number < 31 or number < 5 else 0.0) for number in order))
    assert began == 31


FOUND = Detections(torch.tensor([[0.0, 0, 9, 9]]), torch.ones(1), torch.tensor([0]))


def test_ap_of_a_window_is_of_its_own_photos_whenever_their_labels_come():
    windows, missed = Windows(4), (FOUND, Detections.none())
    # All labels late: two windows, of which the first is missed and the second found.
    assert not any(windows.ap50(n, None, range(1, n + 1), late=False) for n in range(1, 9))
    given = [windows.ap50(n, missed if n <= 4 else (FOUND, FOUND), range(n + 1, 9), late=True) for n in range(1, 9)]
    assert given == [None, None, None, 0, None, None, None, pytest.approx(1)]
    # Some at once: of those, when the window ends; what comes later changes nothing.
    now = [windows.ap50(n, (FOUND, FOUND) if n != 10 else None, [10], late=False) for n in range(9, 13)]
    assert now == [None, None, None, pytest.approx(1)]
    assert windows.ap50(10, missed, [], late=True) is None


def test_a_window_of_which_only_the_end_was_seen_has_no_ap():
    windows = Windows(4)  # as a live stream is resumed at photo 3
    given = [windows.ap50(n, (FOUND, FOUND), [], late=False) for n in range(3, 9)]
    assert given == [None] * 5 + [pytest.approx(1)]


def test_of_windows_whose_labels_never_come_few_are_kept():
    windows = Windows(512)
    for number in range(1, 40 * 512 + 1):
        windows.ap50(number, None, [], late=False)
    assert [*windows.open] == [*range(40 - MOST_WAITING // 512 - 2, 40)]
