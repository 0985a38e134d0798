"""How weights learn: Muon for those of layers, AdamW for biases and the gate, in steps in proportion to weights."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from detguard.detectors.checkpoint import same_form
from detguard.engine import bf16_helps
from detguard.ranks import ALONE, Ranks

MOMENTUM, DECAY, CLIP = 0.95, 0.01, 10.0
# Coefficients and number of the Newton-Schulz steps that make a matrix nearly orthogonal (Jordan et al. 2024).
QUINTIC, QUINTIC_STEPS = (3.4445, -4.7750, 2.0315), 5
SMALLEST = 1e-2


class Optimizer:
    """Updates `learned` parameters by steps of `rate` times the root mean square of each as it was at first.

    Batch norms folded in, weights of one layer may be a hundred times those of another, so steps are in proportion.
    Those of matrices are orthogonal (Muon, Jordan et al. 2024): a network that was never attacked has to change in many
    directions, and comes as far in a third of the updates. `fixed` parameters have steps of `fixed_size` times `rate`:
    a gate learns from nothing, and rows of it may have to stay as they are. Gradients are those of all `ranks`; of
    parameters in `shares`, steps are such a share of what they would be.
    """

    def __init__(
        self,
        learned: Sequence[nn.Parameter],
        fixed: Sequence[nn.Parameter],
        fixed_size: float = 1.0,
        ranks: Ranks = ALONE,
        shares: Mapping[nn.Parameter, float] = MappingProxyType({}),
    ) -> None:
        of_fixed = {id(p) for p in fixed}
        self.learned, self.ranks = list(learned), ranks
        of_form: dict[torch.Size, list[nn.Parameter]] = {}
        for p in learned:
            if id(p) not in of_fixed and p.ndim > 1 and p.shape[1] > 1:
                of_form.setdefault(p.shape, []).append(p)
        # Matrices of one shape are one batch: many small products one by one leave a GPU, and many cores, idle.
        self.stacks = list(of_form.values())
        self.momenta = [torch.stack([p.detach().flatten(1) for p in stack]).zero_() for stack in self.stacks]
        chosen = {id(p) for stack in self.stacks for p in stack}
        rest = [p for p in learned if id(p) not in chosen]
        self.sizes = {id(p): (fixed_size if id(p) in of_fixed else _size(p)) * shares.get(p, 1.0) for p in self.learned}
        groups: list[dict[str, Any]] = [
            # Nothing says that biases should be small, least of all those of classes, which say that most are absent.
            {"params": [p], "weight_decay": 0.0 if id(p) in of_fixed or p.ndim < 2 else DECAY}
            for p in rest
        ]
        self.adam = torch.optim.AdamW(groups, fused=True) if rest else None

    def update(self, loss: Tensor, rate: float) -> None:
        """One step against the gradient of a loss, of which each of the ranks has a summand."""
        for parameter in self.learned:
            parameter.grad = None
        loss.backward()
        self.ranks.sum_gradients(self.learned)
        nn.utils.clip_grad_norm_(self.learned, CLIP)
        with torch.no_grad():
            for stack, momentum in zip(self.stacks, self.momenta, strict=True):
                gradient = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in stack]).flatten(2)
                momentum.lerp_(gradient, 1 - MOMENTUM)
                steps = orthogonal(gradient.lerp_(momentum, MOMENTUM)).view(len(stack), *stack[0].shape)
                for parameter, step in zip(stack, steps.unbind(), strict=True):
                    length = rate * self.sizes[id(parameter)]
                    parameter.mul_(1 - DECAY * length).sub_(step, alpha=length)
        if self.adam:
            for group in self.adam.param_groups:
                group["lr"] = rate * self.sizes[id(group["params"][0])]
            self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """All that a later `load_state_dict` needs to go on, sizes of steps included."""
        sizes = [self.sizes[id(p)] for p in self.learned]
        return {"momenta": self.momenta, "sizes": sizes, "adam": self.adam.state_dict() if self.adam else None}

    def fits(self, state: Any) -> bool:
        """Whether a value is a `state_dict` of the same parameters."""
        if not isinstance(state, dict) or state.keys() != {"momenta", "sizes", "adam"}:
            return False
        sizes = [self.sizes[id(p)] for p in self.learned]
        if not (same_form(state["momenta"], self.momenta) and same_form(state["sizes"], sizes)):
            return False
        if self.adam is None:
            return state["adam"] is None
        adam = state["adam"].get("state") if isinstance(state["adam"], dict) else None
        rest = [group["params"][0] for group in self.adam.param_groups]
        return isinstance(adam, dict) and all(
            type(i) is int
            and 0 <= i < len(rest)
            and same_form(one, {"step": torch.zeros(()), "exp_avg": rest[i], "exp_avg_sq": rest[i]})
            for i, one in adam.items()
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict` that `fits`."""
        for momentum, saved in zip(self.momenta, state["momenta"], strict=True):
            momentum.copy_(saved)
        self.sizes = {id(p): size for p, size in zip(self.learned, state["sizes"], strict=True)}
        if self.adam:  # its options are ours
            self.adam.load_state_dict(self.adam.state_dict() | {"state": state["adam"]["state"]})


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearly orthogonal matrices nearest to some, float32 [B, R, C], scaled to a root mean square of about 1."""
    rows, columns = matrices.shape[1:]
    x = matrices.mT if rows > columns else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.bfloat16() if bf16_helps(x.device) else x
    a, b, c = QUINTIC
    for _ in range(QUINTIC_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if rows > columns else x).float() * max(rows, columns) ** 0.5


def _size(parameter: Tensor) -> float:
    return max(float(parameter.detach().square().mean().sqrt()), SMALLEST)
