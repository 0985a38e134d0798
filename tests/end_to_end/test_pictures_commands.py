"""`detguard patch` and `universal` as a user runs them, and their judgement on labelled photos."""

import json
import signal

import cv2
import numpy as np
import yaml
from program import Started, detguard, refusal


def test_a_patch_is_made_and_judged(tmp_path, tiny_data):
    quick = ("--imgsz", 96, "--size", 0.6, "--pixels", 32, "--photos", 24, "--batch", 2, "--conf", 0.1)
    result = detguard("patch", "--data", tiny_data, *quick, "--out", "made", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "made/results.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["batch"] == 10
    page = (tmp_path / "made/report.html").read_text()
    assert "20 x 20 cm when printed" in page
    assert page.count('class="card item"') >= 2
    assert page.count("<svg") == 2
    options = ("--imgsz", 96, "--protocols", "clean", "--patch", "made/patch.png", "--patch-size", 0.6)
    judged = detguard("evaluate", "--data", tiny_data, *options, "--out", "judged", cwd=tmp_path)
    assert judged.returncode == 0, judged.stderr
    assert "Patch: AP of person" in judged.stdout
    found = json.loads((tmp_path / "judged/metrics.json").read_text())["detguard-n"]["patch"]
    assert list(found["shown"]) == ["clean", "grey", "random", "patch"]
    again = detguard("evaluate", "--resume", "judged", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_classes_of_the_data_are_renamed_and_what_was_not_found_before_is_not_called_gone(tmp_path, tiny_data):
    folder = tmp_path / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "11.png"), np.full((96, 96, 3), 128, np.uint8))
    data = json.loads(tiny_data.read_text())
    data["images"] = [{"id": 11, "file_name": "11.png", "height": 96, "width": 96}]
    data["annotations"] = [{"id": 1, "image_id": 11, "category_id": 1, "bbox": [9, 9, 40, 40], "area": 1600}]
    data["categories"][0]["name"] = "pedestrian"
    (tmp_path / "instances.json").write_text(json.dumps(data))
    quick = ("--imgsz", 96, "--pixels", 16, "--photos", 2, "--batch", 1)
    result = detguard(
        "patch", "--data", "instances.json", "--map", "pedestrian=person", *quick, "--out", "made", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "made/report.html").read_text()
    assert "1 none found without it" in page
    assert "all gone" not in page
    again = detguard("patch", "--resume", "made", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_without_labels_targets_are_what_is_found(tmp_path, bus_file):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/bus.jpg").write_bytes(bus_file.read_bytes())
    quick = ("--imgsz", 160, "--pixels", 16, "--photos", 1, "--batch", 1)
    result = detguard("patch", "--data", "photos", *quick, "--out", "made", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"file": "made/patch.png", "folder": "made", "stopped": False}
    assert (tmp_path / "made/patch.png").exists()
    both = refusal("patch", "--data", "photos", "--hours", 1, *quick, cwd=tmp_path)
    assert (both.returncode, both.stderr) == (2, "error: --hours: instead of --photos; leave one of them out\n")
    wrong = refusal("patch", "--data", "photos", "--target", "sheep", *quick, cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --target: no photo has such an object")
    assert not (tmp_path / "runs").exists()


def test_a_universal_perturbation_is_made_and_judged(tmp_path, tiny_data):
    quick = ("--imgsz", 96, "--eps", 12, "--photos", 24, "--batch", 2, "--conf", 0.1)
    result = detguard("universal", "--data", tiny_data, *quick, "--out", "made", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"file": "made/universal.png", "folder": "made", "stopped": False}
    assert "Universal. Goal: all not found any more" in (tmp_path / "made/report.html").read_text()
    assert "changes 10 times as large" in (tmp_path / "made/report.html").read_text()
    options = ("--imgsz", 96, "--protocols", "clean", "--universal", "made/universal.png")
    judged = detguard("evaluate", "--data", tiny_data, *options, "--out", "judged", cwd=tmp_path)
    assert judged.returncode == 0, judged.stderr
    assert "of at most 12 levels" in judged.stdout
    found = json.loads((tmp_path / "judged/metrics.json").read_text())["detguard-n"]["universal"]
    assert found["shown"]["universal"]["AP"] < found["shown"]["clean"]["AP"]


def test_stopped_it_is_gone_on_with(tmp_path, tiny_data):
    options = ("--imgsz", 96, "--pixels", 32, "--photos", 2000, "--batch", 2, "--conf", 0.1, "--iou", 0.6)
    process = Started("patch", "--data", tiny_data, *options, "--out", "made", cwd=tmp_path)
    records = tmp_path / "made/results.jsonl"
    process.wait_for(lambda: records.exists() and records.read_text().count("\n") > 1)
    process.stop(signal.SIGINT)
    told = process.ended(60)
    assert told.returncode == 130
    assert "go on with: detguard patch --resume made" in told.stderr
    assert "--imgsz 96 --iou 0.6 --patch made/patch.png --patch-target person" in " ".join(told.stdout.split())
    assert (tmp_path / "made/patch.png").exists()
    before = len(records.read_text().splitlines())
    config = (tmp_path / "made/config.yaml").read_text()
    config = yaml.safe_load(config.replace("photos: 2000", f"photos: {before * 20 + 40}"))
    (tmp_path / "made/config.yaml").write_text(yaml.safe_dump(config | {"arguments": []}))  # as from Python
    again = detguard("patch", "--resume", "made", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "--imgsz 96 --iou 0.6 --patch made/patch.png" in " ".join(again.stdout.split())
    batches = [json.loads(line)["batch"] for line in records.read_text().splitlines()]
    assert batches == [10 * number for number in range(1, len(batches) + 1)]
    assert len(batches) > before
