from dataclasses import replace
from pathlib import Path

import pytest

from detguard.data.stream import Labelled
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import fused
from detguard.hardening.adapt import set_aside
from detguard.hardening.adversary import Adversary
from detguard.hardening.loop import LOG_EVERY
from detguard.hardening.losses import MAPS
from detguard.hardening.train import Setting, Stage
from detguard.hardening.validation import (
    AP50,
    ATTACKED,
    CLEAN,
    HELD_OUT,
    ONE_IN,
    Validation,
    figures,
    hold_out,
    photo_of,
)
from detguard.photos import read_photo
from detguard.ranks import Ranks

SETTING = Setting(batch=2, size=96)
STAGE = Stage("adversarial", 9, 0, True, (0, 0, 1), Adversary(4))


@pytest.fixture(scope="module")
def held(bus_file):
    return Validation.of([bus_file, bus_file.with_name("zidane.jpg"), Path("nowhere.jpg"), bus_file], SETTING.size)


@pytest.fixture(scope="module")
def networks(bundled, bundled_model):
    student = GatedNetwork(fused(bundled_model), 0, ("adversarial",)).requires_grad_(False)
    return student, GatedNetwork(bundled.model, 0, ("undefended",)).requires_grad_(False)


def test_photos_held_out_are_never_trained_on_as_copies_neither_and_the_same_in_any_order(tmp_path):
    for number in range(3000):
        for name in (f"{number}.jpg", f"copy-{number}.jpg"):
            (tmp_path / name).write_bytes(b"%d" % number)
    files = sorted(tmp_path.iterdir())
    trained, held = hold_out(files)
    assert len(held) == HELD_OUT
    assert not {file.read_bytes() for file in held} & {file.read_bytes() for file in trained}
    assert {file.read_bytes() for file in hold_out(files[::-1])[1]} == {file.read_bytes() for file in held}


def test_photos_of_one_name_in_many_folders_are_not_held_out_together(tmp_path):
    files = [tmp_path / f"{folder:04d}/000001.png" for folder in range(40)]
    for file in files:
        file.parent.mkdir()
        file.write_text(str(file))
    trained, held = hold_out(files)
    assert (len(trained), len(held)) == (38, 2)


def test_of_few_photos_at_most_one_in_twenty_is_held_out():
    files = [Path(f"{number}.jpg") for number in range(2 * ONE_IN + 1)]
    assert len(hold_out(files)[1]) == 2
    assert hold_out(files[: ONE_IN - 1]) == (files[: ONE_IN - 1], [])


def test_of_an_attack_without_samples_those_of_one_photo_stay_together(tmp_path):
    (tmp_path / "config.yaml").write_text("command: attack\n")
    names = [f"{number:02d}" for number in range(40)]
    files = [tmp_path / f"adversarial/{name}.png" for name in names]
    files += [tmp_path / f"group/{name}/{kind}.png" for name in names for kind in ("median-3", "jpeg-75")]
    for trained, held in (*set_aside(files), hold_out(files)):
        keys = [{photo_of(file).name for file in part} for part in (trained, held)]
        assert keys[1]
        assert keys[0] | keys[1] == set(names)
        assert not keys[0] & keys[1]


def test_one_photo_in_many_files_is_trained_on(tmp_path):
    (tmp_path / "config.yaml").write_text("command: attack\n")
    files = [tmp_path / f"group/bus/jpeg-{quality}.jpg" for quality in range(50, 60)]
    assert set_aside(files) == [(files, [])]


def test_what_is_told_is_the_divergence_from_the_teacher_with_and_without_an_attack(held, networks):
    told, _ = held.losses(*networks, STAGE, SETTING)
    assert len(held.frames) == 3
    assert told[CLEAN] == pytest.approx(0, abs=1e-4)
    assert told[ATTACKED] > 1


def test_where_labels_are_learned_they_are_what_photos_held_out_are_judged_by(networks, bundled, bus_file):
    files, stage = [bus_file, bus_file.with_name("zidane.jpg"), Path("nowhere.jpg")], replace(STAGE, learn="labels")
    found = [bundled.detect([read_photo(file)], 0.3)[0] for file in files[:2]]
    told = []
    for moved in (0, 100):
        objects = [replace(one, boxes=one.boxes + moved) for one in found]
        labelled = [Labelled(*pair) for pair in zip(files, [*objects, objects[0]], strict=True)]
        held = Validation.of(hold_out(labelled)[0], SETTING.size)
        told.append({name: float(loss) for name, loss in held.losses(*networks, stage, SETTING)[0].items()})
    assert told[0][CLEAN] < 0.8 * min(told[1][CLEAN], told[0][ATTACKED])


def test_several_processes_tell_the_same(held, networks):
    alone, found = held.losses(*networks, STAGE, SETTING)
    several = [Setting(batch=2, size=96, ranks=Ranks(rank=rank, count=2)) for rank in range(2)]
    parts, found_apart = zip(*(held.losses(*networks, STAGE, setting) for setting in several), strict=True)
    for name, value in alone.items():
        assert float(sum(part[name] for part in parts)) == pytest.approx(float(value), rel=0.02, abs=1e-4)
    assert figures([*found_apart[0], *found_apart[1]]) == pytest.approx(figures(found), abs=0.02)


def test_what_is_found_of_what_the_teacher_shows_is_told(held, networks):
    told = figures(held.losses(*networks, STAGE, SETTING)[1])
    assert told[AP50[CLEAN]] > 0.9  # it is the teacher itself
    assert told[AP50[ATTACKED]] < 0.5 * told[AP50[CLEAN]]
    assert figures([]) == {}


def test_of_labels_those_classes_alone_are_judged_that_are_labelled(networks, bundled, bus_file):
    (found,) = bundled.detect([read_photo(bus_file)], 0.3)
    person = found[found.classes == 0]
    told = []
    for known in (None, (0,)):
        held = Validation.of([Labelled(bus_file, person, known)], 320)
        losses = held.losses(*networks, replace(STAGE, learn="labels"), Setting(batch=2, size=320))
        told.append({int(c) for c in losses[1][0].clean.classes})
    assert told[1] == {0} < told[0]


def test_it_costs_a_few_per_cent_and_only_where_a_stage_is_attacked(held):
    every = held.every(STAGE, SETTING, 3.0)
    passes = 3 * 11
    assert every % LOG_EVERY == 0
    assert passes / (every * SETTING.batch * 3.0) <= 0.03
    assert held.every(Stage("hard", 9, 0, True, (0.1, 0.8, 0.1)), SETTING, 3.0) is None
    assert held.every(replace(STAGE, learn=MAPS), SETTING, 3.0) is None
    assert Validation([]).every(STAGE, SETTING, 3.0) is None


def test_photos_lie_in_frames_as_large_as_they_are_asked_for(held):
    assert {frame.shape for frame in held.frames} == {(96, 96, 3)}


def test_whole_frames_are_no_more_at_once_than_take_what_a_batch_of_crops_does(held, networks):
    sizes = list[int]()
    hook = networks[0].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    told, _ = held.losses(*networks, replace(STAGE, size=64), Setting(batch=6, size=96))
    hook.remove()
    assert max(sizes) == 2  # of frames of 9/4 the area
    assert told[CLEAN] == pytest.approx(0, abs=1e-4)
