import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_brings_the_bundled_detector(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("detguard-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {"detguard/weights/detguard-n.safetensors", "detguard/weights/detguard-n.json"} <= names
    assert {"detguard/reports/report.html.j2", "detguard/datasets/coco128.yaml", "detguard/py.typed"} <= names
    assert not any(name.endswith(".pt") for name in names)
    show = "import detguard as d, detguard.files as f; print(f.shipped('weights'), d.load_detector().class_names[0])"
    run = subprocess.run(
        [sys.executable, "-c", show], cwd=tmp_path / "site", check=True, capture_output=True, text=True
    )
    folder, _, name = run.stdout.splitlines()[-1].rpartition(" ")
    assert Path(folder) == tmp_path / "site" / "detguard" / "weights"
    assert name == "person"
