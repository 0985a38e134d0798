import copy
import gc
import importlib.util
import io
import json
import math
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import detguard
from detguard import DetguardError
from detguard.data.stream import Labelled, from_records
from detguard.hardening.monitor import Deployment, latest, observe
from detguard.photos import as_photo, encode_png, read_photo
from detguard.runs import Run
from detguard.transforms.parse import parse_transforms
from detguard.workflows.evaluate import strength
from detguard.workflows.harden import named as named_file

OPTIONS = {"transforms": "median:3,flip:h", "budget": detguard.Linf(16), "step": 2}


@pytest.fixture(scope="module")
def small(bus):
    return cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def file(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "bus.png"
    path.write_bytes(encode_png(small))
    return path


def test_an_attack_yields_what_a_run_holds(bundled, small, file, tmp_path):
    (result,) = detguard.attack(bundled, file, out=tmp_path / "run", **OPTIONS)
    assert result.success
    assert result.key == "bus"
    assert np.abs(result.photo.astype(int) - small).max() == result.record["used"] <= 16
    assert set(result.members) == {"photo", "median:3", "flip:h"}
    assert not len(bundled.predict(result.group["flip:h"], 0.25).of([0]))
    (record,) = Run.open(tmp_path / "run", "attack").records()
    assert record == result.record
    assert np.array_equal(read_photo(tmp_path / "run/adversarial/bus.png"), result.photo)


def test_photos_in_memory_are_attacked_like_files_and_leave_nothing_behind(bundled, small, file, tmp_path):
    (of_file,) = detguard.attack(bundled, str(file), steps=1, **OPTIONS)
    planes = torch.from_numpy(small).permute(2, 0, 1)
    photos = [small, Image.fromarray(small), planes, planes / 255]
    results = list(detguard.attack(bundled, photos, steps=1, **OPTIONS))
    assert [result.key for result in results] == ["photo-001", "photo-002", "photo-003", "photo-004"]
    assert all(np.array_equal(result.photo, of_file.photo) for result in results)
    assert results[0].group.keys() == {"median:3", "flip:h"}
    assert read_photo(of_file.save(tmp_path / "out")).shape == small.shape
    assert results[0].used == of_file.used > 0
    folder = results[0].folder
    assert folder.exists()
    del results
    gc.collect()
    assert not folder.exists()


def test_a_run_that_is_there_is_left_as_it_is(bundled, small, tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "conf", 0.4)
    options = {"transforms": "none", "steps": 1, "out": tmp_path / "run"}
    list(detguard.attack(bundled, small, **options))
    assert "conf: 0.4\n" in (tmp_path / "run/config.yaml").read_text()  # the detector's own
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(DetguardError, match=r"already holds a run.*detguard attack --resume"):
        detguard.attack(bundled, 255 - small, **options)
    with pytest.raises(DetguardError, match="already holds a run"):
        detguard.monitor(bundled, [], out=tmp_path / "run")
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_images_of_pillow_are_what_their_files_are_read_as(tmp_path, small):
    turned, deep = tmp_path / "turned.jpg", tmp_path / "deep.png"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(small).save(turned, exif=exif, quality=95)
    cv2.imwrite(str(deep), np.full((16, 20, 3), 30000, np.uint16)[..., 0])
    for path in (turned, deep):
        assert np.abs(as_photo(Image.open(path)).astype(int) - read_photo(path)).max() <= 2
    assert (as_photo(Image.open(deep).convert("I")) == read_photo(deep)).all()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_where_the_caller_has_turned_them_off(bundled, small, context):
    (as_usual,) = detguard.attack(bundled, small, steps=2, **OPTIONS)
    with context():
        (result,) = detguard.attack(bundled, small, steps=2, **OPTIONS)
    assert np.array_equal(result.photo, as_usual.photo)


def test_a_single_array_is_one_photo(bundled, small):
    options = {"transforms": "none", "steps": 1}
    assert [r.key for r in detguard.attack(bundled, small, **options)] == ["photo-001"]


def test_folders_and_numbers_of_numpy_are_taken(bundled, file):
    options = {
        "transforms": "none",
        "steps": np.int64(1),
        "conf": np.float64(0.3),
        "budget": detguard.Linf(np.uint8(4)),
    }
    for photos in (file.parent, f"{file.parent}/*.png"):
        (result, missing) = detguard.attack(bundled, [photos, "missing.png"], **options)
        assert (result.key, result.record["eps"], missing.status) == ("bus", 4, "error")


def test_a_photo_without_target_is_told_of(bundled):
    (result,) = detguard.attack(bundled, np.full((64, 64, 3), 128, np.uint8))
    assert result.status == "no-target"
    assert not result.success
    with pytest.raises(DetguardError, match="no adversarial photo"):
        result.photo  # noqa: B018
    assert not result.members
    with pytest.raises(DetguardError, match="photo-001: no-target"):
        result.members["photo"]


def test_a_name_and_a_number_are_no_detector_and_no_budget(bundled, bus_file):
    for call in (detguard.attack, detguard.evaluate):
        with pytest.raises(DetguardError, match=r"load_detector\('detguard-n'\)"):
            call("detguard-n", bus_file)
    with pytest.raises(DetguardError, match=r"`budget` 8: expected one as Linf\(8\)"):
        detguard.attack(bundled, bus_file, budget=8)


@pytest.mark.parametrize(
    "photo",
    [
        np.zeros((4, 4), np.uint8), np.zeros((8, 8, 3), np.float32), torch.zeros(8, 8, 3), torch.full((3, 8, 8), 2.0),
        torch.full((3, 8, 8), float("nan")), 7, np.zeros((0, 0, 3), np.uint8), Image.new("F", (8, 8)),
        Image.fromarray(np.full((8, 8), 200, np.int32)),
    ],
)  # fmt: skip
def test_what_is_no_photo_is_refused(photo):
    with pytest.raises(DetguardError, match="photo: "):
        as_photo(photo)


@pytest.mark.parametrize(
    "photo", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 4), np.uint8), np.zeros((64, 64, 3))]
)
def test_what_is_no_photo_is_not_detected_on(bundled, photo):
    for call in (lambda: bundled.predict(photo, 0.25), lambda: bundled.detect([photo])):
        with pytest.raises(DetguardError, match="photo: "):
            call()


