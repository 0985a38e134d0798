"""What tells an attacked photo from a clean one: python benchmarks/gate_signals.py --limit 96.

Logistic regression on what a gate could see of a photo, each kind of photos counted alike, judged on the quarter of the
photos that it was not fitted to, four times. Attacks know today's gate; in the end the regression on the gate's own
features, which knows such photos, takes its place and is attacked itself, on photos of the data set's `val`.
"""

import copy
from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from gate import ADVERSARIAL, HARD, NORMAL, attacked, chosen
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

from detguard.data.corruptions import KINDS, corrupt
from detguard.data.sources import read_labelled
from detguard.detectors.gated import GatedDetector, content, detail, pooled, run_layers
from detguard.detectors.load import load_detector
from detguard.engine import keep_freed_memory
from detguard.photos import Photo, frames_tensor, read_photo

SURE, DECAY, FOLDS = 10, 3e-2, 4
# Kinds of photos, and what each is; of the last, today's gate was in the attack.
OF = {"clean": NORMAL, "corrupted": HARD, "attacked": ADVERSARIAL, "and 10 times the gate's logits": ADVERSARIAL}
DETAIL, ROBUST, UNDEFENDED = "the gate's features of detail", "what the robust expert sees", "what the normal one sees"
DISAGREE = "disagreement of the experts"
SIGNALS = [(DETAIL,), (ROBUST,), (UNDEFENDED,), (DISAGREE,), (DETAIL, ROBUST), (DETAIL, ROBUST, UNDEFENDED, DISAGREE)]


@torch.no_grad()
def signals(detector: GatedDetector, photo: Photo) -> dict[str, Tensor]:
    """What could be seen of a photo, each [F]."""
    network, frame = detector.model, frames_tensor([detector.letterbox(photo.shape[:2])(photo)])
    where, tap = content(frame), network._tap
    last, saved = run_layers(network.trunk, frame, {}, network.save)

    def seen(expert: int) -> Tensor:
        layers = network._expert(expert)[: tap + 1 - network.split]
        return pooled(run_layers(layers, last, dict(saved), {*network.save, tap})[1][tap], where)[0]

    logits = [detector.through(expert).candidates(frame).logits[0] for expert in (NORMAL, HARD, ADVERSARIAL)]
    sure = [found.amax(1).topk(SURE).values for found in logits]
    apart = []  # how much less sure one is of what another is sure of
    for one in logits:
        best = one.amax(1).topk(SURE).indices
        classes = one[best].argmax(1)
        apart += [one[best, classes] - other[best, classes] for other in logits if other is not one]
    return {
        DETAIL: network.gate.features(detail(frame))[0],
        ROBUST: seen(ADVERSARIAL),
        UNDEFENDED: seen(NORMAL),
        DISAGREE: torch.cat([*sure, *apart]),
    }


def fitted(features: Sequence[Tensor], kinds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Weight [3, F] and bias [3] of the regression on features, [N, F] each, of photos of so many kinds."""
    x = torch.cat(list(features))
    y = torch.cat([torch.full((len(one),), kind) for one, kind in zip(features, kinds, strict=True)])
    mean, spread = x.mean(0), x.std(0) + 1e-3
    weight, bias = torch.zeros(3, x.shape[1], requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = cross_entropy((x - mean) / spread @ weight.T + bias, y, 1 / y.bincount().float())
        value = found + DECAY * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight = weight.detach() / spread
    return weight, bias.detach() - weight @ mean


def main(
    model: Annotated[str, typer.Option(help="An ensemble of a normal, a hard and an adversarial expert.")] = (
        "detguard-n-hard"
    ),
    data: str = "../shared/data/coco256/data.yaml",
    limit: Annotated[int, typer.Option(help="Photos of `train`.")] = 96,
    judged: Annotated[int, typer.Option(help="Photos of `val`, attacked anew.")] = 16,
    imgsz: int = 320,
    eps: float = 2,
    steps: int = 6,
) -> None:
    keep_freed_memory()
    detector = load_detector(model, imgsz)
    assert isinstance(detector, GatedDetector)
    labelled, others = (
        [one for one in read_labelled(data, split, detector.class_names) if len(one.objects)][:most]
        for split, most in (("train", limit), ("val", judged))
    )
    clean = [read_photo(one.file) for one in labelled]
    hard = [corrupt(photo, list(KINDS)[i % len(KINDS)], 1 + i % 5, i) for i, photo in enumerate(clean)]
    made = [attacked(detector, name, labelled, eps, steps) for name in ("all", "gate:10")]
    shown = dict(zip(OF, (clean, hard, *made), strict=True))
    seen: dict[str, dict[str, Tensor]] = {}
    for kind, photos in track(shown.items(), "looking", transient=True):
        found = [signals(detector, photo) for photo in photos]
        seen[kind] = {name: torch.stack([one[name] for one in found]) for name in found[0]}
    fold = torch.arange(len(labelled)) % FOLDS
    table = Table(
        "what is seen", *OF, title=f"Right, {detector.name}, {imgsz} px, {len(labelled)} photos, {eps:g} levels, "
        f"PGD-{steps}"
    )  # fmt: skip
    asked = {kind: chosen(detector, photos) for kind, photos in shown.items()}
    table.add_row("today's gate", *(f"{asked[kind].count(OF[kind]) / len(labelled):.0%}" for kind in OF))
    for names in SIGNALS:
        x = {kind: torch.cat([of[name] for name in names], 1) for kind, of in seen.items()}
        for known in (list(OF)[:3], list(OF)):
            right = dict.fromkeys(OF, 0)
            for number in range(FOLDS):
                weight, bias = fitted([x[kind][fold != number] for kind in known], [OF[kind] for kind in known])
                for kind in OF:
                    right[kind] += int(((x[kind][fold == number] @ weight.T + bias).argmax(1) == OF[kind]).sum())
            told = " + ".join(names) + (", which knows the last" if len(known) == len(OF) else "")
            table.add_row(told, *(f"{count / len(labelled):.0%}" for count in right.values()))
    network = copy.deepcopy(detector.model)
    weight, bias = fitted([seen[kind][DETAIL] for kind in OF], list(OF.values()))
    with torch.no_grad():
        network.gate.out.weight.copy_(weight)
        network.gate.out.bias.copy_(bias)
    anew = GatedDetector(network, f"{detector.name}, gate fitted", imgsz)
    again = [chosen(anew, attacked(anew, name, others, eps, steps)) for name in ("all", "gate:10")]
    shares = [f"{found.count(ADVERSARIAL) / len(others):.0%}" for found in again]
    of_val = f"{chosen(anew, [read_photo(one.file) for one in others]).count(NORMAL) / len(others):.0%}"
    table.add_row(f"of detail, which knows the last, attacked itself ({len(others)} of val)", of_val, "-", *shares)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
