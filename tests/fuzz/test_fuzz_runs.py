"""Run folders that others made: their config.yaml and results.jsonl, as far as a resumed run uses them."""

import json
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import strategies as st
from mutations import mutated, odd_tree

from detguard.attacks.group import AttackOptions
from detguard.attacks.run import plan_attack
from detguard.hardening.adapt import Adaptation
from detguard.hardening.judging import Judgement
from detguard.hardening.monitor import Monitor
from detguard.hardening.run import Plan
from detguard.reports.adaptation import adaptation_page
from detguard.reports.attack_tables import attack_summary, survival_table
from detguard.reports.hardening import hardening_page
from detguard.reports.monitoring import monitor_page, timeline_table, windows
from detguard.runs import Run
from detguard.workflows.evaluate import plan as plan_evaluation

DETECTOR = {
    "model": "detguard-n", "imgsz": 320, "end_to_end": False, "top_k": None, "fusion": None, "iou": 0.7, "sha256": "0",
}  # fmt: skip
CONFIGS = {
    "attack": {
        "detector": DETECTOR, "also": [DETECTOR], "samples": True,
        "goal": "vanish", "target": "person", "to": None, "strict": False, "object": [1, 2],
        "box": [0, 0, 9.5, 9], "keep_others": True, "loss": "logit", "count": None, "transforms": "median:3,jpeg:75",
        "attack": {
            "norm": "linf", "rule": "apgd", "mask": "inside", "smallest": True, "black_box": False, "queries": 5000,
            "conf": 0.25, "eps": 4, "step": None, "steps": 9, "aggregate": "weighted", "weights": [1, 1, 2],
            "schedule": "worst",
            "gradient": "exact", "momentum": 0.0, "random_start": True, "margin": 0.05, "seed": 0, "batch": 1,
        },
        "photos": ["a.jpg"],
    },
    "evaluate": {
        "detectors": [DETECTOR],
        "data": {
            "source": "a.json", "split": "val", "images": None, "classes": ["person"], "limit": 4,
            "class_map": {"a": "b"},
        },
        "evaluate": {
            "protocols": ["clean"], "severities": [1], "eps": [4], "steps": 2, "restarts": 1, "attacks": ["class"],
            "queries": 9, "seed": 0, "patch": None, "patch_target": "person", "patch_size": 0.3, "universal": None,
            "corruptions": ["fog"], "corruption_file": None, "save_images": False,
        },
    },
    "harden": {
        "model": "detguard-n", "detectors": [DETECTOR, DETECTOR],
        "harden": {
            "recipe": "gated", "learn": "both", "pretrain": True, "mode": "full", "split": "neck",
            "photos": 100, "hours": 2.5, "crop": 64, "attack": "free", "eps": 4.0, "steps": 2, "mix": 0.2, "top_k": 2,
            "fusion": "average:0.5", "sparse": 0.2, "batch": 32, "rate": 0.003, "seed": 3,
            "tune_normal": False, "transforms": "none",
        },
        "corruptions": ["fog"], "photos": ["a.jpg"], "pretrain": ["b.jpg"], "samples": [],
    },
    "adapt": {
        "model": "a.safetensors", "detector": DETECTOR, "data": {"new": ["a"], "replay": ["b"], "split": "train"},
        "adapt": {
            "experts": 1, "expert": "head", "mode": "full", "init": "best", "keep": 1.0, "photos": 90, "batch": 8,
            "rate": 0.001, "seed": 0, "eps": 4.0,
        },
        "why": "so", "corruptions": ["fog"], "replayed": ["a.jpg"],
    },
    "monitor": {
        "detector": DETECTOR,
        "stream": {"source": "-", "split": "val", "images": None, "class_map": {}, "every": 1, "frames": 9},
        "monitor": {"detector": "adwin", "window": 8}, "on_drift": "tell", "replay": [],
        "living": {"gather": 4, "keep": 8, "adapt": []},
    },
}  # fmt: skip
FOUND = {"class": "person", "confidence": 0.9, "box": [1.0, 2.0, 30.0, 40.0]}
LEVELS = ("0.05", "0.1", "0.25", "0.5")
MEMBER = {
    "fooled": True,
    "confidence": 0.0,
    "success": dict.fromkeys(LEVELS, True),
    "objects_not_kept": {level: [1, 2] for level in LEVELS},
    "detections": [FOUND | {"wrong": True}],
}
RECORDS = {
    "attack": {
        "key": "a", "photo": "a.jpg", "status": "fooled", "iterations": 3, "queries": 12, "difference": 4,
        "used": 4.0, "eps": 4.0, "draws": {"rotate:1..2": "rotate:1"}, "also": {"other": {"photo": MEMBER}},
        "psnr": 40.0, "ssim": 0.9,
        "objects": [FOUND | {"outcome": "vanished"}], "clean": [FOUND],
        "members": {"photo": MEMBER, "median:3": MEMBER}, "files": {"photo": "adversarial/a.png"}, "seconds": 1.0,
    },
    "harden": {"stage": "joint", "batch": 20, "photos_per_second": 3.0, "loss": 1.0, "gate hard 0": 0.5, "hard": 2.0},
    "adapt": {"stage": "adapt", "batch": 20, "photos_per_second": 3.0, "loss": 1.0, "new": 0.5, "gate": 2.0},
    "monitor": {
        "number": 1, "photo": "a.jpg", "objects": [FOUND], "f1": 0.5, "confidence": 0.5, "entropy": 0.1, "began": 1,
        "classes": ["person"], "AP50": 0.5,
    },
}  # fmt: skip
TOKENS = [
    b"NaN",
    b"9" * 400,
    b"[" * 2000,
    b"{",
    b"}",
    b"\n",
    b"\\ud800",
    b"\xff",
    b"null",
    b"&a ",
    b"*a",
    b"!!int ",
    b": ",
    b"- ",
]
COMMON = {"arguments": ["a"], "versions": {"detguard": "1"}}


