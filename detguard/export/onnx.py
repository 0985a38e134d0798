"""ONNX, for ONNX Runtime, TensorRT and others."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.onnx import register_custom_op_symbolic  # type: ignore[attr-defined]
from typing_extensions import override

from detguard.export.base import Deployment, Format, Runtime
from detguard.files import write_file

# The oldest with all that the graph needs, so that old runtimes take it.
OPSET = 17
INPUT, OUTPUT = "images", "output0"


class Onnx(Format):
    """An ONNX file with Ultralytics' metadata; run by ONNX Runtime."""

    suffix = ".onnx"
    packages = ("onnx", "onnxruntime")

    @override
    def write(self, wanted: Deployment, file: Path) -> None:
        write_file(file, onnx_bytes(wanted))

    @override
    def read(self, file: Path) -> Runtime:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

        def run(frames: Tensor) -> Tensor:
            return torch.from_numpy(session.run(None, {INPUT: frames.contiguous().numpy()})[0])

        return run


def onnx_bytes(wanted: Deployment) -> bytes:
    """The ONNX of a detector, checked to be valid."""
    import onnx

    register_custom_op_symbolic("aten::logaddexp", _logaddexp, OPSET)
    axes: dict[str, dict[int, str]] = {INPUT: {0: "batch", 2: "height", 3: "width"}, OUTPUT: {0: "batch"}}
    if not wanted.graph.listed:
        axes[OUTPUT][2] = "candidates"
    written = io.BytesIO()
    with torch.no_grad():
        torch.onnx.export(
            wanted.graph,
            (wanted.example,),
            written,  # type: ignore[arg-type]
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes=axes if wanted.dynamic else None,
            dynamo=False,  # by tracing: the newer exporter does not take sizes that are whole strides
        )
    model = onnx.load_model_from_string(written.getvalue())
    onnx.helper.set_model_props(model, {key: str(value) for key, value in wanted.metadata.items()})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _logaddexp(graph: Any, one: torch.Value, other: torch.Value) -> torch.Value:
    """Of logarithms of weights, which are at most 0: their exponentials do not overflow."""
    return graph.op("Log", graph.op("Add", graph.op("Exp", one), graph.op("Exp", other)))
