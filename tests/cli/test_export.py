"""`detguard export` as a user runs it, in this process."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from detguard.cli import main
from detguard.cli.app import out
from detguard.detectors.load import load_detector
from detguard.export import check


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs the command in an empty folder; returns its exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["detguard", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return stopped.value.code or 0, shown.out + shown.err

    return called


def test_it_writes_checks_and_says_so(run, bus_file):
    code, shown = run("detguard-n", "--imgsz", 96, "--photos", bus_file)
    assert code == 0
    assert Path("detguard-n.onnx").is_file()
    assert "check on 1 photos" in shown
    assert "ms per photo, the file" in shown
    assert "checked: detguard-n.onnx finds what detguard-n finds" in shown


def test_json_is_one_object_whether_the_check_passes_or_not(run, monkeypatch, bus_file):
    monkeypatch.setattr(out, "quiet", False)
    options = ("detguard-n", "--format", "torchscript", "--imgsz", 64, "--photos", bus_file, "--json")
    code, shown = run(*options)
    told = json.loads(shown)
    assert (code, told["file"], told["passed"]) == (0, "detguard-n.torchscript", True)
    assert told["scores"] <= 0.001
    assert told["compared"] > 0
    assert set(told["milliseconds"]) == {"detguard", "the file"}
    good = Path("detguard-n.torchscript").read_bytes()
    monkeypatch.setattr(check, "SCORES", -1.0)
    code, shown = run(*options)
    line, error = shown.splitlines()
    told = json.loads(line)
    assert (code, told["file"], told["passed"]) == (1, "detguard-n.failed.torchscript", False)
    assert error.startswith("error: detguard-n.failed.torchscript: check failed")
    assert error.endswith("; detguard-n.torchscript stays as it was")
    assert Path("detguard-n.torchscript").read_bytes() == good


def test_a_failed_check_is_exit_code_1_and_takes_no_files_place(run, monkeypatch, bus_file):
    monkeypatch.setattr(check, "SCORES", -1.0)
    code, shown = run("detguard-n", "--format", "torchscript", "--imgsz", 96, "--photos", bus_file)
    assert code == 1
    assert "error: detguard-n.failed.torchscript: check failed, do not use it (expected scores within" in shown
    assert "stays as it was" not in shown
    assert [file.name for file in Path().iterdir()] == ["detguard-n.failed.torchscript"]
    assert Path("detguard-n.failed.torchscript").stat().st_size > 1000


def test_ctrl_c_while_a_file_is_checked_leaves_none(run, monkeypatch, bus_file):
    monkeypatch.setattr("detguard.export.run.check", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    options = ("detguard-n", "--format", "torchscript", "--imgsz", 64, "--photos", bus_file)
    handler = signal.getsignal(signal.SIGINT)
    try:
        code, _ = run(*options)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert code == 130
    assert not list(Path().iterdir())


def test_a_file_is_made_beside_where_it_is_to_be(run, monkeypatch, tmp_path, bus_file):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "full"))  # which is not there
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))
    options = ("--format", "torchscript", "--imgsz", 64, "--photos", bus_file, "--out", "made/n.torchscript")
    code, shown = run("detguard-n", *options)
    assert code == 0, shown
    assert [file.name for file in Path("made").iterdir()] == ["n.torchscript"]


def test_photos_on_which_nothing_is_found_check_nothing(run):
    import cv2
    import numpy as np

    cv2.imwrite("grey.png", np.full((64, 64, 3), 128, np.uint8))
    code, shown = run("detguard-n", "--format", "torchscript", "--nms", "--imgsz", 64, "--photos", "grey.png")
    assert code == 1
    assert "nothing was found to compare; give --photos" in shown


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnxruntime"), ("onnx", "onnx"), ("openvino", "openvino")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(run, monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, shown = run("detguard-n", "--format", kind)
    assert code == 2
    assert f"--format {kind}: needs {package}; pip install 'detguard[export" in shown
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing argument"),
        (("nowhere.pt",), "nowhere.pt: no such file"),
        (("detguard-n", "--format", "tflite"), "--format"),
        (("detguard-n", "--out", "x.pt"), "--out x.pt: expected a name that ends in .onnx"),
        (("detguard-n", "--format", "openvino", "--out", "x"), "expected a name that ends in _openvino_model"),
        (("detguard-n", "--format", "pt", "--nms"), "--nms: not of a .pt"),
        (("detguard-n", "--format", "pt", "--static"), "--static: not of a .pt"),
        (("detguard-n", "--nms", "--end-to-end"), "leave one of them out"),
        (("detguard-n", "--end-to-end"), "--end-to-end: detguard-n has no head"),
        (("detguard-n", "--top-k", "1"), "--top-k: detguard-n is no gated ensemble"),
        (("detguard-n-hard", "--format", "pt"), "detguard-n-hard is an ensemble of 3 experts"),
        (("detguard-n", "--photos", "nowhere"), "nowhere: no such file or folder"),
        (("detguard-n", "--iou", "nan"), "'--iou'"),
        (("detguard-n", "--imgsz", "8"), "'--imgsz'"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_no_file(run, arguments, message):
    code, shown = run(*arguments)
    assert code == 2
    assert message in shown
    assert shown.startswith("error: ")
    assert not list(Path().iterdir())


def test_a_checkpoint_is_not_written_over_the_one_that_it_is_made_of(run, bus_file):
    assert run("detguard-n", "--format", "pt", "--imgsz", 64, "--photos", bus_file)[0] == 0
    before = Path("detguard-n.pt").read_bytes()
    code, shown = run("detguard-n.pt", "--format", "pt")
    assert code == 2
    assert "--out detguard-n.pt: would be written over the model itself" in shown
    assert Path("detguard-n.pt").read_bytes() == before


def test_no_other_checkpoint_is_written_over_unless_it_is_named(run, bus_file):
    Path("detguard-n.pt").write_text("mine")
    options = ("detguard-n", "--format", "pt", "--imgsz", 64, "--photos", bus_file)
    assert run(*options) == (
        2,
        "error: detguard-n.pt: is there already, and may be another model; say by --out where to write\n",
    )
    assert Path("detguard-n.pt").read_text() == "mine"
    assert run(*options, "--out", "detguard-n.pt")[0] == 0
    assert Path("detguard-n.pt").stat().st_size > 1000


def test_a_folder_that_cannot_be_written_is_one_line(run, bus_file):
    Path("taken").write_text("")
    code, shown = run("detguard-n", "--imgsz", 64, "--photos", bus_file, "--out", "taken/x.onnx")
    assert code == 2
    assert "taken/x.onnx: cannot be written" in shown


def test_top_k_is_told_to_cost_as_much(run, bus_file):
    code, shown = run("detguard-n-hard", "--format", "torchscript", "--top-k", 1, "--imgsz", 64, "--photos", bus_file)
    assert code == 0
    assert "all experts are computed in the file" in shown


def test_what_is_exported_is_not_changed(run, bus_file):
    before = load_detector().state_hash()
    run("detguard-n", "--format", "pt", "--imgsz", 64, "--photos", bus_file)
    assert load_detector().state_hash() == before
    assert load_detector("detguard-n.pt").state_hash() == before
