"""`detguard evaluate` and `compare` as a user runs them."""

import contextlib
import csv
import io
import json
import re
import shutil
from functools import partial

import albumentations as A
import program
import pytest
import torch
import yaml
from program import Started, refusal
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import fused, save_gated
from detguard.evaluation.metrics import read_metrics

OPTIONS = ("--eps", "4,8", "--steps", 3, "--severities", "3", "--attacks", "all,vanish", "--queries", 5, "--batch", 3)
OPTIONS += ("--corruptions", "fog,contrast", "--corruption-file", "OWN", "--save-images")
ALL = ("--protocols", "clean,corruptions,attack,transfer,blackbox,checks")
detguard = partial(program.detguard, columns=250)


def command_line(folder, data):
    models = ("--model", "detguard-n", "--model", "detguard-n")
    options = (folder / "own.yaml" if one == "OWN" else one for one in OPTIONS)
    return ("evaluate", *models, "--data", data, *ALL, *options, "--out", "run")


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_data):
    """One run of all protocols on two detectors: the bundled one, twice."""
    folder = tmp_path_factory.mktemp("evaluate")
    A.save(A.Compose([A.ToGray(p=1)]), folder / "own.yaml", data_format="yaml")
    result = detguard(*command_line(folder, tiny_data), cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result


def test_metrics_hold_every_protocol_of_every_model(done):
    folder, _ = done
    metrics = json.loads((folder / "run/metrics.json").read_text())
    assert yaml.safe_load((folder / "run/config.yaml").read_text())["evaluate"]["batch"] == 3
    assert list(metrics) == ["detguard-n", "detguard-n#2"]
    assert read_metrics(folder / "run/metrics.json") == metrics
    for found in metrics.values():
        protocols = ["clean", "corruptions", "attack", "transfer", "blackbox", "corruption_file", "checks"]
        assert list(found) == ["setting", *protocols, "checked"]
        assert found["setting"]["imgsz"] == 320
        assert len(found["clean"]) == 12 + 3
        assert found["clean"]["AP_error"] is None  # of four photos
        assert list(found["corruptions"]["kinds"]) == ["fog", "contrast"]
        assert 0 < found["corruption_file"]["AP"] < 1
        assert found["corruptions"]["rPC"] == pytest.approx(found["corruptions"]["mPC"] / found["clean"]["AP"])
        assert list(found["attack"]["budgets"]) == ["4", "8"]
        parts = found["attack"]["budgets"]["8"]["attacks"]
        assert list(parts) == ["worst", "all-0", "vanish-0"]
        assert found["attack"]["AP"] == min(p["AP"] for p in parts.values()) < found["clean"]["AP"]
        assert found["attack"]["AP"] == parts[found["attack"]["by"]]["AP"]
        assert "APs" in parts[found["attack"]["by"]]
        assert all({"passed", "value", "meaning", "remedy"} <= check.keys() for check in found["checks"].values())
    same = [{k: v for k, v in found.items() if k != "transfer"} for found in metrics.values()]
    assert same[0] == same[1]


def test_results_files_give_the_same_numbers_in_pycocotools(done, tiny_data):
    folder, _ = done
    metrics = json.loads((folder / "run/metrics.json").read_text())["detguard-n"]
    files = {
        "clean": metrics["clean"]["AP"],
        "attack-eps-8-worst": metrics["attack"]["budgets"]["8"]["attacks"]["worst"]["AP"],
        "fog-3": metrics["corruptions"]["kinds"]["fog"]["AP"],
        "blackbox": metrics["blackbox"]["AP"],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tiny_data))
        for name, ap in files.items():
            judge = COCOeval(truth, truth.loadRes(str(folder / f"run/detections/detguard-n/{name}.json")), "bbox")
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            assert judge.stats[0] == ap, name


def test_the_table_per_class_names_every_view(done):
    folder, _ = done
    rows = list(csv.DictReader((folder / "run/per_class.csv").read_text().splitlines()))
    assert {"clean", "fog 3", "attack eps 8 worst", "blackbox"} <= {row["view"] for row in rows}
    persons = [row for row in rows if row["class"] == "person" and row["view"] == "clean"]
    assert float(persons[0]["AP"]) > 0.9
    assert int(persons[0]["objects"]) >= 4


def test_what_was_shown_is_saved_as_data_sets(done):
    folder, result = done
    made = {"fog-3", "contrast-3"}
    for model in ("detguard-n", "detguard-n#2"):
        made |= {f"{model}-attack-eps{eps}-steps3" for eps in (4, 8)}
        made |= {f"{model}-blackbox-eps8-queries5", f"{model}-own-corruption"}
    assert {path.parent.name for path in folder.glob("run/datasets/*/data.yaml")} == made
    assert "data sets: run/datasets" in result.stdout