def test_detection_takes_photos_as_attacks_do(bundled, file, small):
    wanted = bundled.predict(small, 0.25).boxes
    for photo in (str(file), file, Image.fromarray(small), torch.from_numpy(small).permute(2, 0, 1)):
        assert torch.equal(bundled.predict(photo, 0.25).boxes, wanted)
        assert torch.allclose(bundled.detect([photo], 0.25)[0].boxes, wanted, atol=0.1)


def test_a_detector_takes_no_random_numbers_and_may_be_loaded_without_gradients(small):
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        detector = detguard.load_detector()
        assert torch.rand(1) == wanted
        (result,) = detguard.attack(detector, small, **OPTIONS)
    assert result.success


def test_natural_forms_of_options_are_taken(bundled, small):
    box = detguard.Selection(box=torch.tensor([0.0, 0.0, 240.0, 320.0]))
    assert box == detguard.Selection(box=(0.0, 0.0, 240.0, 320.0))
    corners = [(0, 0), (240, 0), (240, 320)]
    assert detguard.Masked.of(detguard.Linf(8), corners).config()["mask"] == "0,0,240,0,240,320"
    options = {"steps": 1, "aggregate": "weighted", "weights": np.array([1, 2])}
    (result,) = detguard.attack(bundled, small, transforms=parse_transforms("median:3")[0], **options)
    assert set(result.members) == {"photo", "median:3"}
    (result,) = detguard.attack(bundled, small, transforms=None, steps=1)
    assert set(result.members) == {"photo"}


def test_threads_that_read_photos_leave_warnings_as_they_were(file):
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_photo, [file] * 64))
    assert warnings.filters == before


