"""What users name as photos, and what they must not."""

import pytest

import detguard
from detguard import DetguardError
from detguard.attacks.samples import write_samples
from detguard.data.sources import photo_files, read_labelled, unlabelled
from detguard.photos import encode_png
from detguard.runs import Run


@pytest.fixture(scope="module")
def attack(bundled, bus, tmp_path_factory):
    """A run without samples, and one with some."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "bus.png").write_bytes(encode_png(bus[::4, ::4]))
    for name in ("plain", "sampled"):
        options = {"transforms": "flip:h", "steps": 1, "conf": 0.1}
        (result,) = detguard.attack(bundled, folder / "bus.png", out=folder / name, **options)
    write_samples(Run(folder / "sampled", {}), [result.record], {}, bundled.class_names)
    return folder


def test_an_attack_is_learned_from_by_its_samples_and_the_labels_of_clean_photos(attack, bundled, bus):
    photos = read_labelled(str(attack / "sampled"), "train", bundled.class_names)
    assert [one.file.name for one in photos] == ["bus--flip-h.png", "bus--photo.png"]
    clean = bundled.predict(bus[::4, ::4], 0.1)
    assert sorted(photos[1].objects.classes.tolist()) == sorted(clean.classes.tolist())
    assert not unlabelled(str(attack / "sampled"))
    inside = read_labelled(str(attack / "sampled/samples/data.yaml"), "train", bundled.class_names)
    assert [one.file for one in inside] == [one.file for one in photos]


@pytest.mark.parametrize("part", ["results.jsonl", "adversarial", "group/bus"])
def test_parts_of_an_attack_without_labels_are_refused(attack, bundled, part):
    with pytest.raises(DetguardError, match=r"is a part of an attack, without the labels .*; give the run, .*sampled"):
        read_labelled(str(attack / "sampled" / part), "train", bundled.class_names)


def test_an_attack_without_samples_says_how_to_make_some(attack, bundled):
    with pytest.raises(DetguardError, match="make one with: detguard attack --data"):
        read_labelled(str(attack / "plain"), "train", bundled.class_names)


@pytest.mark.parametrize("part", [".", "adversarial", "samples/images", "samples/data.yaml"])
def test_no_teacher_is_asked_what_it_sees_on_photos_of_an_attack(attack, part):
    with pytest.raises(DetguardError, match="which fool whoever labels them; give clean ones"):
        photo_files(str(attack / "sampled" / part))


def test_a_config_of_another_program_is_no_attack(tmp_path, bus):
    (tmp_path / "bus.png").write_bytes(encode_png(bus[::8, ::8]))
    for text in ("command: train\n", "- a\n", "a: b: c\n"):
        (tmp_path / "config.yaml").write_text(text)
        assert photo_files(str(tmp_path)) == [tmp_path / "bus.png"]
