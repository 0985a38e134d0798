import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Where nothing answers: what needs the network fails.
OFFLINE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of packages that a wheel was installed into, and nothing else was."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("detguard-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site, *command):
    """What Python says of a command, with the packages of the wheel before those of this checkout."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=site, env=os.environ | OFFLINE, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout


def test_the_wheel_brings_the_bundled_detector(site):
    names = {str(file.relative_to(site)) for file in site.rglob("*")}
    assert {"detguard/weights/detguard-n.safetensors", "detguard/weights/detguard-n.json"} <= names
    assert {"detguard/reports/report.html.j2", "detguard/datasets/coco128.yaml", "detguard/py.typed"} <= names
    assert not any(name.endswith(".pt") for name in names)
    show = "import detguard as d, detguard.files as f; print(f.shipped('weights'), d.load_detector().class_names[0])"
    folder, _, name = run(site, "-c", show).splitlines()[-1].rpartition(" ")
    assert Path(folder) == site / "detguard" / "weights"
    assert name == "person"


def test_the_wheel_attacks_and_evaluates_offline_and_its_pages_open(site, bus_file, tmp_path):
    attack = ("attack", bus_file, "--target", "person", "--eps", "8", "--imgsz", "320", "--out", tmp_path / "attack")
    assert "1 of 1 photos fooled" in run(site, "-m", "detguard", *attack)
    found = json.loads((tmp_path / "attack/results.jsonl").read_text())["clean"]
    width, height = 810, 1080
    boxes = [one["box"] for one in found if one["class"] == "person"]
    data = {
        "images": [{"id": 1, "file_name": bus_file.name, "width": width, "height": height}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": [x, y, u - x, v - y], "area": 1.0, "iscrowd": 0}
            for i, (x, y, u, v) in enumerate(boxes, 1)
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    (tmp_path / "data.json").write_text(json.dumps(data))
    asked = ("--images", bus_file.parent, "--protocols", "clean,attack", "--attacks", "vanish", "--steps", "3")
    made = ("--imgsz", "320", "--out", tmp_path / "evaluate")
    assert "AP 1.000 clean" in run(site, "-m", "detguard", "evaluate", "--data", tmp_path / "data.json", *asked, *made)
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("needs Debian's chromium")
    for name, said in {"attack": "fooled", "evaluate": "AP"}.items():
        options = (
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--dump-dom",
            f"--user-data-dir={tmp_path / 'profile'}",
        )
        page = subprocess.run(
            [chromium, *options, f"file://{tmp_path / name / 'report.html'}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert said in page.stdout