def test_wrong_options_are_refused_before_anything_is_done(bundled, small, tmp_path):
    for options in (
        {"objective": detguard.Vanish("unicorn")},
        {"transforms": "blur:3"},
        {"rule": "none"},
        {"steps": 0},
    ):
        with pytest.raises(DetguardError):
            detguard.attack(bundled, small, out=tmp_path / "run", **options)
    unknown = {"epsilon": "'epsilon'$", "eps": "Linf", "imgsz": "load_detector", "margins": "did you mean `margin`"}
    for option, told in unknown.items():
        with pytest.raises(TypeError, match=rf"attack\(\) got .*{told}"):
            detguard.attack(bundled, small, **{option: 4})
    half = Image.open(io.BytesIO(encode_png(small)[:9000]))
    closed = Image.fromarray(small)
    closed.close()
    for nothing in ([], np.zeros((4, 4), np.uint8), [small, 7], half, closed, None, 7):
        with pytest.raises(DetguardError, match="photo"):
            detguard.attack(bundled, nothing, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_verified_by_its_own_detector_and_by_another(bundled, file, tmp_path):
    (result,) = detguard.attack(bundled, file, out=tmp_path, **OPTIONS)
    (own,) = detguard.verify(tmp_path, bundled, transforms=["jpeg:90"])
    assert {name: own["members"][name] for name in result.members} == result.members
    assert "jpeg:90" in own["members"]
    (other,) = detguard.verify(tmp_path, detguard.load_detector("detguard-n-hard"))
    assert other["members"] != result.members


def test_results_are_verified_as_they_are(bundled, small, file):
    grey = np.full((64, 64, 3), 128, np.uint8)
    results = list(detguard.attack(bundled, [small, grey, small[:, ::-1]], **OPTIONS))
    (last,) = detguard.verify(results[2], bundled, transforms="jpeg:90")
    assert last["key"] == results[2].key
    assert {name: last["members"][name] for name in results[2].members} == results[2].members
    assert [record["key"] for record in detguard.verify(iter(results), bundled)] == ["photo-001", "photo-003"]
    other = list(detguard.attack(bundled, grey))
    for wrong in (results + other, []):
        with pytest.raises(DetguardError, match="results of one attack"):
            detguard.verify(wrong, bundled)


def test_evaluation_gives_the_metrics_that_it_writes(bundled, small, tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    (tmp_path / "images" / "bus.png").write_bytes(encode_png(small))
    (tmp_path / "labels" / "bus.txt").write_text("0 0.2 0.6 0.2 0.5\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images\nval: images\nnames: [person]\n")
    options = {"protocols": ("clean", "attack"), "eps": (2,), "attacks": ("vanish",), "steps": 2}
    metrics = detguard.evaluate(
        bundled, tmp_path / "data.yaml", out=tmp_path / "run", cache=tmp_path / "c.sqlite", **options
    )
    assert metrics["detguard-n"]["attack"]["restarts"] == 1
    assert metrics == json.loads((tmp_path / "run/metrics.json").read_text())


@pytest.mark.parametrize(("options", "most"), [({}, 2), ({"batch": 1}, 1)])
def test_an_evaluation_shows_so_many_photos_of_one_shape_together(
    bundled, tiny_data, tmp_path, monkeypatch, options, most
):
    shown, candidates = [], type(bundled).candidates
    monkeypatch.setattr(
        type(bundled), "candidates", lambda self, frames: shown.append(len(frames)) or candidates(self, frames)
    )
    options |= {"protocols": ("attack",), "attacks": ("vanish",), "steps": 1, "cache": tmp_path / "c.sqlite"}
    detguard.evaluate(bundled, tiny_data, **options)
    assert max(shown) == most


def test_an_evaluation_warns_of_photos_that_turn_out_unreadable(bundled, small, tmp_path):
    whole, cut = tmp_path / "whole.jpg", tmp_path / "cut.jpg"
    for path in (whole, cut):
        Image.fromarray(small).save(path)
    cut.write_bytes(cut.read_bytes()[:3000])
    box = {"category_id": 1, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}
    images = [{"id": i, "file_name": p.name, "width": 240, "height": 320} for i, p in enumerate((whole, cut), 1)]
    labels = [{"id": i, "image_id": i} | box for i in (1, 2)]
    data = {"images": images, "annotations": labels, "categories": [{"id": 1, "name": "person"}]}
    (tmp_path / "data.json").write_text(json.dumps(data))
    with pytest.warns(UserWarning, match=r"1 more photos missing or unreadable, left out"):
        detguard.evaluate(bundled, tmp_path / "data.json", protocols=("clean",), cache=tmp_path / "c.sqlite")


def test_a_split_of_photos_that_have_none_is_refused(bundled, file):
    with pytest.raises(DetguardError, match="`split` val: is of a data"):
        detguard.patch(bundled, file, split="val", photos=1)


def test_an_evaluation_by_photos_that_detectors_have_mostly_learned_says_so(bundled, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, name, content in (("images", "bus.png", encode_png(small)), ("labels", "bus.txt", b"0 .2 .6 .2 .5\n")):
        folder = tmp_path / "datasets/coco128" / kind / "train2017"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
    with pytest.warns(UserWarning, match="coco128: photos of COCO's training part"):
        detguard.evaluate(bundled, "coco128", protocols=("clean",), cache=tmp_path / "c.sqlite")


def example(name):
    path = Path(detguard.__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs(file, tmp_path, capsys):
    left = example("from_python").main(str(file), str(tmp_path))
    assert set(left) == {"photo", "median:3", "jpeg:75", "jpeg:50"}
    assert "bus: fooled" in capsys.readouterr().out
    assert (tmp_path / "adversarial.png").is_file()


@pytest.fixture(scope="module")
def hardened(small, tmp_path_factory):
    """What the other example makes of six photos, of which one judges: the folder and its result."""
    folder = tmp_path_factory.mktemp("hardened")
    (folder / "photos").mkdir()
    shown = small, small[40:], small[:, 20:]
    for number, photo in enumerate([*shown, *(one[:, ::-1] for one in shown)]):
        (folder / "photos" / f"{number}.png").write_bytes(encode_png(np.ascontiguousarray(photo)))
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:  # training has gradients all the same
        for module in ("adapt", "kinds"):  # nobody looks at whom it asks
            patch.setattr(f"detguard.hardening.{module}.BATCHES", 2)
        return folder, example("harden_and_watch").main(str(folder / "photos"), str(folder), quick=True)


def test_a_detector_is_hardened_watched_and_taught(hardened):
    folder, taught = hardened
    assert detguard.load_detector(taught.weights).model.names == ["normal", "hard", "adversarial", "adapted 1"]
    assert taught.folder == folder / "adapted"
    assert taught.before["new"].keys() == taught.after["new"].keys() == {"F1", "AP", "AP_error", "AP50"}
    assert taught.unread == []
    began = [record["began"] for record in Run.open(folder / "watched", "monitor").records() if record["began"]]
    assert began == [37]
    assert all(Path(json.loads(line)["photo"]).is_file() for line in (folder / "watched/dropped.jsonl").open())


def test_trainings_go_on_and_stop_when_they_are_asked_to(hardened, tmp_path):
    folder, _ = hardened
    told = []
    torch.manual_seed(1)
    following = torch.rand(1)
    torch.manual_seed(1)
    again = detguard.harden(resume=folder / "hardened", workers=1, on_stage=lambda *what: told.append(what))
    assert again.weights == folder / "hardened/weights/sparse.safetensors"
    assert told == []
    assert detguard.adapt(resume=folder / "adapted", workers=1).weights.parent.parent == folder / "adapted"
    assert torch.rand(1) == following  # the caller's random numbers are its own
    options = {"imgsz": 64, "photos": 8, "batch": 4, "steps": 1, "recipe": "pgd", "workers": 1}
    with pytest.raises(KeyboardInterrupt):
        detguard.harden("detguard-n", folder / "photos", out=tmp_path / "run", on_stage=lambda *_: True, **options)
    made = detguard.harden(resume=tmp_path / "run", workers=1)
    assert made.weights.is_file()


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda: detguard.harden("detguard-n"), DetguardError, "`data`"),
        (lambda: detguard.harden(data="photos"), DetguardError, "`detector`"),
        (lambda: detguard.harden("detguard-n", "photos", photos=0), DetguardError, "`photos`: expected"),
        (lambda: detguard.harden("detguard-n", "photos", corruptions=["rain"]), DetguardError, "`corruptions` rain"),
        (lambda: detguard.harden("detguard-n", "photos", corruptions="fog"), DetguardError, "`corruptions` 'fog': exp"),
        (lambda: detguard.harden("detguard-n", "photos", photo=1), TypeError, "'photo'"),
        (lambda: detguard.harden("detguard-n", resume="runs/harden/1"), DetguardError, "`resume`"),
        (lambda: detguard.evaluate([], "coco", step=1), TypeError, r"evaluate\(\) .*`steps`"),
        (lambda: detguard.evaluate([], "coco", classes="person"), DetguardError, "`classes` 'person': exp"),
        (lambda: detguard.evaluate([], "coco"), DetguardError, r"`detector` \[\]: expected one"),
        (lambda: detguard.evaluate([], "coco", resume="runs/evaluate/1"), TypeError, "command line alone"),
        (lambda: detguard.adapt("detguard-n"), DetguardError, "`new`"),
        (lambda: detguard.adapt("detguard-n", "new.jsonl"), DetguardError, "gated ensemble"),
        (lambda: detguard.adapt("detguard-n", "new.jsonl", eps=2), TypeError, "'eps': that of the ensemble"),
        (lambda: detguard.patch(data="photos"), DetguardError, "`detector`"),
        (lambda: detguard.universal(resume="runs/universal/1", photos=2), DetguardError, "`resume`.*`photos`"),
        (lambda: detguard.universal(resume="runs/universal/1", eps=4), DetguardError, "`resume`.*`eps`"),
        (lambda: detguard.patch(resume="runs/patch/1", size=0.5), DetguardError, "`resume`.*`size`"),
        (lambda: detguard.adapt(resume="runs/adapt/1", max_experts=3), DetguardError, "`resume`.*`max_experts`"),
        (lambda: detguard.adapt("detguard-n", "new.jsonl", workers=-1), DetguardError, "`workers`: expected"),
        (lambda: detguard.verify("runs/attack/1", "detguard-n"), DetguardError, r"load_detector\("),
        (lambda: detguard.monitor("detguard-n", []), DetguardError, r"load_detector\("),
        (lambda: detguard.patch("detguard-n", "photos"), DetguardError, r"load_detector\("),
        (lambda: detguard.patch(step=2), TypeError, "'step'"),
    ],
)
def test_wrong_trainings_are_refused_by_the_name_of_the_field(call, error, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=named):
        call()
    assert not (tmp_path / "runs").exists()


@dataclass(frozen=True)
class Sly(detguard.Vanish):
    """A goal that the words of a run know nothing of."""


@dataclass(frozen=True)
class Wide(detguard.Linf):
    """A budget that they know nothing of."""


@pytest.mark.parametrize(
    ("call", "named"),
    [
        *(
            (lambda d, wrong=wrong: detguard.evaluate(d, "coco", **wrong), named)
            for wrong, named in [
                ({"protocols": "clean,attack"}, "`protocols` 'clean,attack'"),
                ({"eps": 4}, "`eps` 4: expected a tuple"),
                ({"eps": (4.0,)}, "`eps`"),
                *(
                    ({"eps": [eps]}, "`eps` .*: expected whole levels of 1..255")
                    for eps in ("x", None, [1], math.nan, math.inf)
                ),
                ({"steps": 0}, "`steps`: expected a whole number, 1"),
                ({"restarts": -1}, "`restarts`: expected a whole number, 1"),
                ({"limit": -1}, "`limit`: expected a whole number, 1"),
                ({"seed": None}, "`seed`: expected a whole number"),
                ({"patch": Path("none.png"), "patch_size": np.float64(3)}, "`patch_size`: expected a number"),
                ({"patch_target": "persn"}, "`patch_target`: goes with `patch`"),
                ({"protocols": ("clean",), "eps": (2, 4)}, "`eps`: goes with `protocols` attack or transfer or"),
                ({"protocols": ("blackbox",), "eps": (2, 4)}, "`eps` 2,4: several go with `protocols` attack"),
                ({"protocols": ("clean",), "steps": 2}, "`steps`: goes with `protocols` attack or transfer or"),
                ({"protocols": ("attack",), "severities": (1,)}, "`severities`: goes with `protocols` corruptions"),
                ({"protocols": ("clean",), "save_images": True, "out": "run"}, "`save_images`: goes with `protocols`"),
                ({"queries": 5}, "`queries`: goes with `protocols` blackbox or checks, or a detector without"),
            ]
        ),
        (lambda d: detguard.evaluate(d, "coco", save_images=True), "`save_images`: goes with `out`"),
        (lambda d: detguard.patch(d, "photos", photos=9, hours=1), "`hours`: instead of `photos`"),
        (lambda d: detguard.patch(d, "photos", device="cpu"), "`device` and `trust`: go with `resume`"),
        (lambda d: detguard.universal(d, "photos", trust=True), "`device` and `trust`: go with `resume`"),
        (lambda d: detguard.attack(d, "a.png", objective="person"), "`objective` 'person': expected one as Vanish"),
        (lambda d: detguard.attack(d, "a.png", objective=Sly("person")), r"`objective` Sly\(.* of Vanish\("),
        (lambda d: detguard.attack(d, "a.png", budget=Wide(4)), r"`budget` Wide\(.* of Linf\("),
        (lambda d: detguard.attack(d, "a.png", transforms=5), "`transforms` 5: expected specs, as 'median:3"),
        (lambda d: detguard.harden(d, "photos", transforms=5), "`transforms` 5: expected specs, as 'median:3"),
        (lambda d: detguard.attack(d, "a.png", conf=np.float64(2)), "`conf`: expected a number"),
        (
            lambda d: detguard.attack(d, "a.png", aggregate="weighted", weights=("a", 1, 2)),
            r"`weights` \('a', 1, 2\): expected numbers, as \(1, 1, 2\)",
        ),
        (
            lambda d: detguard.attack(d, "a.png", aggregate="weighted", weights="1,1,2"),
            r"`weights` '1,1,2': expected a tuple or list, as \(1, 1, 2\)",
        ),
        (
            lambda d: detguard.attack(d, "a.png", objective=detguard.Flood(count=0)),
            "`count`: expected a whole number, 1 to 300",
        ),
        (lambda d: detguard.universal(d, "photos", eps=128), "`eps` 128: expected whole levels of 1..127"),
        (lambda d: detguard.patch(d, "photos", hours=0), "`hours`: expected a number"),
        (lambda d: detguard.monitor(d, [], class_map={"rider": "persn"}), "did you mean rider=person"),
        (lambda d: detguard.monitor(d, [], images="photos"), "`images`: is for a COCO json alone"),
        (lambda d: detguard.monitor(d, "a.jsonl", images="photos"), "`images`: is for a COCO json alone"),
        (lambda d: detguard.adapt("detguard-n-hard", d.weights, rate=0), "`rate`: expected a number"),
        (lambda d: detguard.adapt("detguard-n-hard", d.weights, seed=-1), "`seed`: expected a whole number"),
    ],
)
def test_wrong_options_are_refused_by_name_before_anything_is_made(call, named, bundled, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = tmp_path / "new.jsonl"
    new.write_text(json.dumps({"photo": str(file), "objects": [{"class": "person", "box": [1, 1, 9, 9]}]}) + "\n")
    monkeypatch.setattr(bundled, "weights", new, raising=False)
    with pytest.raises(DetguardError, match=named):
        call(bundled)
    assert not (tmp_path / "runs").exists()


def test_training_refuses_a_detector_that_its_file_does_not_hold(bundled, yolo11n_file):
    from ultralytics import YOLO

    yolo = YOLO(yolo11n_file)
    unchanged = detguard.load_detector(yolo, 64)
    assert named_file(unchanged, 64) == str(yolo11n_file)
    with torch.no_grad():
        next(yolo.model.parameters()).mul_(1.01)
    for given, told in (
        (detguard.load_detector(yolo), "no longer what .*yolo11n.* save it to a file first"),
        (detguard.load_detector(YOLO("yolo11n.yaml")), "is in memory alone.* save it to a file first"),
        (detguard.load_detector("detguard-n", iou=0.5), "its `iou` 0.5 would be lost"),
        (example("adapter").make("cpu"), "Mine has no file"),
    ):
        with pytest.raises(DetguardError, match=f"`detector`: {told}"):
            detguard.harden(given, "photos")
        with pytest.raises(DetguardError, match=f"`teacher`: {told}"):
            detguard.harden("detguard-n", "photos", teacher=given)
    for option, value in (("imgsz", 64), ("top_k", 1)):
        with pytest.raises(DetguardError, match=f"its `{option}` {value} would be lost"):
            detguard.adapt(detguard.load_detector("detguard-n-hard", **{option: value}), "new.jsonl")


def test_a_picture_is_learned_and_gone_on_with_after_a_stop(bundled, file, tmp_path):
    losses = []

    def stop(share, loss):
        losses.append(loss)
        return share > 0.4

    options = {"pixels": 16, "photos": 20, "batch": 1, "seed": 3}
    whole = detguard.patch(bundled, file.parent, out=tmp_path / "whole", **options)
    assert whole.picture.shape == (16, 16, 3)
    assert np.array_equal(read_photo(whole.file), whole.picture)
    assert whole.file == tmp_path / "whole/patch.png"
    stopped = detguard.patch(bundled, [file.parent], out=tmp_path / "cut", on_step=stop, **options)
    assert len(losses) == 9
    assert not np.array_equal(stopped.picture, whole.picture)
    assert np.array_equal(detguard.patch(resume=tmp_path / "cut").picture, whole.picture)


def test_a_perturbation_for_all_photos_is_learned(bundled, file, tmp_path):
    made = detguard.universal(bundled, file.parent, target="person", eps=5, photos=2, batch=1, out=tmp_path / "run")
    assert made.picture.shape == (bundled.imgsz, bundled.imgsz, 3)
    assert 0 < np.abs(made.picture.astype(int) - 128).max() <= 5
    with pytest.raises(DetguardError, match="no photo has such an object"):
        detguard.universal(bundled, file.parent, target="sheep", out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_odd_photos_of_a_stream_are_told_and_the_watch_goes_on(bundled, small, tmp_path):
    photos = [{"photo": small, "objects": []}, {"photo": small, "objects": [{"class": "person"}]}, {"photo": "a.png"}]
    half = Image.open(io.BytesIO(encode_png(small)[:9000]))
    odd = [{"photo": small / 2, "objects": []}, "b.png", {"photo": half, "objects": []}]
    records = list(detguard.monitor(bundled, [*photos, *odd], window=np.int64(8), out=tmp_path))
    assert ["error" in record for record in records] == [False, True, True, True, True, True]
    assert all(f"`photos` {number}: " in records[number - 1]["error"] for number in (2, 4, 5, 6))
    assert (tmp_path / "dropped.jsonl").read_bytes() == b""  # for `adapt`, which says that there are none
    for wrong, named in (({"window": 2}, "`window`"), ({"drift": "magic"}, "`drift` magic")):
        with pytest.raises(DetguardError, match=named):
            detguard.monitor(bundled, photos, **wrong)


def test_photos_in_memory_do_not_fill_the_disk(bundled, small):
    watched = detguard.monitor(bundled, [{"photo": small, "objects": []}] * 4, window=8)
    files = [Path(next(watched)["photo"]) for _ in range(3)]
    assert [file.exists() for file in files] == [False, False, True]


def test_labels_may_come_later_than_their_photos_which_give_hints_until_then(bundled, small, tmp_path):
    found = bundled.detect([small], 0.3)[0].records(bundled.class_names)
    dark = (small * 0.02).astype(np.uint8)
    photos = [{"id": str(n), "photo": small if n < 16 else dark} for n in range(32)]
    labels = [{"id": str(n), "objects": found} for n in range(32)]
    records = list(detguard.monitor(bundled, [*photos, *labels, {"id": "5", "objects": found}], window=8, out=tmp_path))
    bare, late = records[:32], records[32:64]
    assert [r["number"] for r in records] == [*range(1, 33), *range(1, 33), 33]
    assert {r["f1"] for r in bare} == {None}
    assert [r["hint"] for r in bare if "hint" in r] == [17]
    assert [r["began"] for r in (*bare, *late) if r["began"]] == [17]
    assert late[0]["f1"] > 0.5 > late[31]["f1"]
    assert "labels of '5'" in records[64]["error"]  # they have come already
    assert not any("hint" in r for r in late)
    run = Run.open(tmp_path, "monitor")
    assert len(latest(run.records())) == 33
    # Another process waits for what this one waited for.
    run.keep(bare)
    again = from_records(labels[:1], bundled.class_names)
    resumed = observe(run, Deployment(bundled), again, "likelihood-ratio", 8, again=False)
    assert [(r["number"], r["f1"]) for r in resumed] == [(1, late[0]["f1"])]


# What takes long to import, and is imported only where it is used.
HEAVY = {
    "torchvision",
    "torch._dynamo",
    "matplotlib",
    "kornia",
    "pandas",
    "transformers",
    "onnxruntime",
    "numba",
    "skimage",
}


def test_importing_detguard_imports_no_torch_and_detecting_with_all_that_it_offers_nothing_heavy():
    code = f"""
import sys, detguard.cli
print({HEAVY | {"torch", "numpy"}} & set(sys.modules))
[getattr(detguard, name) for name in detguard.__all__]
import numpy, detguard.overlay, detguard.reports.tables
detguard.load_detector("detguard-n", 32).predict(numpy.zeros((32, 32, 3), numpy.uint8), 0.25)
print({HEAVY} & set(sys.modules))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split("\n")[:2] == ["set()", "set()"]
    with pytest.raises(AttributeError, match="nothing"):
        detguard.nothing  # noqa: B018


def test_what_the_labels_of_a_stream_cannot_tell_does_not_count(bundled, small):
    found = bundled.detect([small], 0.25, multi_label=True)[0]
    line = {"photo": small, "objects": found.of([0]).records(bundled.class_names)}
    assert len(found.of([0])) < len(found)
    partly, whole = detguard.monitor(bundled, [line | {"classes": ["person"]}, line], window=8)
    assert partly["f1"] == 1 > whole["f1"]


def test_objects_chosen_by_number_are_those_of_one_detector(bundled, small, tmp_path):
    hard, chosen = detguard.load_detector("detguard-n-hard"), detguard.Vanish(only=detguard.Selection(objects=(1,)))
    list(detguard.attack(bundled, [small], objective=chosen, transforms="none", steps=1, out=tmp_path / "run"))
    with pytest.raises(DetguardError, match="by what its own detector found"):
        list(detguard.verify(tmp_path / "run", hard))
    with pytest.raises(DetguardError, match="`objects`: numbers what one detector finds"):
        list(detguard.attack([bundled, hard], [small], objective=chosen, transforms="none", steps=1))


def test_detectors_of_one_name_are_not_attacked_together(bundled, small):
    with pytest.raises(DetguardError, match="each must have a name of its own"):
        list(detguard.attack([bundled, bundled], [small], transforms="none", steps=1))


def test_a_resumed_monitor_sees_each_photo_once_whatever_has_become_of_the_data_set(bundled, small, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(encode_png(np.roll(small, 8 * number, 1)))
    shown = [Labelled(tmp_path / f"{number}.png", bundled.detect([small])[0]) for number in range(4)]
    run = Run.create("monitor", tmp_path / "run", {})
    run.config["command"] = "monitor"
    watched = Deployment(bundled)
    assert len(list(observe(run, watched, shown[:2], "kswin", 8))) == 2
    records = list(observe(run, watched, shown[1:], "kswin", 2))
    assert [(one["number"], Path(one["photo"]).name) for one in records] == [(3, "2.png"), (4, "3.png")]


def test_classes_may_be_named_in_any_letter_case(bundled, tiny_data, tmp_path):
    options = {"protocols": ("clean",), "limit": 1, "cache": tmp_path / "c.sqlite"}
    metrics = detguard.evaluate(bundled, tiny_data, classes=("PERSON",), **options)
    assert metrics["detguard-n"]["setting"]["classes"] == 1
    with pytest.raises(DetguardError, match="did you mean 'person'"):
        detguard.evaluate(bundled, tiny_data, classes=("persn",), **options)


def test_a_picture_does_not_go_on_with_other_photos(bundled, small, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(encode_png(small))
    options = {"photos": 4, "batch": 1, "size": 0.3, "out": tmp_path / "run"}
    detguard.patch(bundled, tmp_path / "photos", on_step=lambda *_: True, **options)
    (tmp_path / "photos/b.png").write_bytes(encode_png(small))
    with pytest.raises(DetguardError, match="photos or their labels have changed"):
        detguard.patch(resume=tmp_path / "run")


def test_a_defence_is_judged_by_more_steps_and_starts_than_a_detector(bundled):
    plain, defence = bundled, copy.copy(bundled)
    defence.hardened = True
    assert strength([plain], None, None) == {"steps": 20, "restarts": 1}
    assert strength([plain, defence], None, None) == {"steps": 40, "restarts": 2}
    assert strength([defence], 7, 3) == {"steps": 7, "restarts": 3}
