"""Training steps on a device that only pretends.

For a process of its own: for the rest of it, there is such a device.
"""

import copy
import json
import traceback
from functools import partial

import pytest
import torch
from tiny import tiny
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import detguard.hardening.adapt as adapting
import detguard.hardening.kinds as kinds
import detguard.hardening.losses as losses
import detguard.hardening.optimizer as module
import detguard.training_loss as training_loss
from detguard.data.batches import Batch
from detguard.data.stream import Labelled
from detguard.detections import Anchors, Candidates, Detections
from detguard.detectors.gated import GatedNetwork, backbone_end
from detguard.detectors.load import fused
from detguard.hardening.loop import Average
from detguard.hardening.optimizer import Optimizer
from detguard.hardening.run import Plan
from detguard.hardening.train import Layout, Lesson, Setting, learned_parameters
from detguard.ranks import Ranks
from detguard.training_loss import Assignment

# A pretended "cuda" has no backward pass where there is no driver: this one is an accelerator of nothing but a name.
_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended", 0)
SETTING = Setting(batch=4, size=64, ranks=Ranks(DEVICE))
MODEL = tiny(8)
NECK = backbone_end(MODEL.model)


def there(network):
    """A network with pretended weights on the device."""
    for part in network.modules():
        for name, p in part._parameters.items():
            if p is not None:
                value = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=DEVICE)
                part._parameters[name] = torch.nn.Parameter(value, requires_grad=p.requires_grad)
    return network


def frames(count):
    return torch.rand(count, 3, 64, 64, device=DEVICE).contiguous(memory_format=torch.channels_last)


def labels(count):
    objects = Detections(torch.ones(1, 4), torch.ones(1), torch.ones(1, dtype=torch.int64))
    return [Labelled(None, objects)] * count


def update():
    """An update of weights, which is the same in all stages."""
    network = GatedNetwork(fused(MODEL), NECK)
    with FakeTensorMode():
        learned = list(there(network).parameters())
        optimizer, average = Optimizer(learned, list(network.gate.parameters())), Average(learned)
        optimizer.update(sum(parameter.sum() for parameter in learned), 1e-3)
        average.update()


small = partial(Plan, crop=64, steps=1)
STAGES = {
    "adversarial": (small(), "adversarial"),
    "hard": (small(), "hard"),
    "joint": (small(), "joint"),
    "joint, pgd, all learn": (small(attack="pgd", mode="full", split="neck"), "joint"),
    "normal on a shared trunk": (small(split="neck"), "normal"),
    "pgd": (small("pgd", attack="pgd"), "adversarial"),
    "fgsm": (small("pgd", attack="fgsm"), "adversarial"),
    "mtd": (small("mtd", attack="pgd"), "adversarial"),
    "labels, too": (small("pgd", "both", attack="pgd"), "adversarial"),
    "pretrain": (small(pretrain=True), "pretrain"),
    "finetune": (small("finetune"), "finetune"),
}


def harden(name):
    plan, stage = STAGES[name]
    split = NECK if plan.split == "neck" else 0
    network = GatedNetwork(fused(MODEL), split, plan.experts, fusion=plan.fusion)
    teacher = GatedNetwork(fused(MODEL), 0, ("undefended",)).requires_grad_(False)
    stage = plan.stage(stage, 400)
    hard = Layout.of(stage, 4).hard
    with FakeTensorMode():
        learned_parameters(there(network), stage)
        batch = Batch(frames(4), frames(4), hard, labels(4))
        # The last of the margins, which attack the gate, too.
        losses = Lesson(network, there(teacher), batch, stage, SETTING, 3, 0.5).learn(Tensor.backward)
    assert all(value.device.type == DEVICE.type for value in losses.values())


def adapt(mode, *, known=True):
    plan = adapting.Adaptation(mode=mode, batch=6, expert="whole")
    network = GatedNetwork(fused(MODEL), NECK)
    before = copy.deepcopy(network).requires_grad_(False)
    network.grow(["adapted 1"], 0)
    with FakeTensorMode():
        adapting.learned_parameters(there(network), plan)
        new, old = Batch(frames(3), frames(3), 0, labels(3)), Batch(frames(3), frames(3), 1, labels(3 * known))
        losses = adapting.batch_losses(network, there(before), new, old, adapting.Counts(3, 3, 1), plan, SETTING)
        losses["loss"].backward()
    assert all(value.device.type == DEVICE.type for value in losses.values())


def assigned(candidates, objects):
    """As many pairs as there happen to be: how many, the device alone knows."""
    index = torch.zeros(5, dtype=torch.int64, device=DEVICE)
    return Assignment(index, index, index, torch.ones(5, device=DEVICE), torch.ones(5, 4, device=DEVICE))


def surest(candidates, *rest):
    """Some objects of each frame, of candidates that were read back at once: how many, the numbers tell."""
    assert candidates.logits.device.type == candidates.boxes.device.type == "cpu"
    return [label.objects for label in labels(len(candidates))]


def levels():
    """The strides that objects are assigned by are known without the device."""
    with FakeTensorMode():
        places = Anchors(torch.ones(8, 2, device=DEVICE), torch.ones(8, 1, device=DEVICE), levels=(4.0, 8.0))
        found = Candidates(torch.zeros(2, 8, 3, device=DEVICE), torch.ones(2, 8, 4, device=DEVICE), anchors=places)
        with pytest.raises(Asked, match=r"\[4.0, 8.0\]"):
            training_loss.assign(found, [label.objects for label in labels(2)])


class Asked(Exception):
    """By what an assigner was asked."""

    @classmethod
    def raised(cls, stride, **options):
        raise cls(stride)


def read():
    with FakeTensorMode():
        frames(1).sum().item()


def leave():
    with FakeTensorMode():
        frames(1) + torch.ones(3, 64, 64)


def what_went_wrong(step, *arguments):
    try:
        step(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}\n{''.join(traceback.format_tb(error.__traceback__)[-3:])}"
    return ""


def tell(file):
    """Write as JSON what went wrong in each step, or "" where nothing did."""
    losses.assign, kinds.suppress, training_loss.TaskAlignedAssigner = assigned, surest, Asked.raised
    module._size = lambda parameter: 1.0
    errors = {name: what_went_wrong(harden, name) for name in STAGES}
    errors |= {f"adapt, {mode}": what_went_wrong(adapt, mode) for mode in ("full", "frozen")}
    errors |= {
        "adapt, old photos unlabelled": what_went_wrong(partial(adapt, "full", known=False)),
        "assign": what_went_wrong(levels),
        "update": what_went_wrong(update),
        "a loss that is read": what_went_wrong(read),
        "a tensor on the CPU": what_went_wrong(leave),
    }
    file.write_text(json.dumps(errors))