def test_the_report_is_one_file_with_gallery_and_plots(done):
    folder, result = done
    page = (folder / "run/report.html").read_text()
    assert page.count('class="card item"') == 4
    assert page.count('class="pair"') == page.count('class="layer difference"') == 8  # of both models
    assert page.count("<svg") == 3
    assert re.search(r"\w \(detguard-n, detguard-n#2\)", page)  # what became of a photo before both
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "report.html" in result.stdout
    assert "Checks of the attack itself" in page
    assert "recall, large" in page
    assert all(page.count(f'class="box {kind}') for kind in ("missed", "found", "false"))
    found = json.loads((folder / "run/metrics.json").read_text())["detguard-n"]
    verdict = f"detguard-n: AP {found['clean']['AP']:.3f} clean, ".replace("0.", ".")
    assert verdict in page
    assert verdict in result.stdout
    shown = re.findall(r"clean: F1 ([\d.]+)</span>.*?changed: F1 ([\d.]+)</span>", page, re.DOTALL)
    losses = [float(clean) - float(changed) for clean, changed in shown[::2]]  # both models are one
    assert losses == sorted(losses, reverse=True) != sorted(losses)


def test_it_tells_what_it_costs_before_it_starts(done, tiny_data):
    folder, result = done
    assert "forward passes: about" in result.stderr
    again = detguard(*command_line(folder, tiny_data)[:-2], "--dry-run", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert re.fullmatch(r"[\d,]+ forward passes, all of them known already\n", again.stdout)
    assert not list((folder / "runs/evaluate").glob("0*"))


def test_killed_and_resumed_it_ends_with_the_same_bytes(done, tiny_data, tmp_path):
    folder, _ = done
    process = Started(*command_line(folder, tiny_data), cwd=tmp_path)
    cache = tmp_path / "runs/evaluate/cache.sqlite"
    process.wait_for(lambda: cache.exists() and cache.stat().st_size > 100_000)
    process.stop()
    process.ended()
    assert not (tmp_path / "run/metrics.json").exists()
    result = detguard("evaluate", "--resume", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    made = [file.relative_to(folder / "run") for file in (folder / "run").rglob("*") if file.is_file()]
    same = [file for file in made if file.suffix in (".json", ".csv")]
    assert {"metrics.json", "per_class.csv", "draws.json"} <= {file.name for file in same}
    assert any(file.parts[0] == "detections" for file in same)
    for file in same:
        assert (tmp_path / "run" / file).read_bytes() == (folder / "run" / file).read_bytes(), file


def test_of_an_ensemble_it_tells_which_expert_spoke(tmp_path, tiny_data, bundled_model):
    torch.manual_seed(0)
    network = GatedNetwork(fused(bundled_model), 11)
    card = {"architecture": "yolo11n.yaml", "classes": list(bundled_model.names.values()), "imgsz": 320}
    save_gated(network, card, tmp_path / "three.safetensors")
    options = ("--protocols", "clean,attack", "--attacks", "all", "--steps", 1, "--limit", 2, "--out", "run")
    options += ("--json", "--fail-under", "attack.AP=1")
    result = detguard("evaluate", "--model", "three.safetensors", "--data", tiny_data, *options, cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "error: three: attack AP 0." in result.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert json.loads(result.stdout) == metrics
    found = metrics["three"]
    assert {"worst", "all-0", "all-1", "gate:10-0", "route:2-1"} <= found["attack"]["budgets"]["4"]["attacks"].keys()
    assert found["gate"]["experts"] == ["normal", "hard", "adversarial"]
    assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in found["gate"]["shares"].values())
    assert {"clean", "attack eps 4 worst"} <= found["gate"]["shares"].keys()
    page = (tmp_path / "run/report.html").read_text()
    assert page.count("Expert weights: three") == 3
    assert "most weight: " in page


def test_compare_shows_runs_side_by_side(done):
    folder, _ = done
    shutil.copytree(folder / "run", folder / "again", dirs_exist_ok=True)
    metrics = json.loads((folder / "run/metrics.json").read_text())
    metrics["detguard-n#2"]["clean"]["AP"] -= 0.25
    attack = metrics["detguard-n#2"]["attack"]
    attack |= {"eps": 9, "AP": 1, "budgets": {"9": attack["budgets"]["8"]}}
    (folder / "again/metrics.json").write_text(json.dumps({"detguard-n": metrics["detguard-n#2"]}))
    result = detguard("compare", folder / "run", "again", "--page", "c.html", cwd=folder, columns=80)
    assert result.returncode == 0, result.stderr
    assert "run: detguard-n" in result.stdout
    title = "4 photos, 13 classes, 320 px, multi-label NMS at IoU .700, seed 0, detguard"
    assert title in " ".join(result.stdout.split())
    assert "Difference to run: detguard-n" in result.stdout
    assert re.search(r"clean AP +│ \+.000, too few [^│]+│ -.250, too few ", result.stdout)
    assert re.search(r"attacked AP +│ [^│]+│ - +│", result.stdout.partition("Difference")[2])
    assert "again: detguard-n: attacked AP not compared with run: detguard-n: eps 8, 9" in result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    told = "Against detguard-n (run), detguard-n#2 (run) has"
    assert told in (folder / "c.html").read_text()
    assert "detguard-n (again) has clean AP -.250, too few photos to tell" in (folder / "c.html").read_text()
    result = detguard("compare", "run", "again", "--json", cwd=folder)
    *_, last = map(json.loads, result.stdout.splitlines())
    assert last["name"] == "again: detguard-n"
    assert last["difference"]["clean AP"]["value"] == pytest.approx(-0.25)
    assert "attacked AP" not in last["difference"]


def test_a_hardened_network_of_one_expert_is_evaluated_as_any_detector(tmp_path, tiny_data, bundled_model):
    network = GatedNetwork(fused(bundled_model), 11, ["adversarial"])
    card = {"architecture": "yolo11n.yaml", "classes": list(bundled_model.names.values()), "imgsz": 320}
    save_gated(network, card, tmp_path / "one.safetensors")
    options = ("--protocols", "clean,attack", "--attacks", "vanish", "--steps", 1, "--restarts", 1, "--out", "run")
    result = detguard("evaluate", "--model", "one.safetensors", "--data", tiny_data, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert "gate" not in metrics["one"]
    assert list(metrics["one"]["attack"]["budgets"]["4"]["attacks"]) == ["worst", "vanish-0"]
    assert "most weight" not in (tmp_path / "run/report.html").read_text()


def test_compare_names_a_run_that_is_not_done(done, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(done[0] / "run/config.yaml", tmp_path / "run")
    result = refusal("compare", "run", cwd=tmp_path)
    assert result.returncode == 2
    assert "detguard evaluate --resume run" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data"),
        (("--data", "nowhere.json"), "nowhere.json: no such file or folder; give a"),
        (("--data", "run"), "run: is a folder; photos need labels here"),
        (
            ("--data", "DATA", "--map", "walker=persom"),
            "--map walker=persom: the detector has no class 'persom'; did you",
        ),
        (("--data", "DATA", "--model", "detgard-n"), "detgard-n: no such detector; did you mean detguard-n?"),
        (("--data", "DATA", "--protocols", "clena"), "--protocols clena"),
        (("--data", "DATA", "--severities", "3,x"), "--severities '3,x'"),
        (("--data", "DATA", "--severities", "6"), "--severities 6"),
        (("--data", "DATA", "--corruption-file", "run/config.yaml"), "--corruption-file run/config.yaml: not a pip"),
        (("--data", "DATA", "--attacks", "pgd"), "--attacks pgd"),
        (("--data", "DATA", "--eps", "300"), "--eps 300"),
        (("--data", "DATA", "--classes", "unicorn"), "unicorn"),
        (("--data", "DATA", "--protocols", "transfer"), "two detectors"),
        (("--data", "DATA", "--protocols", "clean", "--patch-target", "bus"), "--patch-target: goes with --patch"),
        *(
            (("--data", "DATA", "--protocols", "clean", option, value), f"{option}: goes with --protocols {protocols}")
            for option, value, protocols in (
                ("--severities", 1, "corruptions"),
                ("--corruptions", "fog", "corruptions"),
                ("--eps", 8, "attack or transfer or"),
                ("--steps", 3, "attack or transfer or"),
                ("--restarts", 4, "attack or transfer or"),
                ("--attacks", "box", "attack or transfer or"),
                ("--queries", 5, "attack or transfer or"),
            )
        ),
        (("--data", "DATA", "--protocols", "clean,blackbox", "--eps", "2,4"), "--eps 2,4: several go with --protocols"),
        (
            ("--data", "DATA", "--queries", 5),
            "--queries: goes with --protocols blackbox or checks, or a detector",
        ),
        (
            ("--data", "DATA", "--protocols", "clean,checks", "--save-images"),
            "--save-images: goes with --protocols",
        ),
        (("--resume", "run", "--eps", "8"), "leave out --eps"),
        (("--data", "DATA", "--device", "gpu9"), "--device gpu9"),
        (("--data", "DATA", "--classes", "sheep"), "none of its labelled objects"),
    ],
)
def test_wrong_use_is_one_line_that_names_the_option(tmp_path, tiny_data, arguments, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("command: evaluate\n")
    result = refusal("evaluate", *(tiny_data if a == "DATA" else a for a in arguments), cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs/evaluate").glob("0*"))


def write_onnx(names, file):
    """A graph of one frame of 64 px, in which it finds nothing."""
    from onnx import TensorProto, helper, save

    sides = {"images": [1, 3, 64, 64], "found": [1, 4 + len(names), 1]}
    frames, found = (helper.make_tensor_value_info(name, TensorProto.FLOAT, side) for name, side in sides.items())
    nothing = helper.make_tensor("nothing", TensorProto.FLOAT, sides["found"], [0.0] * sides["found"][1])
    graph = helper.make_graph([helper.make_node("Constant", [], ["found"], value=nothing)], "any", [frames], [found])
    made = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    helper.set_model_props(made, {"names": str(names), "imgsz": "[64, 64]", "stride": "32", "task": "detect"})
    save(made, file)


def test_options_of_attacks_by_a_gradient_are_refused_where_there_is_none(tmp_path, tiny_data, bundled):
    pytest.importorskip("onnxruntime")
    write_onnx(bundled.class_names, tmp_path / "any.onnx")
    options = ("--model", "any.onnx", "--data", tiny_data, "--protocols", "attack", "--imgsz", 64, "--dry-run")
    result = refusal("evaluate", *options, "--steps", 3, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (2, "error: --steps: goes with a detector that has a gradient\n")
    assert refusal("evaluate", *options, "--queries", 3, cwd=tmp_path).returncode == 0
    result = refusal("evaluate", *options[:5], "checks", cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "error: --protocols checks: any: no gradient" in result.stderr


def test_checks_alone_of_what_is_not_found_have_too_little_to_judge_by(tmp_path, tiny_data):
    data = json.loads(tiny_data.read_text())
    data["annotations"] = [one | {"bbox": [0, 0, 3, 3]} for one in data["annotations"]]
    (tmp_path / "odd.json").write_text(json.dumps(data))
    asked = ("--protocols", "checks", "--attacks", "vanish", "--steps", 1, "--queries", 1, "--limit", 1)
    options = ("--data", "odd.json", "--images", tiny_data.parent / "images", "--imgsz", 64, "--out", "run", *asked)
    result = refusal("evaluate", *options, cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    told = "the attack's own checks have too little to judge by (more steps, large budget, black box)"
    assert told in " ".join(result.stdout.split())
    assert "the clean AP of these photos is 0.000, so that an attack" in (tmp_path / "run/report.html").read_text()
    assert read_metrics(tmp_path / "run/metrics.json")["detguard-n"]["checks"]["black box"]["passed"] is None


def test_broken_data_is_counted_and_the_rest_is_done(tmp_path, tiny_data):
    shutil.copytree(tiny_data.parent, tmp_path / "data")
    file = tmp_path / "data/instances.json"
    data = json.loads(file.read_text())
    data["annotations"].append(data["annotations"][0] | {"bbox": [1, 2, 3]})
    data["images"].append({"id": 99, "file_name": "gone.png", "width": 10, "height": 10})
    (person,) = (c for c in data["categories"] if c["name"] == "person")
    person["name"] = "pedestrian"
    data["categories"].append({"id": 77, "name": "dragon"})
    data["annotations"].append(data["annotations"][0] | {"category_id": 77})
    file.write_text(json.dumps(data))
    photo = tmp_path / "data/images/12.png"
    photo.write_bytes(photo.read_bytes()[:5000])
    options = ("--map", "pedestrian=person", "--protocols", "clean")
    result = detguard("evaluate", "--data", file, *options, cwd=tmp_path)
    assert result.returncode == 2
    assert "warning: 1 boxes of classes that the detector does not know, left out: dragon (1); --map" in result.stderr
    assert "Left out for detguard-n: 1 box of 1 class that it does not know" in " ".join(result.stdout.split())
    assert "warning: 1 photos missing or unreadable" in result.stderr
    assert "annotations[" in result.stderr
    assert "12.png" in result.stderr
    metrics = json.loads((tmp_path / "runs/evaluate/001/metrics.json").read_text())
    assert metrics["detguard-n"]["clean"]["photos"] == 3
    assert metrics["detguard-n"]["clean"]["AP"] > 0.9
    assert metrics["detguard-n"]["setting"]["left_out"] == 2
    assert " 2 more photos of the data could not be read" in (tmp_path / "runs/evaluate/001/report.html").read_text()