def plan(run, detector):
    """What a resumed run makes of its config before it does anything."""
    config = run.config
    {
        "attack": lambda: plan_attack(config, [detector]),
        "evaluate": lambda: plan_evaluation(config["evaluate"], len(config["detectors"])),
        "harden": lambda: Plan(**config["harden"]).stages(),
        "adapt": lambda: (Adaptation(**config["adapt"]).number, Adaptation(**config["adapt"]).adversary),
        "monitor": lambda: Monitor(config["monitor"]["detector"], config["monitor"]["window"]),
    }[config["command"]]()


def use(run, detector):
    """What a resumed run makes of its records."""
    records = run.records()
    if run.config["command"] == "attack":
        attacked = [r for r in records if r["status"] in ("fooled", "failed")]
        survival_table(attacked, "", 0.25)
        attack_summary(records, AttackOptions.from_config(run.config["attack"]), run.config)
    elif run.config["command"] == "harden":
        hardening_page(run, Judgement())
    elif run.config["command"] == "adapt":
        adaptation_page(run, Judgement(), {})
    else:
        timeline_table(windows(records, 8))
        monitor_page(run, records, [])


def test_configs_of_runs(fuzz, tmp_path, bundled_classes):
    valid = {command: {"command": command, **config, **COMMON} for command, config in CONFIGS.items()}
    file = tmp_path / "config.yaml"

    def read(of):
        command, config = of
        file.write_bytes(config if isinstance(config, bytes) else yaml.safe_dump(config).encode())
        plan(Run.open(tmp_path, command), bundled_classes)

    for of in valid.items():
        read(of)
    fuzz(
        st.one_of(
            st.tuples(st.just(command), odd_tree(config) | mutated([yaml.safe_dump(config).encode()], TOKENS))
            for command, config in valid.items()
        ),
        read,
    )


def test_records_of_runs(fuzz, tmp_path, bundled_classes):
    valid = {command: json.dumps(record).encode() + b"\n" for command, record in RECORDS.items()}

    def read(of):
        command, record = of
        odd = record if isinstance(record, bytes) else json.dumps(record).encode() + b"\n"
        (tmp_path / "results.jsonl").write_bytes(valid[command] + odd)
        use(Run(tmp_path, {"command": command, **CONFIGS[command], **COMMON}), bundled_classes)

    for of in valid.items():
        read(of)
    fuzz(
        st.one_of(
            st.tuples(st.just(command), odd_tree(record) | mutated([valid[command] * 3], TOKENS))
            for command, record in RECORDS.items()
        ),
        read,
    )


@pytest.fixture(scope="module")
def bundled_classes():
    """All that planning an attack asks of a detector."""
    from detguard.detectors.load import load_detector

    detector = load_detector()
    asked = ("class_index", "class_names", "name", "differentiable", "nms_inside")
    return SimpleNamespace(**{name: getattr(detector, name) for name in asked})
