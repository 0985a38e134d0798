import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import detguard
from detguard import DetguardError
from detguard.photos import encode_png, read_photo
from detguard.runs import Run
from detguard.workflows.attack import as_photo

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
    (of_file,) = detguard.attack(bundled, str(file), **OPTIONS)
    planes = torch.from_numpy(small).permute(2, 0, 1)
    results = list(detguard.attack(bundled, [small, Image.fromarray(small), planes, planes / 255], **OPTIONS))
    assert [result.key for result in results] == ["photo-001", "photo-002", "photo-003", "photo-004"]
    assert all(result.success and result.photo.shape == small.shape for result in results)
    assert not results[0].folder.exists()
    assert results[0].group.keys() == {"median:3", "flip:h"}
    assert read_photo(of_file.save(tmp_path / "out")).shape == small.shape
    assert results[0].used == of_file.used > 0


def test_a_run_that_is_there_is_left_as_it_is(bundled, small, tmp_path):
    options = {"transforms": "none", "steps": 1, "out": tmp_path / "run"}
    list(detguard.attack(bundled, small, **options))
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(DetguardError, match="already holds a run"):
        list(detguard.attack(bundled, 255 - small, **options))
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_images_of_pillow_are_what_their_files_are_read_as(tmp_path, small):
    turned, deep = tmp_path / "turned.jpg", tmp_path / "deep.png"
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(small).save(turned, exif=exif, quality=95)
    cv2.imwrite(str(deep), np.full((16, 20, 3), 30000, np.uint16)[..., 0])
    for path in (turned, deep):
        assert np.abs(as_photo(Image.open(path)).astype(int) - read_photo(path)).max() <= 2


def test_a_single_array_is_one_photo(bundled, small):
    options = {"transforms": "none", "steps": 1}
    assert [r.key for r in detguard.attack(bundled, small, **options)] == ["photo-001"]


def test_a_photo_without_target_is_told_of(bundled):
    (result,) = detguard.attack(bundled, np.full((64, 64, 3), 128, np.uint8))
    assert result.status == "no-target"
    assert not result.success
    with pytest.raises(DetguardError, match="no adversarial photo"):
        result.photo  # noqa: B018


@pytest.mark.parametrize(
    "photo",
    [
        np.zeros((4, 4), np.uint8), np.zeros((8, 8, 3), np.float32), torch.zeros(8, 8, 3), torch.full((3, 8, 8), 2.0),
        torch.full((3, 8, 8), float("nan")), 7,
    ],
)  # fmt: skip
def test_what_is_no_photo_is_refused(photo):
    with pytest.raises(DetguardError, match="photo: "):
        as_photo(photo)


def test_wrong_options_are_refused_before_anything_is_done(bundled, small, tmp_path):
    for options in (
        {"objective": detguard.Vanish("unicorn")},
        {"transforms": "blur:3"},
        {"rule": "none"},
        {"steps": 0},
    ):
        with pytest.raises(DetguardError):
            detguard.attack(bundled, small, out=tmp_path / "run", **options)
    with pytest.raises(TypeError, match=r"attack\(\) got .*'epsilon'"):
        detguard.attack(bundled, small, epsilon=4)
    for nothing in ([], np.zeros((4, 4), np.uint8), [small, 7]):
        with pytest.raises(DetguardError, match="photo"):
            detguard.attack(bundled, nothing, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_is_verified_by_its_own_detector_and_by_another(bundled, file, tmp_path):
    (result,) = detguard.attack(bundled, file, out=tmp_path, **OPTIONS)
    (own,) = detguard.verify(tmp_path, bundled, transforms="jpeg:90")
    assert {name: own["members"][name] for name in result.members} == result.members
    assert "jpeg:90" in own["members"]
    (other,) = detguard.verify(tmp_path, detguard.load_detector("detguard-n-hard"))
    assert other["members"] != result.members


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


def test_the_example_runs(file, tmp_path, capsys):
    path = Path(detguard.__file__).parent.parent / "examples" / "from_python.py"
    spec = importlib.util.spec_from_file_location("from_python", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    left = example.main(str(file), str(tmp_path))
    assert set(left) == {"photo", "median:3", "jpeg:75", "jpeg:50"}
    assert "bus: fooled" in capsys.readouterr().out
    assert (tmp_path / "adversarial.png").is_file()


def test_importing_detguard_imports_no_torch_and_names_all_that_it_offers():
    code = "import sys, detguard; print('torch' in sys.modules); [getattr(detguard, name) for name in detguard.__all__]"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "False"
    with pytest.raises(AttributeError, match="nothing"):
        detguard.nothing  # noqa: B018
