"""What the pages for users say is true: their links, their commands, their code."""

import ast
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import typer

import detguard
from detguard import DetguardError
from detguard.cli.app import app
from detguard.detections import Candidates, Detections
from detguard.detectors.contract import check_contract
from detguard.objectives.base import Scene
from detguard.objectives.parse import GOALS
from detguard.transforms.parse import KINDS, parse_transforms, written

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")])


def blocks(page, language):
    """The code of one language in a page."""
    return [dedent(found) for found in re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.M | re.S)]


# One test, as processes of pytest-xdist share no fixture, and a build takes most of it.
def test_the_site_builds_strictly_and_is_whole_and_loads_nothing_from_elsewhere(tmp_path):
    """Strict: a link, an anchor or an argument that is not there fails it, and so does a cell that raises."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    run = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "jpeg:75 True 0." in re.sub("<[^>]+>", "", (tmp_path / "quick_start/index.html").read_text())
    assert "--keep-others" in (tmp_path / "reference/cli/index.html").read_text()
    python = (tmp_path / "reference/python/index.html").read_text()
    assert [name for name in detguard.__all__ if f'id="detguard.{name}"' not in python] == []
    loaded = r"<(?:script|img)[^>]+src=.?https?:|<link[^>]+rel=.?stylesheet[^>]+href=.?https?:"
    assert [page for page in tmp_path.rglob("*.html") if re.search(loaded, page.read_text())] == []


def test_imports_point_one_way():
    order = re.search(r"`cli -> .*?`", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    layers = [re.findall(r"\w+", layer) for layer in order[0].split("->")]
    height = {package: len(layers) - number for number, layer in enumerate(layers) for package in layer}
    imported = [
        (file.relative_to(ROOT), node.module)
        for file in (ROOT / "detguard").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("detguard.")
    ]
    assert len(imported) > 100
    for file, module in imported:
        place = file.with_suffix("").parts[1]
        assert height.get(place, len(layers)) >= height.get(module.split(".")[1], 0), f"{file} imports {module}"


def test_what_is_promised_has_tests():
    named = re.findall(r"`([a-z_/]+\.py)::(test_\w+)`", (ROOT / "docs/promises.md").read_text())
    assert len(named) > 20
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert missing == []


def commands():
    for page in PAGES:
        lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
        prose = re.sub("```.*?```", "", page.read_text(), flags=re.S)
        lines += [" ".join(found.split()) for found in re.findall("`(detguard [a-z-]+ [^`]+)`", prose)]
        for line in lines:
            words = shlex.split(line, comments=True)
            if "detguard" in words and "..." not in words:
                yield pytest.param(words[words.index("detguard") + 1 :], id=f"{page.name}: {line.strip()[:60]}")


@pytest.mark.parametrize("words", commands())
def test_commands_of_the_pages_are_understood(words):
    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(typer.Context(group), words)
    command.make_context(name, rest)


def test_no_page_or_help_takes_the_stage_of_hard_photos_alone_for_the_ensemble():
    texts = (
        [page.read_text() for page in PAGES]
        + [
            str(command.epilog) + str(command.callback.__doc__)
            for command in typer.main.get_group(app).commands.values()
        ]
        + [str(detguard.adapt.__doc__)]
    )
    assert [text for text in texts if re.search(r"(--model|export|adapt\() ?\"?hard\.safetensors", text)] == []


def test_what_is_exported_has_the_nms_that_the_snippet_of_the_page_needs():
    page = ROOT / "docs/deploying.md"
    (command,) = [line for block in blocks(page, "sh") for line in block.splitlines() if "detguard export" in line]
    assert "--nms" in command
    assert any("for x1, y1, x2, y2, confidence, number in" in code for code in blocks(page, "python"))


def test_the_python_of_the_readme_runs(bus_file, tmp_path, monkeypatch, capsys):
    (code,) = blocks(ROOT / "README.md", "python")
    shutil.copy(bus_file, tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.split() == ["True", "True", "(1080,", "810,", "3)"]


@pytest.fixture
def own(request, tmp_path, monkeypatch):
    """What the code of a how-to defines, by name, and its file in the working folder."""
    (code,) = blocks(ROOT / "docs" / request.param[0], "python")
    (tmp_path / request.param[1]).write_text(code)
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(request.param[1])


@pytest.mark.parametrize("own", [("own_detector.md", "my_detector.py")], indirect=True)
def test_the_detector_of_the_how_to_keeps_all_promises(own, bus):
    detector = detguard.load_detector("my_detector:make", trust=True)
    assert [promise for promise in check_contract(detector, bus) if promise.state == "BROKEN"] == []


@pytest.mark.parametrize("own", [("adding_a_transform.md", "solarize.py")], indirect=True)
def test_the_transform_of_the_how_to_is_one(own, bus, monkeypatch):
    with pytest.raises(DetguardError, match=r"solarize:64.*KINDS"):
        written([own["Solarize"](64)])
    monkeypatch.setitem(KINDS, "solarize", own["Solarize"])
    assert written([own["Solarize"](64), *parse_transforms("solarize:2..8")]) == "solarize:64,solarize:2..8"
    (solarize,) = parse_transforms("solarize:128")
    assert str(solarize) == "solarize:128"
    assert not solarize.straight  # or its pull_back would not be asked by default
    assert solarize(bus).max() == 127
    back = solarize.pull_back(bus, torch.ones(3, *bus.shape[:2]))
    assert torch.equal(back < 0, torch.from_numpy(bus >= 128).permute(2, 0, 1))


@pytest.mark.parametrize("own", [("adding_an_objective.md", "shrink.py")], indirect=True)
def test_the_objective_of_the_how_to_lowers_what_it_judges(own, bundled, bus, monkeypatch):
    def found(side):
        return Detections(torch.tensor([[0.0, 0, side, side]]), torch.tensor([0.9]), torch.tensor([0]))

    shrink = own["Shrink"]((0,))
    assert not shrink.success(found(40.0), found(38.0))
    assert shrink.success(found(40.0), found(20.0))
    boxes = torch.tensor([[[0.0, 0, 38, 38]]]).requires_grad_()
    aims = [Scene(found(40.0), found(40.0)[[]])]
    shrink.loss(Candidates(torch.full((1, 1, 2), 3.0), boxes), aims, 0.25).sum().backward()
    assert (boxes.grad[0, 0, 2:] > 0).all()
    # With its line in the registry, runs know it, too.
    monkeypatch.setitem(GOALS, "shrink", own["Shrink"])
    (result,) = detguard.attack(bundled, bus, objective=own["Shrink"](), transforms="none", steps=1)
    with pytest.raises(detguard.DetguardError, match=r"share=0.5.*needs words of its own"):
        detguard.attack(bundled, bus, objective=own["Shrink"](share=0.5))
    assert result.status in ("fooled", "failed")


def test_the_citation_names_the_version():
    assert f"\nversion: {detguard.__version__}\n" in (ROOT / "CITATION.cff").read_text()
