import copy

import pytest

from detguard.data.stream import Labelled
from detguard.detections import Detections
from detguard.hardening import judging
from detguard.hardening.judging import answered, judge, judged_eps, readable
from detguard.photos import read_photo


def test_what_labels_cannot_tell_is_not_judged(bundled, bus_file):
    (found,) = bundled.detect([read_photo(bus_file)], 0.25)
    people = found.of([0])
    by_all, by_people = (judge(bundled, [Labelled(bus_file, people, known)])["F1"] for known in (None, (0,)))
    assert by_people == 1
    assert by_all < 1


def test_by_its_own_answers_a_detector_is_right_until_it_is_attacked(bundled, bus_file):
    labelled = answered(bundled, [bus_file], bundled.class_names)
    steps = []
    clean, attacked = (judge(bundled, labelled, eps, lambda: steps.append(1)) for eps in (0, 4))
    assert clean["AP"] == pytest.approx(1)
    assert attacked["AP"] < 0.5
    assert clean["AP_error"] is None  # of one photo
    assert len(steps) > 10


def test_where_a_detector_sees_two_classes_in_one_place_both_are_its_answer(bundled, bus_file, monkeypatch):
    monkeypatch.setattr(judging, "SHOWN_CONFIDENCE", 0.02)  # at which there is such a place
    (by_one,) = answered(bundled, [bus_file], bundled.class_names)
    assert judge(bundled, [by_one])["F1"] == 1


def test_a_teacher_answers_in_the_classes_of_its_pupil(bundled, bus_file):
    (by_one,) = answered(bundled, [bus_file], {7: "person"})
    people = bundled.detect([read_photo(bus_file)], 0.25)[0].of([bundled.class_index("person")])
    assert by_one.objects.classes.tolist() == [7] * len(people)


def test_a_teacher_of_the_same_classes_answers_by_their_numbers_also_where_several_have_one_name(bus_file, bundled):
    named = copy.copy(bundled)
    named.class_names = dict.fromkeys(bundled.class_names, "thing")
    (by_one,) = answered(named, [bus_file], named.class_names)
    assert set(by_one.objects.classes.tolist()) == set(bundled.detect([read_photo(bus_file)], 0.25)[0].classes.tolist())


def test_of_photos_without_objects_there_are_no_figures(bundled, bus_file):
    assert judge(bundled, [Labelled(bus_file, Detections.none())])["F1"] is None


def test_photos_that_cannot_be_read_are_named(bus_file, tmp_path):
    good, unread = readable([bus_file, tmp_path / "nowhere.jpg"])
    assert good == [bus_file]
    assert "nowhere.jpg" in unread[0]


def test_budgets_are_whole_levels():
    assert [judged_eps(eps) for eps in (0.1, 2.6, 4.0)] == [1, 3, 4]
