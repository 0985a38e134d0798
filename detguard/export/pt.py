"""Ultralytics' own checkpoints, which `YOLO(file)` predicts, validates, trains and exports."""

import copy
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override
from ultralytics import __version__ as ultralytics_version
from ultralytics.models import YOLO
from ultralytics.nn.modules.block import RepVGGDW
from ultralytics.nn.modules.conv import Conv, ConvTranspose, RepConv
from ultralytics.nn.modules.head import Detect

from detguard import DetguardError
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import build_model
from detguard.detectors.sparse import output_statistics
from detguard.export.base import Deployment, Format, Runtime
from detguard.files import write_file


class Checkpoint(Format):
    """A .pt as Ultralytics' trainer leaves it; run by `YOLO(file)`."""

    suffix = ".pt"

    @override
    def write(self, wanted: Deployment, file: Path) -> None:
        network: Any = wanted.network
        if isinstance(network, GatedNetwork):
            network = unfused(network, wanted.architecture, wanted.frames)
        network = copy.deepcopy(network).float().to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
        network.args = {"task": "detect", "imgsz": wanted.detector.imgsz, "model": f"{wanted.detector.name}.pt"}
        checkpoint = {
            "epoch": -1,
            "best_fitness": None,
            "model": network,
            "ema": None,
            "updates": None,
            "optimizer": None,
            "train_args": network.args,
            "date": datetime.now(UTC).isoformat(),
            "version": ultralytics_version,
            "license": "AGPL-3.0-or-later",
        }
        written = io.BytesIO()
        torch.save(checkpoint, written)
        write_file(file, written.getvalue())

    @override
    def read(self, file: Path) -> Runtime:
        network: Any = YOLO(str(file), task="detect").model
        network.end2end = False  # as predict() has it
        network = network.fuse(verbose=False).eval()

        def run(frames: Tensor) -> Tensor:
            with torch.no_grad():
                return network(frames)[0]

        return run


def unfused(hardened: GatedNetwork, architecture: str, frames: Sequence[Tensor]) -> nn.Module:
    """The detection model of a hardened network of one expert, with batch norms that compute nothing at first.

    Hardening folds batch norms into the convolutions. Each gets one again with the statistics of what its convolution
    makes of `frames`, and with the weight and bias that undo them: in training, where batches are normalized by their
    own statistics, it begins as what it was.

    architecture: of which Ultralytics' yaml; frames: float32 [B, 3, H, W] each, of photos.

    Raises:
        DetguardError: there are several experts, or a part of the architecture is not there any more.
    """
    if hardened.sparse:
        raise DetguardError(
            "`format` pt: Ultralytics has no layers of mean sparsity; give weights/adversarial.safetensors of the same "
            "run, harden with `sparse` 0, or use onnx"
        )
    model: Any = build_model(architecture, list(hardened.class_names.values()))
    if getattr(model.model[-1], "one2one_cv2", None) is not None:
        # Its head without NMS went when it was hardened.
        if type(model.model[-1]) is not Detect:
            raise DetguardError(f"`format` pt: {architecture} has a second head, which hardening drops; use onnx")
        model = type(model)(model.yaml | {"end2end": False}, nc=len(hardened.class_names), verbose=False)
    model.names, model.task = hardened.class_names, "detect"
    layers = nn.ModuleList(hardened.single().model)
    statistics = output_statistics(hardened, layers, frames)
    tensors, state = layers.state_dict(), model.model.state_dict()
    for name, module in model.model.named_modules():
        if not isinstance(module, Conv | ConvTranspose):
            continue
        inner = "conv_transpose" if isinstance(module, ConvTranspose) else "conv"
        source = _source(model.model, name, inner)
        if source is None:
            state[f"{name}.{inner}.weight"].zero_()
            continue
        norm: Any = module.bn
        mean, variance = statistics[source]
        state[f"{name}.{inner}.weight"] = tensors.pop(f"{source}.weight")
        state[f"{name}.bn.running_mean"] = mean - tensors.pop(f"{source}.bias")
        state[f"{name}.bn.running_var"] = variance
        state[f"{name}.bn.weight"] = (variance + norm.eps).sqrt()
        state[f"{name}.bn.bias"] = mean
    model.model.load_state_dict(state | tensors)
    return model


def _source(model: nn.Module, name: str, inner: str) -> str | None:
    """The name of the convolution that was folded from a layer and its batch norm; None: into its neighbour's."""
    parent, _, own = name.rpartition(".")
    above = model.get_submodule(parent)
    if isinstance(above, RepConv):  # conv1 of 3 x 3 and conv2 of 1 x 1 became conv
        return f"{parent}.conv" if own == "conv1" else None
    if isinstance(above, RepVGGDW):  # conv of 7 x 7 and conv1 of 3 x 3
        return f"{parent}.conv" if own == "conv" else None
    return f"{name}.{inner}"
