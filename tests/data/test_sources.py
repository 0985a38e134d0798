"""What users name as photos, and what they must not."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import detguard
from detguard import DetguardError
from detguard.attacks.samples import kept_samples, load_samples, read_samples, sample_lines, write_samples
from detguard.data.batches import batches, read_photos
from detguard.data.entries import LOST
from detguard.data.sources import photo_files, read_labelled, unlabelled
from detguard.data.stream import Labelled
from detguard.detections import Detections
from detguard.photos import encode_png
from detguard.runs import Run
from detguard.workflows.adapt import read_sources


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


@pytest.mark.parametrize("learn", ["teacher", "labels", "both"])
@pytest.mark.parametrize("run", ["sampled", "plain"])
def test_hardening_is_not_shown_an_attack_as_clean_photos(attack, tmp_path, learn, run):
    with pytest.raises(DetguardError, match=r"photos of an attack, .*, which fool whoever labels them"):
        detguard.harden("detguard-n", [attack / run], learn=learn, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_attack_without_samples_is_adapted_to_by_what_was_found_in_its_clean_photos(attack, bundled):
    new, _, _ = read_sources([str(attack / "plain")], [], "train", bundled.class_names, lambda *_: None)
    (record,) = Run.open(attack / "plain", "attack").records()
    assert [one.file.parent.name for one in new] == ["adversarial", "bus"]
    assert len(new[0].objects) == len(record["clean"]) > 0


def test_members_that_drew_the_same_are_one_image_of_the_samples(attack, bundled, tmp_path):
    specs = "brightness:0.1,brightness:0.1..0.10001"
    (result,) = detguard.attack(bundled, attack / "bus.png", out=tmp_path, transforms=specs, steps=1)
    assert len(result.members) == 3
    run = Run.open(tmp_path, "attack")
    for labels in ("found", "written"):
        names = [one.attacked.file.name for one in read_samples(str(tmp_path), bundled.class_names)]
        assert sorted(names) == ["brightness-0.1.png", "bus.png"], labels
        assert write_samples(run, [result.record], {}, bundled.class_names) == 2
    listed = json.loads((tmp_path / "samples/instances.json").read_text())["images"]
    assert [image["file_name"] for image in listed] == ["bus--photo.png", "bus--brightness-0.1.png"]


def test_samples_have_the_classes_alone_that_their_photos_are_labelled_for(attack, bundled, tmp_path):
    (record,) = Run.open(attack / "plain", "attack").records()
    shutil.copytree(attack / "plain", tmp_path / "run")
    names = bundled.class_names
    found = Detections.from_records(record["clean"], names)
    assert set(found.classes.tolist()) > {0}
    write_samples(
        Run(tmp_path / "run", {}), [record], {record["key"]: Labelled(attack / "bus.png", found, (0,))}, names
    )
    new, _, _ = read_sources([str(tmp_path / "run")], [], "train", names, lambda *_: None)
    assert {one.known for one in new} == {(0,)}
    assert {number for one in new for number in one.objects.classes.tolist()} == {0}


def test_what_was_found_before_an_attack_tells_of_no_class_that_its_detector_may_not_know(attack, bundled):
    more = bundled.class_names | {99: "zebra"}
    new, _, _ = read_sources([str(attack / "plain")], [], "train", more, lambda *_: None)
    assert {one.known for one in new} == {tuple(sorted(set(new[0].objects.classes.tolist())))}


def test_classes_of_an_attack_without_samples_are_renamed(attack, bundled):
    others = {0: "pedestrian", 1: "coach"}
    new, _, _ = read_sources(
        [str(attack / "plain")], [], "train", others, lambda *_: None, {"person": "pedestrian", "bus": "coach"}
    )
    assert set(new[0].objects.classes.tolist()) <= {0, 1}
    assert len(new[0].objects)


@pytest.mark.parametrize("way", ["pattern", "link", "lines"])
@pytest.mark.parametrize("part", ["adversarial", "group/bus"])
def test_no_way_leads_to_attacked_photos_as_clean_ones(attack, tmp_path, way, part):
    folder = attack / "plain" / part
    (tmp_path / "link").symlink_to(folder)
    lines = "".join(json.dumps({"photo": str(file), "objects": []}) + "\n" for file in folder.iterdir())
    (tmp_path / "lines.jsonl").write_text(lines)
    sources = {"pattern": f"{folder}/*.png", "link": tmp_path / "link", "lines": tmp_path / "lines.jsonl"}
    with pytest.raises(DetguardError, match=r"photos of an attack, .*, which fool whoever labels them"):
        photo_files(str(sources[way]))
    with pytest.raises(DetguardError, match=r"photos of an attack, .*, which fool whoever labels them"):
        detguard.harden("detguard-n", [str(sources[way])], out=tmp_path / "run")


def test_of_links_each_is_looked_at(attack, bus_file, tmp_path):
    (tmp_path / "a.png").symlink_to(next((attack / "plain/adversarial").iterdir()))
    shutil.copy(bus_file, tmp_path / "b.jpg")
    with pytest.raises(DetguardError, match=r"photos of an attack"):
        photo_files(str(tmp_path))


def test_a_link_that_leads_to_itself_is_told(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DetguardError, match="loop"):
        photo_files(str(tmp_path / "loop"))


def test_photos_that_are_labelled_for_no_class_together_make_no_samples(attack, bundled, tmp_path):
    (record,) = Run.open(attack / "plain", "attack").records()
    found = Detections.from_records(record["clean"], bundled.class_names)
    labels = {key: Labelled(attack / "bus.png", found, known) for key, known in ((record["key"], (0,)), ("b", (1,)))}
    assert write_samples(Run(tmp_path, {}), [record], labels, bundled.class_names) == 0
    assert not (tmp_path / "samples").exists()


def test_labels_of_no_class_that_is_known_are_refused(bundled, bus_file, tmp_path):
    dark = tmp_path / "dark.jsonl"
    dark.write_text(json.dumps({"photo": str(bus_file), "objects": [{"class": "persn", "box": [1, 2, 30, 40]}]}) + "\n")
    with pytest.raises(DetguardError, match=r"`new` .*: no object there is of a class that the ensemble knows: person"):
        read_sources([str(dark)], [], "train", bundled.class_names, lambda *_: None)
    with pytest.raises(DetguardError, match=r"`learn` labels: no object in `data` is of a class that detguard-n knows"):
        detguard.harden("detguard-n", dark, learn="labels", out=tmp_path / "run")


def test_an_attack_without_samples_says_how_to_make_some(attack, bundled):
    with pytest.raises(DetguardError, match="make one with: detguard attack --data"):
        read_labelled(str(attack / "plain"), "train", bundled.class_names)


@pytest.mark.parametrize("part", [".", "samples", "samples/data.yaml"])
def test_an_attack_gives_adversarial_photos_beside_the_clean_ones_that_a_teacher_is_asked_of(attack, bundled, part):
    samples = read_samples(str(attack / "sampled" / part), bundled.class_names)
    assert [one.attacked.file.parent.name for one in samples] == ["adversarial", "bus"]
    for one in samples:
        assert one.clean == attack / "bus.png"
        attacked, clean = (photo.astype(int) for photo in one.photos())
        assert 0 < abs(attacked - clean).max() <= 4  # mirrored, too
    labels = {photo.file.name: photo for photo in read_labelled(str(attack / "sampled"), "train", bundled.class_names)}
    for one, name in zip(samples, ("bus--photo.png", "bus--flip-h.png"), strict=True):
        assert torch.equal(one.attacked.objects.boxes, labels[name].objects.boxes)


def test_labels_of_a_cut_copy_are_where_its_objects_are(bundled, bus, tmp_path):
    (tmp_path / "bus.png").write_bytes(encode_png(bus[::4, ::4]))
    options = {"transforms": "crop:0.8", "steps": 1, "conf": 0.1}
    (result,) = detguard.attack(bundled, tmp_path / "bus.png", out=tmp_path / "run", **options)
    found = [one.attacked.objects for one in read_samples(str(tmp_path / "run"), bundled.class_names)]
    write_samples(Run(tmp_path / "run", {}), [result.record], {}, bundled.class_names)
    for one, other in zip(found, read_samples(str(tmp_path / "run"), bundled.class_names), strict=True):
        assert len(one)
        assert torch.allclose(one.boxes, other.attacked.objects.boxes, atol=0.1)


def test_without_labels_of_a_data_set_those_of_an_attack_are_what_was_found_in_the_clean_photo(attack, bundled):
    plain, sampled = (read_samples(str(attack / name), bundled.class_names) for name in ("plain", "sampled"))
    for one, other in zip(plain, sampled, strict=True):
        assert torch.allclose(one.attacked.objects.boxes, other.attacked.objects.boxes, atol=0.1)
        assert set(one.attacked.objects.scores.tolist()) == {1}


def test_samples_are_shown_as_they_were_made_and_wanted_as_the_clean_ones(attack, bundled, bus_file):
    samples, unread = load_samples(read_samples(str(attack / "plain"), bundled.class_names), 96)
    source, _ = read_photos([([bus_file], 1.0)], 96)
    for size in (96, 64):  # whole, and a part
        (batch,) = batches(source, 6, size, 0, 0, 1, 1, samples=samples, sampled=3)
        apart = (255 * (batch.shown - batch.clean)).abs().flatten(1).amax(1)
        assert (apart[1:3] == 0).all()
        assert ((apart[3:] > 0.5) & (apart[3:] < 4.5)).all()
    assert not unread


def test_a_clean_photo_that_is_another_now_is_told(attack, bundled, bus, tmp_path):
    kept = tmp_path / "samples.jsonl"
    (sample, _) = read_samples(str(attack / "plain"), bundled.class_names)
    (tmp_path / "other.png").write_bytes(encode_png(bus[::8, ::8]))
    kept.write_bytes(sample_lines([sample, replace(sample, clean=tmp_path / "other.png")], bundled.class_names))
    samples, unread = load_samples(kept_samples(kept, bundled.class_names), 96)
    assert len(samples.clean) == len(samples.attacked) == 1
    assert "other.png: no longer the photo that" in unread[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bus.png", "expected a run of detguard attack; give other photos as `data`"),
        (".", "expected a run of detguard attack"),
        ("plain/adversarial", "is a part of an attack, .*; give the run, .*plain"),
        ("plain/results.jsonl", "is a part of an attack"),
    ],
)
def test_what_is_no_attack_gives_no_samples(attack, bundled, source, message):
    with pytest.raises(DetguardError, match=message):
        read_samples(str(attack / source), bundled.class_names)


@pytest.mark.parametrize("part", [".", "adversarial", "samples/images", "samples/data.yaml"])
def test_no_teacher_is_asked_what_it_sees_on_photos_of_an_attack(attack, part):
    with pytest.raises(
        DetguardError, match=r"which fool whoever labels them; give clean ones .* as `samples` .*sampled"
    ):
        photo_files(str(attack / "sampled" / part))


def test_a_source_is_either_photos_or_data_with_labels_wherever_it_is_given(bundled, bus, tmp_path):
    photo, data = tmp_path / "my/images/train/bus.png", tmp_path / "my/data.yaml"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(encode_png(bus[::4, ::4]))
    data.write_text("path: .\ntrain: images/train\nnames: [person]\n")
    (tmp_path / "my/labels/train").mkdir(parents=True)
    (tmp_path / "my/labels/train/bus.txt").write_text("0 0.2 0.6 0.2 0.5\n")
    lines = tmp_path / "my.jsonl"
    lines.write_text(json.dumps({"photo": str(photo), "objects": [{"class": "yak", "box": [1, 1, 9, 9]}]}) + "\n")
    with_labels, without = (tmp_path / "my", data, lines), (photo, photo.parent, photo.parent / "*.png")
    for source in (*with_labels, *without):
        assert unlabelled(str(source)) == (source in without)
        assert photo_files(str(source)) == [photo]
    for source in with_labels:
        assert [one.file for one in read_labelled(str(source), "train", bundled.class_names)] == [photo]
    made = detguard.patch(bundled, photo, pixels=8, photos=1, batch=1, out=tmp_path / "patch")
    assert made.file.is_file()


def test_a_config_of_another_program_is_no_attack(tmp_path, bus):
    (tmp_path / "bus.png").write_bytes(encode_png(bus[::8, ::8]))
    for text in ("command: train\n", "- a\n", "a: b: c\n"):
        (tmp_path / "config.yaml").write_text(text)
        assert photo_files(str(tmp_path)) == [tmp_path / "bus.png"]


def test_a_map_names_classes_of_the_detector_in_any_letter_case(tiny_data, bundled):
    plain, mapped = (
        read_labelled(str(tiny_data), "val", bundled.class_names, class_map=given)
        for given in (None, {"person": "BUS"})
    )
    assert [len(photo.objects) for photo in mapped] == [len(photo.objects) for photo in plain]
    classes = {int(c) for photo in plain for c in photo.objects.classes} - {bundled.class_index("person")}
    assert {int(c) for photo in mapped for c in photo.objects.classes} == classes | {bundled.class_index("bus")}


def test_photos_of_a_data_set_need_no_labels_and_those_that_are_gone_are_told(bus, tmp_path):
    (tmp_path / "bus.png").write_bytes(encode_png(bus))
    (tmp_path / "train.txt").write_text("./bus.png\n./gone.png\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: train.txt\nnames: [person]\n")
    told = []
    assert photo_files(str(tmp_path / "data.yaml"), lambda _, faults: told.append(faults)) == [tmp_path / "bus.png"]
    assert [len(faults[LOST]) for faults in told] == [1]


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + "*"])
def test_a_name_that_no_file_can_have_is_no_traceback(name):
    assert unlabelled(name) == name.endswith("*")
