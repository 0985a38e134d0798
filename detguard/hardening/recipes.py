"""How a detector can be hardened: as a gated ensemble, or by the baselines of one network."""

from collections.abc import Mapping
from dataclasses import dataclass

from detguard.detectors.gated import EXPERTS

# Options of `Plan` that ensembles alone have, and those of attacks.
OF_ENSEMBLES = frozenset({"mode", "split", "fusion", "top_k", "tune_normal"})
OF_ATTACKS = frozenset({"attack", "steps", "eps", "sparse"})


@dataclass(frozen=True)
class Recipe:
    """Which stages a detector goes through, and what it becomes.

    Attributes:
        stages: each stage that `Plan.stage` knows with its share of the photos, in order; the backbone learns first
            where that is asked for.
        gated: whether experts and a gate become an ensemble; else one network learns.
        attacked: whether attacked photos are seen.
        aims: parts of the loss that attacks raise, of which the most harmful counts per frame.
        attack: the only attack in training that it takes; None: any.
    """

    stages: Mapping[str, float]
    gated: bool = False
    attacked: bool = True
    aims: tuple[str, ...] = ("all",)
    attack: str | None = None

    @property
    def unused(self) -> frozenset[str]:
        """The options of `Plan` that are without effect."""
        return (frozenset() if self.gated else OF_ENSEMBLES) | (frozenset() if self.attacked else OF_ATTACKS)

    def experts(self, name: str) -> tuple[str, ...]:
        """Those of the ensemble, or the one network, which is called by the recipe's `name`."""
        return EXPERTS if self.gated else (name,)


# A shared trunk learns with the adversarial expert: on one that was not made robust, no expert can be. Where the
# backbone learns first, it has a third.
RECIPES = {
    "gated": Recipe({"pretrain": 0.5, "adversarial": 0.7, "normal": 0.05, "hard": 0.2, "joint": 0.05}, gated=True),
    # Madry et al. (2018): one network learns from attacked photos.
    "pgd": Recipe({"pretrain": 0.5, "adversarial": 1.0}),
    # Zhang and Wang (2019): attacks on classes and on boxes, of which the worse counts.
    "mtd": Recipe({"pretrain": 0.5, "adversarial": 1.0}, aims=("class", "box"), attack="pgd"),
    "finetune": Recipe({"finetune": 1.0}, attacked=False),
}
