import json

import yaml
from hypothesis import strategies as st
from mutations import mutated, odd_tree

from detguard.runs import Run

CONFIG = {
    "command": "monitor",
    "detector": {"model": "detguard-n", "imgsz": 320, "end_to_end": False, "sha256": "0" * 64},
    "stream": {"source": "-", "split": "val", "images": None},
    "monitor": {"detector": "adwin", "window": 32},
    "on_drift": "tell",
    "replay": [],
    "arguments": [],
    "versions": {"detguard": "0.1.0"},
}
RECORD = {
    "number": 1,
    "photo": "a.jpg",
    "objects": [{"class": "bus", "confidence": 1.0, "box": [1, 2, 30, 40]}],
    "f1": 0.5,
    "confidence": 0.5,
    "entropy": None,
    "began": None,
}
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


def test_run_records(tmp_path, fuzz):
    config, records = tmp_path / "config.yaml", tmp_path / "results.jsonl"

    def read(files):
        config.write_bytes(files[0])
        records.write_bytes(files[1])
        run = Run.open(tmp_path, "monitor")
        run.keep(run.records())

    whole, line = yaml.safe_dump(CONFIG).encode(), json.dumps(RECORD).encode() + b"\n"
    configs = mutated([whole], TOKENS) | odd_tree(CONFIG).map(
        lambda tree: yaml.safe_dump(tree).encode(errors="replace")
    )
    lines = mutated([line * 3, b""], TOKENS) | odd_tree(RECORD).map(
        lambda tree: json.dumps(tree).encode() + b"\n" + line
    )
    fuzz(st.tuples(configs, st.just(line)) | st.tuples(st.just(whole), lines), read)
