"""OpenVINO's intermediate representation, for Intel's processors."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from torch import Tensor
from typing_extensions import override

from detguard.export.base import Deployment, Format, Runtime
from detguard.export.onnx import Onnx
from detguard.files import write_file


class OpenVino(Format):
    """A folder of an .xml, a .bin and Ultralytics' metadata, converted from ONNX; run by OpenVINO."""

    suffix = "_openvino_model"
    packages = ("onnx", "onnxruntime", "openvino")
    extra = "export,openvino"

    @override
    def write(self, wanted: Deployment, file: Path) -> None:
        import openvino

        with TemporaryDirectory() as folder:
            name = file.name.removesuffix(self.suffix) or wanted.detector.name
            source, target = Path(folder) / "model.onnx", Path(folder) / f"{name}.xml"
            Onnx().write(wanted, source)
            openvino.save_model(openvino.convert_model(source), target, compress_to_fp16=False)
            for made in (target.with_suffix(".bin"), target):
                write_file(file / made.name, made.read_bytes())
        write_file(file / "metadata.yaml", yaml.safe_dump(wanted.metadata, sort_keys=False).encode())

    @override
    def read(self, file: Path) -> Runtime:
        import openvino

        (described,) = file.glob("*.xml")
        # By itself OpenVINO takes bfloat16 where the processor has it, by which scores differ in the second digit.
        precise = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        model = openvino.compile_model(described, "CPU", precise)

        def run(frames: Tensor) -> Tensor:
            return torch.from_numpy(model(frames.contiguous().numpy())[0].copy())

        return run
