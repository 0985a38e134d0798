import json
import sys

import cv2
import pytest
import torch
from safetensors.torch import load_file, save_file

from detguard import DetguardError
from detguard.cli import main
from detguard.detectors import huggingface
from detguard.detectors.contract import check_contract
from detguard.detectors.huggingface import ARCHITECTURES, HuggingFace
from detguard.detectors.load import detector_config, load_configured, load_detector
from detguard.evaluation.attacks import attack_objective
from detguard.objectives import Outrank, Vanish
from detguard.photos import frames_tensor

transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")

NAMES = {0: "N/A", 1: "person", 2: "N/A", 3: "bus"}
WIDTHS, SIZE = [8, 8, 16, 16], 160
RESNET = {"embedding_size": 8, "hidden_sizes": WIDTHS, "depths": [1, 1, 1, 1], "layer_type": "basic"}
ENCODER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 12,
}  # fmt: skip
HYBRID = ENCODER | {
    "encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16], "decoder_in_channels": [32, 32, 32],
    "decoder_n_points": 2, "num_denoising": 0,
}  # fmt: skip


def backbone(kind):
    if kind == "d_fine":
        return transformers.HGNetV2Config(
            stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 8, 16], stage_mid_channels=[8, 8, 8, 8],
            stage_out_channels=WIDTHS, stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1],
            hidden_sizes=WIDTHS, depths=[1, 1, 1, 1], embedding_size=8, out_indices=[2, 3, 4],
        )  # fmt: skip
    if kind.startswith("rt_detr"):
        return transformers.RTDetrResNetConfig(**RESNET, out_indices=[2, 3, 4])
    stages = ["stage2", "stage3", "stage4"] if kind == "deformable_detr" else ["stage4"]
    return transformers.ResNetConfig(**RESNET, out_features=stages)


def settings(kind):
    if kind == "yolos":
        return {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
            "image_size": [96, 128], "num_detection_tokens": 12,
        }  # fmt: skip
    if kind in ("rt_detr", "rt_detr_v2", "d_fine"):
        return HYBRID | {"backbone_config": backbone(kind)}
    return ENCODER | {"backbone_config": backbone(kind)}


def write(folder, kind, photo):
    """Random weights of a tiny network, so large that what it says of a photo varies as of a trained one."""
    torch.manual_seed(1)
    known = ARCHITECTURES[kind]
    network = getattr(transformers, known.network)(getattr(transformers, known.config)(**settings(kind), id2label=NAMES))
    fixed = known.processor == "RTDetrImageProcessor"
    size = {"height": SIZE, "width": SIZE} if fixed else {"shortest_edge": 96, "longest_edge": SIZE}
    processor = getattr(transformers, known.processor)(size=size)
    inputs = processor(images=[photo, photo[::-1].copy()], return_tensors="pt")
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "detection_tokens" in name or "query" in name or "position_emb" in name:
                value.normal_()
            elif value.ndim == 4:
                torch.nn.init.kaiming_normal_(value).mul_(0.7)
            elif value.ndim == 2:
                torch.nn.init.xavier_uniform_(value).mul_(0.3 if len(value) == 4 else 1)
        width = len(NAMES) + known.softmax
        named = network.eval().named_modules()
        last = [m for name, m in named if getattr(m, "out_features", 0) == width and "enc_score" not in name]
        for layer in last:
            layer.bias.zero_()
        logits = network(**inputs).logits
        scale = 1.5 / logits.std(1).mean()
        for layer in last:
            layer.weight *= scale
            layer.bias -= logits.mean((0, 1)) * scale
            layer.bias[[0, 2]] = -30.0  # as a trained one says of classes that there are not
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(bus):
    return cv2.resize(bus, (150, 200), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, photo):
    root, made = tmp_path_factory.mktemp("hub"), {}

    def folder(kind):
        if kind not in made:
            made[kind] = write(root / kind, kind, photo)
        return made[kind]

    return folder


@pytest.fixture(scope="module", params=ARCHITECTURES)
def untrained(request, folders):
    return load_detector(folders(request.param))


def between(detector, photo, rank=4):
    """A confidence over which so many are found."""
    return detector.detect([photo], conf=1e-6)[0].scores[rank - 1 : rank + 1].mean().item()


def test_it_keeps_what_every_detector_promises(untrained, photo):
    conf = between(untrained, photo)
    assert {p.name: p.wrong for p in check_contract(untrained, photo, conf) if p.wrong} == {}
    assert untrained.class_names == {0: "person", 1: "bus"}
    assert len(untrained.predict(photo, conf)) == 4
