"""`detguard export`: parse, call, show."""

import sys
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from detguard import defaults
from detguard.cli.app import (
    EndToEnd,
    ImageSize,
    JsonMade,
    TopK,
    Trust,
    app,
    err,
    only_with,
    out,
    show_error,
    show_made,
    show_warning,
    tell_size,
)


@app.command(
    epilog="""Examples:

`detguard export detguard-n-hard`: ONNX of the ensemble, for ONNX Runtime, TensorRT or `YOLO(file)`

`detguard export runs/harden/001/weights/sparse.safetensors --nms --out street.onnx`: with NMS inside

`detguard export runs/harden/002/weights/adversarial.safetensors --format pt`: one network, of `harden --recipe
pgd`, for `YOLO(file)`"""
)
def export(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Bundled name, .safetensors or .pt file, or an Ultralytics name.")],
    kind: Annotated[
        Literal["pt", "onnx", "torchscript", "openvino"],
        typer.Option("--format", help="pt: Ultralytics' checkpoint, of one network; the others take ensembles too."),
    ] = "onnx",
    file: Annotated[Path | None, typer.Option("--out", help="File to write; default: MODEL's name, here.")] = None,
    imgsz: ImageSize = None,
    nms: Annotated[bool, typer.Option("--nms", help="NMS inside: [B, 300, 6] of box, confidence and class.")] = False,
    conf: Annotated[
        float, typer.Option(min=0.001, max=0.999, help="Of --nms: confidence over which a box stays.")
    ] = defaults.CONF,
    iou: Annotated[float, typer.Option(min=0, max=1, help="Of --nms: overlap over which the worse box goes.")] = 0.7,
    dynamic: Annotated[
        bool, typer.Option("--dynamic/--static", help="Any batch, height and width, or one square frame of --imgsz.")
    ] = True,
    photos: Annotated[
        list[str] | None,
        typer.Option(help="Folder or pattern of photos to check it on, eight at most; default: some of Ultralytics'."),
    ] = None,
    end_to_end: EndToEnd = False,
    top_k: TopK = None,
    as_json: JsonMade = False,
    trust: Trust = False,
) -> None:
    """Write a detector as a file for other runtimes, and check that it finds there what it finds here.

    Exit code: 0 the same is found, 1 not (do not use the file, which is called so: NAME.failed), 2 wrong use.
    """
    from detguard.export.check import BOXES, PHOTOS, SCORES
    from detguard.export.run import check_file, default_file, plan_export, rejected
    from detguard.export.run import export as write
    from detguard.photos import find_photos, read_photo
    from detguard.reports.export import verdict_table

    out.quiet = out.quiet or as_json
    if not nms:
        only_with(context, ("conf", "iou"), "--nms")
    by_default, file = file is None, file or default_file(model, kind)
    check_file(file, model, kind, by_default=by_default)
    shown = [read_photo(photo) for photo in find_photos(photos)[:PHOTOS]] if photos else []
    with err.status("Loading the detector"):
        wanted = plan_export(
            model, kind, shown, imgsz, conf, iou, top_k, nms=nms, dynamic=dynamic, end_to_end=end_to_end, trust=trust
        )
    tell_size(imgsz, [wanted.detector])
    if wanted.detector.experts and wanted.detector.model.top_k:
        show_warning("all experts are computed in the file: --top-k decides what is found, not how fast")
    with err.status("Exporting and checking"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing, whose result is checked
        verdict = write(wanted, kind, file)
    kept, file = file, file if verdict.passed else rejected(file, kind)
    out.print(verdict_table(verdict, len(wanted.frames)))
    if as_json or verdict.passed:
        text = f"checked: {file} finds what {model} finds"
        show_made(text, as_json=as_json, file=file, passed=verdict.passed, **verdict.record())
    if not verdict.passed:
        why = f"expected scores within {SCORES:g} and boxes within {BOXES:g} px"
        why = why if verdict.compared else "nothing was found to compare; give --photos of what it was made for"
        stays = f"; {kept} stays as it was" if kept.exists() else ""
        show_error(f"{file}: check failed, do not use it ({why}){stays}")
        sys.exit(1)
