"""Detections, candidates and what is aimed at, by hand."""

import torch

from detguard.detections import Candidates, Detections
from detguard.objectives.base import Scene

PERSON, BUS, TRAIN = 0, 1, 2


def detections(*rows):
    """Rows of (class, score, x1, y1, x2, y2)."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    return Detections(table[:, 2:], table[:, 1], table[:, 0].long())


CLEAN = detections((PERSON, 0.9, 0, 0, 50, 100), (BUS, 0.8, 100, 0, 300, 100))
SCENE = Scene(detections((BUS, 0.9, 20, 20, 60, 60)), detections((PERSON, 0.9, 70, 70, 110, 110)))


def loss_and_gradient(objective, logits, boxes, aims):
    """Loss [B], and its gradient at the logits [B, N, C], at a confidence of .25."""
    logits = logits.clone().requires_grad_()
    loss = objective.loss(Candidates(logits, boxes), aims, 0.25)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), gradient


def some_candidates(seed=0, batch=2, n=30, classes=4):
    """Logits [B, N, C] and boxes [B, N, 4]."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, n, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + 40], 2)
    return torch.randn(batch, n, classes, generator=generator) * 3, boxes
