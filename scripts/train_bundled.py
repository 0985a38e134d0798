"""Train weights/detguard-n from random weights by dense distillation of a COCO-trained YOLO11n.

The student sees what the teacher sees (any photo, any augmentation, no labels) and learns the teacher's
class probabilities and box distributions at every anchor, and its feature maps on the way. It starts
*blockwise*, each layer fed with the teacher's own inputs, which converges fast, and goes on end to end.

    python scripts/train_bundled.py --shared ../shared --run runs/train/detguard-n --photos 400000

Killed and started again with the same --run it goes on from its last checkpoint.
"""

import argparse
import json
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.metrics import bbox_iou
from ultralytics.utils.tal import dist2bbox, make_anchors
from voc_split import split

from detguard.data.batches import batches, read_photos
from detguard.detectors.load import load_model
from detguard.engine import bf16_helps, cores, keep_freed_memory
from detguard.hardening.optimizer import Optimizer
from detguard.ranks import Ranks

CLASSES = [
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "bus",
    "train",
    "truck",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
]
ARCHITECTURE = "yolo11n.yaml"
SIZE = 320
# Share of each folder in a batch; rooms hold few objects and are squashed, so they teach features only.
SOURCES = {
    "street1569/images": 0.36,
    "voc3608/images": 0.50,
    "coco256/images/train": 0.06,
    "rooms2000/images": 0.08,
}


def training_files(shared: Path, folder: str) -> list[Path]:
    """The photos of a folder that may be trained on."""
    photos = shared / "data" / folder
    return split(photos)[0] if folder.startswith("voc3608") else sorted(photos.glob("*.jpg"))


