import json

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import strategies as st
from mutations import mutated, odd_tree

from detguard.data.dataset import read_dataset

NAMES = ["a", "b"]
CONFIGS = [
    {"path": ".", "train": "images/val", "val": "images/val", "names": {0: "person", 1: "dog"}, "nc": 2},
    {"val": ["images/val", "val.txt"], "names": ["cat", "dog"], "download": "https://example.com/x.zip"},
    {"val": "images/val", "annotations": {"val": "x.json"}, "names": ["cat"], "ultralytics": "coco8.yaml"},
]
COCO = {
    "images": [{"id": i, "file_name": f"{n}.png", "width": 16, "height": 12} for i, n in enumerate(NAMES)],
    "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    "annotations": [
        {"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
        {"id": 1, "image_id": 1, "category_id": 18, "bbox": [0.5, 2, 3, 40], "area": 12.5, "iscrowd": 1},
    ],
}
LABELS = [b"0 .5 .5 .2 .2\n1 0.25 0.5 0.125 0.1\n", b"0 .1 .1 .5 .1 .5 .5 .1 .5\n", b"", b"1 5e-1 .5 1 1"]
TEXT_TOKENS = [
    b"nan",
    b"inf",
    b"1e999",
    b"-",
    b"\n",
    b" ",
    b"9" * 400,
    b"0x1",
    b"1_0",
    "٣".encode(),
    b"\r",
    b"\xe2\x80\xa8",
]
YAML_TOKENS = [
    b"!!int ", b"!!float x", b"!!timestamp ", b"!!python/name:os.system ", b"&a ", b"*a", b"<<: ", b": ", b"- ", b"? ",
    b"| ", b"2001-99-99", b"1:60", b"0b", b"0x", b".inf", b".nan", b"~", b"yes", b"[", b"{", b"]", b"}", b"'", b'"',
    b"#", b"%YAML 9", b"---\n", b"...", b"\t", b"[" * 500, b"images/val", b"../", b"a" * 300, b"names: ", b"val: ",
    b"path: ", b"\xef\xbb\xbf",
]  # fmt: skip
JSON_TOKENS = [
    b"NaN",
    b"Infinity",
    b"9" * 400,
    b"[" * 2000,
    b"{",
    b"}",
    b"]",
    b'"',
    b",",
    b":",
    b"null",
    b"true",
    b"\\ud800",
    b"1e999",
]


@pytest.fixture
def folder(tmp_path):
    """A data set in YOLO's form and in COCO's."""
    for part in ("images/val", "labels/val"):
        (tmp_path / part).mkdir(parents=True)
    for name in NAMES:
        cv2.imwrite(str(tmp_path / f"images/val/{name}.png"), np.zeros((12, 16, 3), np.uint8))
        (tmp_path / f"labels/val/{name}.txt").write_bytes(LABELS[0])
    (tmp_path / "val.txt").write_text("images/val/a.png\n")
    (tmp_path / "x.json").write_text(json.dumps(COCO))
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(CONFIGS[0]))
    return tmp_path


def as_yaml(tree):
    return yaml.safe_dump(tree, allow_unicode=True).encode(errors="surrogatepass")


def test_data_yaml(folder, fuzz):
    def read(data):
        (folder / "data.yaml").write_bytes(data)
        dataset = read_dataset(folder / "data.yaml")
        dataset.category_ids({0: "dog", 1: "cat"})

    trees = st.one_of([odd_tree(config).map(as_yaml) for config in CONFIGS])
    fuzz(trees | mutated([as_yaml(config) for config in CONFIGS], YAML_TOKENS), read)


def test_yolo_labels(folder, fuzz):
    def read(data):
        (folder / "labels/val/a.txt").write_bytes(data)
        read_dataset(folder / "data.yaml").objects(1, {0: 1})

    fuzz(mutated(LABELS, TEXT_TOKENS), read)


def test_lists_of_photos(folder, fuzz):
    (folder / "data.yaml").write_bytes(as_yaml(CONFIGS[1]))

    def read(data):
        (folder / "val.txt").write_bytes(data)
        read_dataset(folder / "data.yaml")

    tokens = [
        b"\n",
        b"\0",
        b"../",
        b"images/",
        b"a" * 300,
        b"b/" * 3000,
        b"\xff",
        b"\r",
        b" ",
        b"~",
        b"images/val/b.png\n",
    ]
    fuzz(mutated([b"images/val/a.png\n./images/val/b.png\n"], tokens), read)


def test_coco_json(folder, fuzz):
    def read(data):
        (folder / "x.json").write_bytes(data)
        dataset = read_dataset(folder / "x.json", images=folder / "images/val")
        for image in dataset.files:
            dataset.objects(image, {0: 1})

    trees = odd_tree(COCO).map(lambda tree: json.dumps(tree).encode())
    fuzz(trees | mutated([json.dumps(COCO).encode()], JSON_TOKENS), read)
