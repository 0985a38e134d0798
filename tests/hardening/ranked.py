"""Short trainings by the processes that the environment tells of; the first saves the weights that they end at."""

import copy
import os
import tempfile
from pathlib import Path

import pytest
import torch
from tiny import tiny
from ultralytics.utils import ASSETS

import detguard.hardening.adapt as adapting
import detguard.hardening.kinds as kinds
from detguard import DetguardError
from detguard.data.batches import read_photos
from detguard.data.stream import Labelled
from detguard.detectors.gated import GatedNetwork, backbone_end
from detguard.detectors.load import fused, load_detector
from detguard.hardening import optimizer
from detguard.hardening.adapt import Adaptation, adapt
from detguard.hardening.loop import BatchLog
from detguard.hardening.run import Plan
from detguard.hardening.train import Setting, train_stage
from detguard.ranks import Ranks
from detguard.runs import Run

# Batches that two processes cannot have the same number of frames of.
BATCH, SIZE = 5, 64
STAGES = {
    "adversarial": Plan(steps=1, batch=BATCH),
    "joint": Plan(steps=1, batch=BATCH, split="neck", mode="full"),
    "pgd": Plan("mtd", "both", attack="pgd", steps=1, batch=BATCH),
}


def train(ranks, folder):
    """The weights that each stage, and an adaptation, begins and ends with, and the losses that are told."""
    with pytest.MonkeyPatch.context() as patch:
        # In bfloat16, where the processor multiplies it, two processes would round more apart than they are told to be.
        patch.setattr(optimizer, "bf16_helps", lambda device=None: False)
        # What tells kinds apart is fitted to either's own weights, by attacks whose steps are signs: not compared.
        patch.setattr(adapting, "BATCHES", 2)
        patch.setattr(kinds, "BATCHES", 2)
        return trained(ranks, folder)


def trained(ranks, folder):
    cuts, start, weights, told = [ASSETS / "bus.jpg", ASSETS / "zidane.jpg"], {}, {}, {}
    labelled = [Labelled(cut, found) for cut, found in zip(cuts, load_detector().detect(cuts, 0.3), strict=True)]
    source = read_photos([(labelled, 1.0)], SIZE)[0]
    setting = Setting(BATCH, SIZE, ranks=ranks)
    torch.manual_seed(0)
    model = fused(tiny(13))
    neck = backbone_end(model.model)
    teacher = GatedNetwork(model, 0, ("undefended",)).requires_grad_(False)
    for name, plan in STAGES.items():
        torch.manual_seed(ranks.rank)  # the first one's weights are everybody's
        network = GatedNetwork(model, neck if plan.split == "neck" else 0, plan.experts, fusion=plan.fusion)
        with torch.no_grad():  # or the first loss is 0, and its gradient rounding errors, of which Muon makes a step
            for parameter in network.parameters():
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
        stage = plan.stage("joint" if name == "joint" else "adversarial", 2 * BATCH)
        start[name] = copy.deepcopy(network.state_dict())
        log = BatchLog(None, name, stage.number, BATCH, ranks)
        train_stage(network, teacher, source, stage, setting, folder / f"{name}.pt", log=log)
        weights[name], told[name] = network.state_dict(), log.means
    torch.manual_seed(0)
    network = GatedNetwork(model, neck)
    before = copy.deepcopy(network.state_dict())
    new = read_photos([(labelled, 1.0)], SIZE, plain=True)[0]
    plan = Adaptation(photos=2 * BATCH, batch=BATCH, mode="full", expert="whole")
    old = read_photos([(cuts, 1.0)], SIZE)[0]
    adapt(network, {}, new, old, plan, setting, Run(folder, {"command": "adapt"}))
    weights["adapt"] = {name: value for name, value in network.state_dict().items() if not name.startswith("kinds")}
    start["adapt"] = weights["adapt"] | before
    return {"start": start, "weights": weights, "losses": told}


def train_as(environment, file):
    """What a process of a launch does."""
    os.environ |= environment
    torch.set_num_threads(1)
    ranks = Ranks.start("cpu")
    assert ranks.count == int(os.environ["WORLD_SIZE"])
    with tempfile.TemporaryDirectory() as folder:
        found = train(ranks, Path(folder))
    found["refused"] = refused(ranks, ["a.jpg: damaged"] if ranks.first else [])
    ranks.end()
    again = Ranks.start("cpu")
    found["trained again"] = float(again.total(torch.ones(1)))
    again.end()
    if ranks.first:
        torch.save(found, file)


def refused(ranks, unread):
    """What is said of photos that this process, of others, could not read."""
    ranks.must_agree(["b.jpg: damaged"])
    try:
        ranks.must_agree(unread)
    except DetguardError as error:
        return str(error)
