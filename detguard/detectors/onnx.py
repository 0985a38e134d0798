"""ONNX files of Ultralytics' exports, and of detguard's own: detectors that only predict, run by ONNX Runtime.

What such a file says is data: it is parsed, what could read other files or never end is refused, and what it tells of
itself is checked. Predictions are those of `YOLO(file).predict`; candidates come from the same graph.
"""

import ast
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override
from ultralytics.models.yolo.model import YOLO
from ultralytics.utils.ops import xywh2xyxy

from detguard import DetguardError, first_line
from detguard.detections import MAX_DETECTIONS, Candidates, Detections
from detguard.detectors.base import Detector, Family, to_photo
from detguard.detectors.pickles import Damaged
from detguard.detectors.recipe import MOST_CLASSES, class_names, frame_size
from detguard.files import read_file
from detguard.photos import Letterbox, Source, as_photo

if TYPE_CHECKING:
    import onnx

# A protobuf holds no more.
MAX_BYTES = 2 << 30
PACKAGES = ("onnx", "onnxruntime")
# What is kept of what a file says about itself, and how long a text of it may be.
KEPT = ("names", "imgsz", "stride", "task", "end2end", "args", "head")
MAX_METADATA = 1 << 20
STRIDES = (8, 16, 32, 64, 128)
DTYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# Of a probability, so that its logit is finite and gives it back.
LEAST = 1e-12


@dataclass(frozen=True)
class Metadata:
    """What a file says about itself. imgsz: side of a square frame, px; listed: whether its output is detections."""

    names: dict[int, str]
    imgsz: int
    stride: int
    listed: bool
    nms: tuple[float, float] | None = None


class OnnxNetwork(nn.Module):
    """The graph of a file, checked, as bytes for ONNX Runtime; sha256: of the file."""

    def __init__(self, graph: bytes, metadata: Metadata, sha256: str) -> None:
        super().__init__()
        self.graph, self.metadata, self.sha256 = graph, metadata, sha256


