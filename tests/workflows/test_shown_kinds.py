"""Kinds of corruptions that are asked for are those that hard frames show."""

import json

import pytest

from detguard.detectors.gated import EXPERTS, GatedNetwork
from detguard.detectors.load import save_gated
from detguard.hardening import adapt
from detguard.photos import encode_png
from detguard.ranks import ALONE
from detguard.workflows.adapt import Adapting
from detguard.workflows.harden import Hardening


@pytest.mark.parametrize("asked", [["fog"], ["snow", "fog"]])
def test_hardening_shows_the_kinds_that_were_asked_for(tiny_data, tmp_path, asked):
    options = {"imgsz": 64, "corruptions": asked, "out": tmp_path / "run"}
    job = Hardening.begin("detguard-n", [str(tiny_data.parent / "images")], {}, ALONE, **options)
    job.load(1)
    assert sorted(job.setting.corruptions) == sorted(asked)


def test_adapting_shows_the_kinds_that_were_asked_for_or_those_of_hardening(bundled, bus, tmp_path, monkeypatch):
    card = {"architecture": "yolo11n.yaml", "classes": list(bundled.class_names.values()), "imgsz": 64}
    card["hardened"] = {"eps": 2.0, "corruptions": ["frost"]}
    model = tmp_path / "ensemble.safetensors"
    save_gated(GatedNetwork(bundled.model, 22, EXPERTS), card, model)
    for name in ("new", "old"):
        lines = []
        for number in range(6):
            (tmp_path / f"{name}{number}.png").write_bytes(encode_png(bus[::8, ::8]))
            lines.append(
                {"photo": str(tmp_path / f"{name}{number}.png"), "objects": [{"class": "bus", "box": [1, 1, 50, 50]}]}
            )
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = adapt.batches
    for number, (asked, shown) in enumerate([(["fog"], ("fog",)), (None, ("frost",))]):
        options = {"replay": [str(tmp_path / "old.jsonl")], "corruptions": asked, "out": tmp_path / str(number)}
        job = Adapting.begin(
            str(model), [str(tmp_path / "new.jsonl")], {"photos": 8, "mode": "frozen"}, ALONE, **options
        )
        job.load(1)
        assert job.setting.corruptions == shown
        drawn = []

        def batches(*given, kinds=None, drawn=drawn, **options):
            if kinds is None:  # of new photos
                return made(*given, **options)
            drawn.append(kinds)
            raise KeyboardInterrupt

        monkeypatch.setattr("detguard.hardening.adapt.batches", batches)
        with pytest.raises(KeyboardInterrupt):
            job.train()
        assert drawn == [shown]
