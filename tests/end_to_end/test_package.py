import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Where nothing answers: what needs the network fails.
OFFLINE = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The programs of a new environment: detguard by the wheel of its sdist, beside what it needs."""
    folder = tmp_path_factory.mktemp("package")

    def run(*command, cwd=folder):
        subprocess.run([sys.executable, "-m", *map(str, command)], cwd=cwd, check=True, capture_output=True)

    run("hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("detguard-*.tar.gz")
    run("pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist)
    (wheel,) = folder.glob("detguard-*.whl")
    run("venv", "--without-pip", "venv")
    run("pip", "--python", folder / "venv", "install", "--no-deps", "--no-index", wheel)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # What lies there alone, and not this checkout, which a .pth there names.
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv/bin"


def run(program, *arguments):
    """What a program prints, outside of the checkout and without a network."""
    done = subprocess.run(
        [program, *map(str, arguments)],
        cwd=program.parents[2], env=os.environ | OFFLINE, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout


def test_the_wheel_brings_the_bundled_detector(programs):
    show = "import detguard as d, detguard.files as f; print(f.shipped('weights'), d.load_detector().class_names[0])"
    folder, _, name = run(programs / "python", "-c", show).splitlines()[-1].rpartition(" ")
    site = Path(folder).parents[1]
    assert site.is_relative_to(programs.parent)
    assert name == "person"
    names = {str(file.relative_to(site)) for file in (site / "detguard").rglob("*")}
    assert {"detguard/weights/detguard-n.safetensors", "detguard/weights/detguard-n.json"} <= names
    assert {"detguard/reports/report.html.j2", "detguard/datasets/coco128.yaml", "detguard/py.typed"} <= names
    assert not any(name.endswith(".pt") for name in names)


def test_the_wheel_attacks_and_evaluates_offline_and_its_pages_open(programs, bus_file, tmp_path):
    attack = ("attack", bus_file, "--target", "person", "--eps", "8", "--imgsz", "320", "--out", tmp_path / "attack")
    assert "1 of 1 photos fooled" in run(programs / "detguard", *attack)
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
    assert "AP 1.000 clean" in run(programs / "detguard", "evaluate", "--data", tmp_path / "data.json", *asked, *made)
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