class OnnxDetector(Detector):
    """A graph from frames, [B, 3, H, W], to [B, 4 + C, N], xywh and probabilities, or to [B, N, 6], detections.

    Raises:
        DetguardError: ONNX Runtime cannot run it here, or it gives something else.
    """

    differentiable = False
    model: OnnxNetwork

    def __init__(self, network: OnnxNetwork, name: str, imgsz: int, device: str = "cpu") -> None:
        import onnxruntime

        self.name, self.model, self.device = name, network, torch.device(device)
        self.class_names, self.stride = network.metadata.names, network.metadata.stride
        self.nms_inside = network.metadata.nms
        self.iou = self.nms_inside[1] if self.nms_inside else self.iou
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what it has to say comes as an error, too
        providers = _providers(device)
        try:
            # Without going back to the CPU, which it would not say.
            self._session = onnxruntime.InferenceSession(network.graph, options, providers=providers, enable_fallback=0)
        except Exception as error:  # whatever it raises of a graph that it does not know
            raise DetguardError(f"{name}: cannot be run by onnxruntime ({first_line(error)})") from error
        wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if wanted not in (used := self._session.get_providers()):
            raise DetguardError(f"{name}: onnxruntime cannot run it on {device}, but by {', '.join(used)} alone")
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        alone = len(inputs) == len(outputs) == 1 and {inputs[0].type, outputs[0].type} <= DTYPES.keys()
        if not (alone and len(inputs[0].shape) == 4 and outputs[0].shape):
            raise DetguardError(
                f"{name}: expected one input of frames and one output, as Ultralytics exports have them"
            )
        if isinstance(count := inputs[0].shape[0], int) and count != 1:
            raise DetguardError(f"{name}: was exported for {count} frames at once; expected an export with batch=1")
        self._input, self._dtype = inputs[0].name, DTYPES[inputs[0].type]
        # As Ultralytics' predictor tells it.
        self.dynamic = isinstance(outputs[0].shape[0], str)
        fixed = network.metadata.imgsz
        if not self.dynamic and imgsz != fixed:
            raise DetguardError(f"`imgsz` {imgsz}: {name} was exported for frames of {fixed} px alone")
        self.imgsz = -(-imgsz // self.stride) * self.stride
        self._yolo: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        found = self._run(torch.zeros(1, 3, self.imgsz, self.imgsz))
        if found.ndim != 3 or (
            found.shape[2] != 6 if self._listed(found) else found.shape[1] != 4 + len(self.class_names)
        ):
            expected = f"[B, {4 + len(self.class_names)}, N] or [B, N, 6]"
            raise DetguardError(f"{name}: its output is {list(found.shape)}, expected {expected}")

    @override
    def letterbox(self, photo_shape: tuple[int, int]) -> Letterbox:
        return Letterbox.fit(photo_shape, self.imgsz, self.stride if self.dynamic else self.imgsz)

    @override
    def candidates(self, frames: Tensor) -> Candidates:
        """Of a graph with NMS, its detections."""
        shown = frames.detach().float().cpu()
        # An NMS inside may have been unrolled for one frame, and give nothing for others (Ultralytics').
        together = self.dynamic and not self.nms_inside
        found = torch.cat([self._run(some) for some in ([shown] if together else shown.split(1))]).to(frames.device)
        if not self._listed(found):
            boxes, scores = found.transpose(1, 2).split([4, len(self.class_names)], 2)
            return Candidates(_logits(scores), xywh2xyxy(boxes))
        boxes, score, kind = found.split([4, 1, 1], 2)
        known = (kind >= 0) & (kind < len(self.class_names))
        scores = found.new_zeros((*found.shape[:2], len(self.class_names)))
        scores.scatter_(2, kind.long().clamp(0, len(self.class_names) - 1), score * known)
        return Candidates(_logits(scores), boxes, end_to_end=True)

    @override
    def predict(self, source: Source, conf: float, iou: float | None = None) -> Detections:
        photo = as_photo(source)
        threads = torch.get_num_threads()
        if self._yolo is None:
            # A copy under a plain name: the graph that was checked, whatever becomes of the file meanwhile.
            self._folder = tempfile.TemporaryDirectory(prefix="detguard-")
            copy = Path(self._folder.name) / "model.onnx"
            copy.write_bytes(self.model.graph)
            self._yolo = YOLO(copy, task="detect")
        # Of the whole process, its set-up would change which GPU is the current one, and leave one core idle.
        try:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext(), self._running():
                found = self._yolo.predict(
                    photo[..., ::-1].copy(), conf=conf, iou=self.iou if iou is None else iou, imgsz=self.imgsz,
                    rect=True, device=str(self.device), max_det=MAX_DETECTIONS, save=False, verbose=False,
                )  # fmt: skip
        finally:
            torch.set_num_threads(threads)
        boxes = found[0].boxes.cpu()
        known = Detections(boxes.xyxy, boxes.conf, boxes.cls.long()).of(list(self.class_names))
        return to_photo(known, Letterbox.whole(photo.shape[:2]))

    @override
    def state_hash(self) -> str:
        """SHA-256 of the file."""
        return self.model.sha256

    @contextmanager
    def _running(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it raises of frames that the graph does not take
            raise DetguardError(f"{self.name}: cannot be run by onnxruntime ({first_line(error)})") from error

    def _run(self, frames: Tensor) -> Tensor:
        with self._running():
            (found,) = self._session.run(None, {self._input: frames.contiguous().numpy().astype(self._dtype)})
        return torch.from_numpy(np.asarray(found, np.float32)).nan_to_num()

    def _listed(self, found: Tensor) -> bool:
        """As Ultralytics' NMS tells it."""
        return self.model.metadata.listed or found.shape[-1] == 6


def _logits(scores: Tensor) -> Tensor:
    return scores.double().clamp(LEAST, 1 - LEAST).logit().float()


def _providers(device: str) -> list[str | tuple[str, dict[str, int]]]:
    """What is to run a graph on a device.

    Raises:
        DetguardError: nothing that is installed can.
    """
    import onnxruntime

    kind = torch.device(device)
    if kind.type == "cpu":
        return ["CPUExecutionProvider"]
    if kind.type != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise DetguardError(
            f"`device` {device}: onnxruntime has only the CPU here; give `device` cpu, or pip install "
            "onnxruntime-gpu for cuda"
        )
    return [("CUDAExecutionProvider", {"device_id": kind.index or 0}), "CPUExecutionProvider"]


class Onnx(Family):
    """The family of ONNX files, which are those that end in .onnx."""

    runs = OnnxDetector
    suffixes: ClassVar = frozenset({".onnx"})

    @override
    def owns(self, network: nn.Module) -> bool:
        return isinstance(network, OnnxNetwork)

    @override
    def read(self, name: str, file: Path, trust: bool) -> tuple[nn.Module, int]:
        """The graph of a file, which is as little trusted with `trust` as without."""
        if missing := [package for package in PACKAGES if find_spec(package) is None]:
            raise DetguardError(f"{file}: needs {' and '.join(missing)}; pip install 'detguard[export]'")
        import onnx

        data = read_file(file, MAX_BYTES)
        try:
            model = onnx.load_model_from_string(data)
        except Exception as error:  # whatever protobuf raises
            raise DetguardError(f"{file}: no ONNX file, or a damaged one ({first_line(error)})") from error
        try:
            check_graph(model)
            metadata = read_metadata({one.key: one.value for one in model.metadata_props})
        except Damaged as error:
            raise DetguardError(f"{file}: {error}") from error
        kept = [(one.key, one.value) for one in model.metadata_props if one.key in KEPT]
        del model.metadata_props[:], model.training_info[:]
        onnx.helper.set_model_props(model, dict(kept))
        return OnnxNetwork(model.SerializeToString(), metadata, hashlib.sha256(data).hexdigest()), metadata.imgsz


def check_graph(model: "onnx.ModelProto") -> None:
    """See that a graph reads no other file, has operators of ONNX' own only, and ends.

    Raises:
        Damaged: it does not.
    """
    import onnx

    if model.functions:
        raise Damaged("has functions of its own; expected a graph of ONNX' operators, as Ultralytics exports it")
    for graph in _graphs(model.graph):
        for node in graph.node:
            if node.domain not in ("", "ai.onnx"):
                raise Damaged(f"has an operator {node.op_type!r} of {node.domain!r}; expected ONNX' own only")
            if node.op_type in ("Loop", "Scan"):
                raise Damaged(f"has a {node.op_type}, which may never end; export it without")
        tensors = [
            *graph.initializer,
            *(part for one in graph.sparse_initializer for part in (one.values, one.indices)),
        ]
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            tensors += [attribute.t, *attribute.tensors]
            for one in (attribute.sparse_tensor, *attribute.sparse_tensors):
                tensors += [one.values, one.indices]
        if any(one.data_location == onnx.TensorProto.EXTERNAL or one.external_data for one in tensors):
            raise Damaged("keeps weights in another file; save them inside")


def _graphs(graph: "onnx.GraphProto") -> "Iterator[onnx.GraphProto]":
    """A graph and those inside its nodes."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for inner in (attribute.g, *attribute.graphs):
            if inner.node or inner.initializer or inner.sparse_initializer:
                yield from _graphs(inner)


def read_metadata(entries: dict[str, str]) -> Metadata:
    """What Ultralytics' exports tell of themselves.

    Raises:
        Damaged: it is missing or odd, or the graph finds no boxes.
    """
    if missing := {"names", "imgsz", "stride", "task"} - entries.keys():
        raise Damaged(f"says no {sorted(missing)[0]} of itself; expected an export of Ultralytics or detguard")
    if entries["task"] != "detect":
        raise Damaged(f"is a {entries['task'][:20]!r} model; only box detection can be attacked")
    if entries.get("head") == "RTDETRDecoder":
        raise Damaged("is an RT-DETR, whose exports tell boxes in another way; give its .pt")
    names, size, stride = (_literal(entries, key) for key in ("names", "imgsz", "stride"))
    end_to_end, given = (_literal(entries, key, default) for key, default in (("end2end", "False"), ("args", "{}")))
    count = len(names) if isinstance(names, dict | list) else 0
    if not 0 < count <= MOST_CLASSES:
        raise Damaged(f"has no names of 1 to {MOST_CLASSES} classes")
    imgsz = frame_size({"imgsz": size})
    if isinstance(size, list | tuple) and len(set(size)) > 1:
        raise Damaged(f"was exported for frames of {size} px; expected square ones, imgsz={imgsz}")
    if type(stride) is not int or stride not in STRIDES:
        raise Damaged(f"has an odd stride; expected one of {', '.join(map(str, STRIDES))}")
    if not isinstance(given, dict):
        raise Damaged("has odd args; expected names with values")
    # Ultralytics' exports do not say at which confidence and overlap theirs is: as a rule at its own defaults.
    nms = (
        tuple(given.get(key, default) for key, default in (("conf", 0.25), ("iou", 0.7))) if given.get("nms") else None
    )
    if nms and not all(type(one) in (int, float) and 0 <= one <= 1 for one in nms):
        raise Damaged("has odd args of its NMS; expected `conf` and `iou` of 0 to 1")
    return Metadata(class_names(names, count), imgsz, stride, bool(end_to_end or nms), nms)


def _literal(metadata: dict[str, str], key: str, default: str = "") -> object:
    text = metadata.get(key, default)
    if len(text) > MAX_METADATA:
        raise Damaged(f"says too much of its {key}")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise Damaged(f"has odd {key}; expected plain values") from error
