"""Each check fails where it should: shown what a blind attack would leave in the cache, or a detector that hides."""

import copy
import json

import pytest

import detguard
from detguard import DetguardError
from detguard.data.dataset import read_dataset
from detguard.detections import Detections
from detguard.evaluation.attacks import AttackSet
from detguard.evaluation.cache import Cache, pack
from detguard.evaluation.checks import BY_AP, attack_ap, check_views, first_photos, run_checks
from detguard.evaluation.views import Clean, Subject

ATTACK = AttackSet(("class",), eps=4, steps=2)
QUERIES = 3
# Whether all is left or nothing: under the attack, twice its steps, a large budget, and the black box.
HONEST = (False, False, False, True)


@pytest.fixture
def subject(bundled, tiny_data, tmp_path):
    dataset = read_dataset(tiny_data)
    return Subject("bundled", bundled, dataset, dataset.category_ids(bundled.class_names), Cache(tmp_path / "c.sqlite"))


def failed(subject: Subject, left: tuple[bool, ...], *, clean: bool = True):
    """The checks that do not pass, by name, of a subject of which so much is left clean and under their views."""
    few = first_photos(subject)
    for view, everything in zip((Clean(), *check_views(ATTACK, QUERIES)), (clean, *left), strict=True):
        for image in few.dataset.files:
            labelled = few.objects(image)
            found: Detections = labelled if everything else labelled[:0]
            few.cache.put((view.key(few, image, part), pack(found)) for part in view.parts)
    return {name: check for name, check in run_checks(subject, ATTACK, QUERIES).items() if not check["passed"]}


def test_all_pass_where_the_attack_is_honest(subject):
    assert not failed(subject, HONEST)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("more steps", (False, True, False, True)),
        ("more steps", (True, False, False, True)),
        ("large budget", (False, False, True, True)),
        ("black box", (True, True, False, False)),
    ],
)
def test_each_fails_where_only_it_should(subject, name, left):
    assert list(failed(subject, left)) == [name]


def test_an_attack_that_more_steps_make_stronger_is_told_to_take_them(subject):
    found = failed(subject, (True, False, True, True))
    assert "not converged" in found["more steps"]["meaning"]
    assert "--steps 4 " in found["more steps"]["remedy"]
    assert found["large budget"]["remedy"].startswith("first use --steps 4 ")


def test_where_nothing_is_found_clean_they_have_too_little_to_judge_by(subject):
    found = failed(subject, (False, False, False, False), clean=False)
    assert tuple(found) == BY_AP
    assert all(
        check["passed"] is None and "clean AP of these photos is 0.000" in check["meaning"] for check in found.values()
    )


def test_rounding_between_photo_and_loss_is_told_by_its_zero_gradient(subject, bundled):
    subject.detector = copy.copy(bundled)
    subject.detector.candidates = lambda frames: bundled.candidates((frames * 255).round() / 255)
    assert list(failed(subject, HONEST)) == ["zero gradient"]


def test_they_are_made_on_the_first_photos_that_have_objects(subject, monkeypatch):
    with_objects = [image for image in subject.dataset.files if len(subject.objects(image))]
    assert len(with_objects) < len(subject.dataset.files)
    assert list(first_photos(subject).dataset.files) == with_objects
    monkeypatch.setattr("detguard.evaluation.checks.PHOTOS", 2)
    assert list(first_photos(subject).dataset.files) == with_objects[:2]


def test_the_figure_is_the_least_of_the_worst_case_and_of_each_attack_alone(subject):
    for image in subject.dataset.files:
        labelled = subject.objects(image)
        nothing = {ATTACK.key(subject, image, "class-0"): pack(labelled[:0])}
        subject.cache.put(
            ({ATTACK.key(subject, image, part): pack(labelled) for part in ATTACK.parts} | nothing).items()
        )
    assert attack_ap(subject, ATTACK) == 0


def test_data_whose_only_objects_are_crowds_are_refused(bundled, tiny_data, tmp_path):
    data = json.loads(tiny_data.read_text())
    data["annotations"] = [one | {"iscrowd": 1} for one in data["annotations"]]
    (tmp_path / "crowds.json").write_text(json.dumps(data))
    with pytest.raises(DetguardError, match="none of its labelled objects is of a class that is evaluated"):
        detguard.evaluate(bundled, tmp_path / "crowds.json", images=tiny_data.parent / "images")
