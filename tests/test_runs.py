from pathlib import Path

import pytest

from detguard.runs import Run, RunError, photo_keys


@pytest.fixture
def run(tmp_path):
    return Run.create("attack", tmp_path / "run", {"seed": 3})


def test_records_are_read_back_in_order(run):
    for key in ("a", "é"):
        run.append({"key": key})
    assert [r["key"] for r in run.records()] == ["a", "é"]


def test_a_last_line_that_a_kill_cut_short_is_left_out(run):
    run.append({"key": "a"})
    with (run.folder / "results.jsonl").open("ab") as stream:
        stream.write(b'{"key": "b"')
    assert run.records() == [{"key": "a"}]


def test_a_damaged_line_is_an_error_with_its_number(run):
    (run.folder / "results.jsonl").write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(RunError, match=r"results\.jsonl:2"):
        run.records()


@pytest.mark.parametrize("name", ["../elsewhere.png", "/etc/passwd", "adversarial/../../x"])
def test_names_in_records_cannot_lead_out_of_the_run(run, name):
    with pytest.raises(RunError, match="leads out"):
        run.path(name)


def test_a_run_opens_as_what_it_is(run):
    assert Run.open(run.folder, "attack").config["seed"] == 3
    with pytest.raises(RunError, match="not a run of 'detguard verify'"):
        Run.open(run.folder, "verify")


def test_a_config_cannot_run_code(run, tmp_path):
    proof = tmp_path / "ran"
    (run.folder / "config.yaml").write_text(f"!!python/object/apply:os.system ['touch {proof}']")
    with pytest.raises(RunError):
        Run.open(run.folder, "attack")
    assert not proof.exists()


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [Run.create("detect", None, {}).folder for _ in range(2)]
    assert [f.as_posix() for f in folders] == ["runs/detect/001", "runs/detect/002"]


def test_photos_of_one_stem_get_keys_of_their_own():
    files = [Path("a/x.jpg"), Path("b/x.jpg"), Path("x.png"), Path("x-2.jpg")]
    keys = photo_keys(files)
    assert len(keys) == 4
    assert list(keys.values()) == files