def walk(
    model: DetectionModel, frames: Tensor, given: list[Tensor] | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of every layer, and the head's raw ones; with `given`, each layer is fed those instead of its own."""
    outputs: list[Tensor] = []
    x = frames
    for i, layer in enumerate(model.model):
        source = outputs if given is None else given
        if layer.f == -1:
            inputs = frames if i == 0 else source[i - 1]
        else:
            inputs = [source[i - 1 if j == -1 else j] for j in layer.f]
        if isinstance(layer, nn.Upsample) and given is not None:
            x = given[i]
        elif i < len(model.model) - 1:
            x = layer(inputs)
        else:
            return outputs, layer.forward_head(inputs, **layer.one2many)
        outputs.append(x)
    raise AssertionError("a detection model ends in its head")


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of feature maps [B, C, H, W], each channel in units of its own variance.

    A tenth of the layer's variance is added, so that channels that hardly ever speak do not outweigh the rest.

    Only a random grid of at most 10 x 10 positions counts: on the large maps the full error costs as much as
    the network itself and says the same.
    """
    step = max(1, student.shape[-1] // 10)
    if step > 1:
        y, x = torch.randint(step, (2,)).tolist()
        student, teacher = student[..., y::step, x::step], teacher[..., y::step, x::step]
    student, teacher = student.float(), teacher.float()
    variance = teacher.var((0, 2, 3), keepdim=True)
    return ((student - teacher).square() / (variance + 0.1 * variance.mean() + 1e-6)).mean()


def head_loss(
    student: dict[str, Tensor], teacher: dict[str, Tensor], keep: Tensor, stride: Tensor
) -> dict[str, Tensor]:
    """KL of class probabilities (all anchors), KL of box distributions and CIoU (weighted by the teacher's score).

    `scores` are logits [B, C, N], `boxes` distribution logits [B, 64, N]; `keep` are the student's classes
    among the teacher's.
    """
    logits, wanted = student["scores"].float(), teacher["scores"].float()[:, keep]
    p = wanted.sigmoid()
    weight = p.amax(1)
    norm = weight.sum().clamp(min=1)
    kl = p * (F.logsigmoid(wanted) - F.logsigmoid(logits)) + (1 - p) * (F.logsigmoid(-wanted) - F.logsigmoid(-logits))
    b, _, n = student["boxes"].shape
    log_q = student["boxes"].float().view(b, 4, 16, n).log_softmax(2)
    log_p = teacher["boxes"].float().view(b, 4, 16, n).log_softmax(2)
    box_kl = (log_p.exp() * (log_p - log_q)).sum(2).mean(1)
    anchors, _ = make_anchors(teacher["feats"], stride, 0.5)
    bins = torch.arange(16.0, device=anchors.device)[None, None, :, None]
    boxes = [dist2bbox((log.exp() * bins).sum(2).transpose(1, 2), anchors, xywh=False) for log in (log_q, log_p)]
    iou = bbox_iou(*boxes, xywh=False, CIoU=True).squeeze(-1)
    return {
        "class": kl.sum() / norm,
        "box": (box_kl * weight).sum() / norm,
        "iou": ((1 - iou) * weight * (weight > 0.02)).sum() / norm,
    }


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    ranks = Ranks.start(args.device)
    device, bf16 = ranks.device, bf16_helps(ranks.device)
    run = Path(args.run)
    run.mkdir(parents=True, exist_ok=True)
    teacher: DetectionModel = YOLO(str(args.shared / "weights/yolo11n-coco.pt")).model.eval().requires_grad_(False)
    keep = torch.tensor([{v: k for k, v in teacher.names.items()}[name] for name in CLASSES], device=device)
    teacher = teacher.fuse(verbose=False).to(device).to(memory_format=torch.channels_last)
    student = DetectionModel(ARCHITECTURE, nc=len(CLASSES), verbose=False).train().to(device)
    student = student.to(memory_format=torch.channels_last)
    stride = student.stride.cpu()  # which a GPU need not be asked for
    ema = torch.optim.swa_utils.AveragedModel(
        student, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995), use_buffers=True
    )
    seen, checkpoint = 0, run / "last.pt"
    state: dict[str, Any] = {}
    if checkpoint.exists():  # where there are several machines, all see --run
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        student.load_state_dict(state["student"])
        ema.load_state_dict(state["ema"])
        seen = state["seen"]
    elif args.model:
        weights = load_model(args.model)[0].state_dict()
        student.load_state_dict(weights)
        ema.module.load_state_dict(weights)
        seen = json.loads(args.model.with_suffix(".json").read_text())["trained"]["photos seen"]
    began_at = state["began_at"] if state else seen
    ranks.share(student)
    optimizer = Optimizer([p for p in student.parameters() if p.requires_grad], [], ranks=ranks)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    files = [(training_files(args.shared, folder), share) for folder, share in SOURCES.items()]
    source, _ = read_photos(files, SIZE)
    if ranks.first:
        print(f"{len(source)} photos, {seen} of {args.photos} seen", flush=True)

    def save() -> None:
        state = {
            "student": student.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "seen": seen,
            "began_at": began_at,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: stopped.append(n))
    sums: dict[str, Tensor] = {}
    began = saved = time.time()
    first, last = seen // args.batch, -(-args.photos // args.batch)
    workers = args.workers or max(1, cores() // ranks.local)
    made = batches(source, args.batch, SIZE, args.seed, first, last, workers=workers, ranks=ranks)
    for count, batch in enumerate(made, 1):
        if ranks.any(bool(stopped)):
            break
        blockwise = seen < args.blockwise
        progress = seen / args.photos
        warm = min(1.0, (seen - began_at + args.batch) / 8000)
        rate = args.rate * warm * max(0.02, (args.photos - seen) / (args.photos - began_at))
        frames = batch.clean
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            with torch.no_grad():
                known, wanted = walk(teacher, frames)
            found, raw = walk(student, frames, known if blockwise else None)
        losses = head_loss(raw, wanted, keep, stride)
        layers = range(len(known)) if blockwise else (6, 10, 13, 16, 19, 22)
        learned = [i for i in layers if any(True for _ in student.model[i].parameters())]
        losses["features"] = torch.stack([relative_error(found[i], known[i]) for i in learned]).mean()
        # Feature maps lead early and make way for what counts, the outputs.
        feature_weight = 20 if blockwise else 20 * (1 - progress) ** 2 + 1
        loss = losses["class"] + losses["box"] + 2 * losses["iou"] + feature_weight * losses["features"]
        optimizer.update(loss / ranks.count, rate)
        ema.update_parameters(student)
        seen += args.batch
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach()
        if count % 50 == 0 and ranks.first:
            record = {"seen": seen, "lr": rate, "ms_per_photo": (time.time() - began) / 50 / args.batch * 1e3}
            record |= {name: round(float(value) / 50, 4) for name, value in sums.items()}
            with (run / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            print(record, flush=True)
            sums, began = {}, time.time()
        if ranks.first and time.time() - saved > 180:
            save()
            saved = time.time()
    if ranks.first:
        save()
    ranks.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--model", type=Path, help="go on from this .safetensors where --run has no checkpoint")
    parser.add_argument("--run", default="runs/train/detguard-n")
    parser.add_argument("--photos", type=int, default=400_000, help="photos to see in all; the rate falls all the way")
    parser.add_argument("--blockwise", type=int, default=24_000, help="photos of the blockwise start")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:0 or mps; several processes by torchrun")
    parser.add_argument("--workers", type=int, help="processes that make batches; default: one per core")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
