"""TorchScript, for libtorch and `torch.jit.load`."""

import io
import json
from pathlib import Path

import torch
from torch import Tensor
from typing_extensions import override

from detguard.export.base import Deployment, Format, Runtime
from detguard.files import write_file


class TorchScript(Format):
    """A traced TorchScript archive with Ultralytics' metadata; run by torch."""

    suffix = ".torchscript"

    @override
    def write(self, wanted: Deployment, file: Path) -> None:
        with torch.no_grad():
            traced = torch.jit.trace(wanted.graph, wanted.example, strict=False, check_trace=False)
        written = io.BytesIO()
        torch.jit.save(traced, written, _extra_files={"config.txt": json.dumps(wanted.metadata)})
        write_file(file, written.getvalue())

    @override
    def read(self, file: Path) -> Runtime:
        script = torch.jit.load(str(file))

        def run(frames: Tensor) -> Tensor:
            with torch.no_grad():
                return script(frames)

        return run
