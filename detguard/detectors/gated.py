"""The gated ensemble: one trunk, K experts (copies of the rest of a detector), and a gate that weighs them."""

import copy
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad
from typing_extensions import override

from detguard import DetguardError
from detguard.detections import Candidates, Detections
from detguard.detectors.base import Detector, Family
from detguard.detectors.fusion import Fusion, average, parse_fusion
from detguard.detectors.shared import HEAD, WHOLE, Shared, unshared
from detguard.detectors.sparse import add_sparse, drop_sparse, fit_sparse
from detguard.detectors.ultralytics import decode, head_outputs, run_layers
from detguard.photos import PADDING_LEVEL, Letterbox, Source

EXPERTS = ("normal", "hard", "adversarial")
MOST_EXPERTS = 64
# Channels of the gate's first layer.
WIDTH = 32
# Of experts that were evaluated, by number: what their layers before the head made of the frames.
Ran = dict[int, tuple[Any, dict[int, Tensor]]]
# Where the logit of a new expert begins, that of all others being 0: e^-10 of their weight.
UNASKED = 10.0


def detail(frames: Tensor) -> Tensor:
    """Frames, [B, 3, H, W] in 0..1, and the logarithm of how far each pixel is from its neighbours, [B, 6, H, W].

    Noise and blur change the second most, and a small network does not find it by itself: told apart by a gate that was
    shown 3,200 clean and 3,200 corrupted frames, 79 % were right by it, 61 % by the frames alone.
    """
    near = _neighbours(frames) / _neighbours(torch.ones_like(frames[:1, :1]))
    return torch.cat([4 * (frames - 0.45), ((frames - near).abs() + 1e-3).log() + 3], 1)


def _neighbours(x: Tensor) -> Tensor:
    """The sum of the 3 x 3 values around each that are within the frame; `avg_pool2d` takes twice as long."""
    x = pad(x, (1, 1, 1, 1))
    x = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    return x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]


def content(frames: Tensor) -> Tensor:
    """Where frames, [B, 3, H, W] in 0..1, show the photo and not the padding around it, 1 or 0, [B, 1, H, W]."""
    return ((frames * 255 - PADDING_LEVEL).abs() > 0.25).any(1, keepdim=True).to(frames.dtype)


def pooled(maps: Tensor, where: Tensor) -> Tensor:
    """Mean and spread of each channel of maps, [B, C, h, w], over the photo, as `content` says; [B, 2 * C].

    Padding is another at each shape, and in squares, which training shows.
    """
    weights = avg_pool2d(where, where.shape[-1] // maps.shape[-1]).flatten(2)
    weights, values = weights / weights.sum(2, keepdim=True).clamp(min=1e-6), maps.flatten(2)
    mean = (values * weights).sum(2, keepdim=True)
    spread = ((values - mean).square() * weights).sum(2)
    return torch.cat([mean[:, :, 0], (spread + 1e-5).sqrt()], 1)


def average_among(answers: Mapping[int, dict[str, Any]], logits: Tensor) -> dict[str, Any]:
    """The average of some experts' raw outputs, by number, with the gate's weights among them, of its logits [B, K]."""
    weights = torch.stack([logits[:, expert] for expert in answers], 1).log_softmax(1)
    return average([(None, raw) for raw in answers.values()], weights)


# YOLOv6 learns how.
UPSAMPLING = (nn.Upsample, nn.ConvTranspose2d)


def backbone_end(layers: Sequence[Any]) -> int:
    """The number of the first layer of the neck, that of the first upsampling; of the head where there is none."""
    return next((i for i, layer in enumerate(layers) if isinstance(layer, UPSAMPLING)), len(layers) - 1)


class Gate(nn.Module):
    """A small network from the detail of frames, [B, 6, H, W], to one logit per expert, [B, K]."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((6, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, 2 * WIDTH)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(4 * WIDTH, experts)

    def forward(self, x: Tensor) -> Tensor:
        """The gate's logits, float32 [B, K], one per expert."""
        return self.out(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Mean and spread of the last map, [B, 4 * WIDTH], of which the logits are a linear map."""
        x = self.layers(x).flatten(2)
        return torch.cat([x.mean(2), (x.var(2) + 1e-5).sqrt()], 1)


class GatedNetwork(nn.Module):
    """Layers `[:split]` of a fused detection model once, the rest K times, and the gate.

    names: what each expert is for. top_k: how many experts answer for a frame, by gate logit; the others weigh exactly
    0 and are not computed. fusion: how the experts' answers become one, as `parse_fusion` reads it; robust in it is the
    adversarial expert, or the first where none is called so. sparse: the numbers of experts with mean sparsity. shared:
    by number, experts that share weights with one before them; `experts` holds what each has of its own. grown: how
    many of the last were added since: what the robust expert sees of a photo says how far each is asked before the gate
    weighs the rest, and where the fusion rule has a leader, they lead with it.
    """

    def __init__(
        self,
        model: Any,
        split: int,
        names: Sequence[str] = EXPERTS,
        top_k: int | None = None,
        fusion: str = "average:0",
        sparse: Sequence[int] = (),
        shared: Mapping[int, Shared] = MappingProxyType({}),
        grown: int = 0,
    ) -> None:
        super().__init__()
        layers = list(model.model)
        if not 0 <= split < len(layers):
            raise DetguardError(f"`split` {split}: expected 0 (whole networks) to {len(layers) - 1} (heads only)")
        if not 1 <= len(names) <= MOST_EXPERTS:
            raise DetguardError(f"a gated ensemble has 1 to {MOST_EXPERTS} experts")
        self.split, self.names, self.fusion = split, list(names), str(parse_fusion(fusion))
        self.top_k = None if top_k is None or top_k >= len(names) else max(1, top_k)
        self.save = set(model.save)
        self.class_names = {int(k): str(v) for k, v in model.names.items()}
        self.trunk = nn.ModuleList(copy.deepcopy(layers[:split]))
        drop_sparse(self.trunk)
        self.sparse, self.shared, self.grown = sorted(sparse), dict(shared), grown
        self.experts = nn.ModuleList()
        for expert in range(len(names)):
            if expert in self.shared:  # sparse where the other one is
                self.experts.append(self._own(self.shared[expert]))
                continue
            self.experts.append(nn.ModuleList(copy.deepcopy(layers[split:])))
            drop_sparse(self.experts[expert])
            if expert in self.sparse:
                add_sparse(self.experts[expert])
        self.gate = Gate(len(names) - grown)
        self.kinds = nn.Linear(self._kind_features(), grown) if grown else None

    def forward(self, frames: Tensor, route: int | Sequence[int] | None = None) -> tuple[dict[str, Any], Tensor]:
        """The fused raw outputs of the head and the gate's logits [B, K].

        route: one expert alone, or the average of several, by the gate's weights among them and by no rule.
        raw["maps"]: the feature maps that later layers use, by layer; of the trunk alone where experts are fused.
        raw["experts"], where all are fused: the `Outputs` of each.
        """
        last, saved = run_layers(self.trunk, frames, {}, self.save)
        # A single expert needs no gate, which would cost a sixth of a nano network.
        alone = len(self.experts) == 1
        logits = frames.new_zeros(frames.shape[0], 1) if alone else self.gate(detail(frames))
        ran: Ran = {}
        if self.kinds is not None:
            maps = self._kind_map(last, saved, ran if route is None else None)
            logits = self._with_kinds(logits, pooled(maps, content(frames)))
        logits = logits.to(frames.dtype)  # where autocast made less of them
        if isinstance(route, int):
            return self._run(route, last, saved), logits
        if route is not None:
            among = {expert: self._run(expert, last, saved, ran=ran) for expert in route}
            return average_among(among, logits) | {"maps": saved}, logits
        if alone:
            raw = self._run(0, last, saved)
            return raw | {"maps": saved, "experts": [(None, raw)]}, logits
        log_weights = self.log_weights(logits)
        outputs = [self._answer(expert, last, saved, log_weights, ran) for expert in range(len(self.experts))]
        fused = self.rule.fuse(outputs, log_weights, self.robust, self.leaders)
        return fused | {"maps": saved, "experts": outputs}, logits

    def backbone(self, expert: int) -> list[Any]:
        """The layers before the neck, by the way of one expert."""
        layers: list[Any] = self.single(expert).model
        return layers[: backbone_end(layers)]

    def _answer(
        self, expert: int, last: Tensor, saved: dict[int, Tensor], log_weights: Tensor, ran: Ran
    ) -> tuple[Tensor | None, dict[str, Any] | None]:
        """The rows that an expert is evaluated on, None for all, and its outputs."""
        # A traced graph has no branches: all experts answer in it, and those beyond the top k weigh 0.
        everywhere = torch.jit.is_tracing()  # type: ignore[attr-defined]
        if self.top_k is None or everywhere or (self.rule.leads and expert == self.robust):
            return None, self._run(expert, last, saved, ran=ran)
        rows = (log_weights[:, expert] > -torch.inf).nonzero()[:, 0]
        return rows, self._run(expert, last, saved, rows) if len(rows) else None

    def kind_features(self, frames: Tensor, where: Tensor | None = None) -> Tensor:
        """What the logits of grown experts are a linear map of, [B, F]: mean and spread of the robust expert's maps.

        where: as `content` says, which is asked by default; an attack on whole frames changes their padding.

        Attacks hardly change what it sees, for it was trained to that: of photos that were attacked at two levels so as
        to look like another kind, the gate's own features took 33 to 100 % for it, these none in fog, a third in snow.
        """
        last, saved = run_layers(self.trunk, frames, {}, self.save)
        return pooled(self._kind_map(last, saved, None), content(frames) if where is None else where)

    @property
    def _tap(self) -> int:
        """The layer at whose maps kinds are told apart: the last but one that the neck takes from the backbone."""
        layers = [*self.trunk, *self._expert(self.robust)]
        end = backbone_end(layers)
        return max((layer for layer in self.save if layer < end - 1), default=0)

    def _kind_map(self, last: Tensor, saved: dict[int, Tensor], ran: Ran | None) -> Tensor:
        """The map of the robust expert; ran: where that is evaluated anyway, what it made is kept there."""
        tap, robust = self._tap, self.robust
        if tap < self.split:
            return saved[tap]
        if ran is not None and self.rule.leads and len(self.experts) > 1:
            return self._before_head(robust, last, saved, ran)[1][tap]
        return run_layers(self._expert(robust)[: tap + 1 - self.split], last, dict(saved), {*self.save, tap})[1][tap]

    def _kind_features(self) -> int:
        with torch.no_grad():
            like = next(self.experts[self.robust].parameters())
            return self.kind_features(torch.zeros(1, 3, 64, 64).to(like)).shape[1]

    def _with_kinds(self, logits: Tensor, features: Tensor) -> Tensor:
        """Logits of all experts: the weights of grown ones by what the robust one sees, the gate's of what is left."""
        assert self.kinds is not None
        new = self.kinds(features)
        log_weights = torch.cat([torch.zeros_like(new[:, :1]), new], 1).log_softmax(1)
        return torch.cat([logits.log_softmax(1) + log_weights[:, :1], log_weights[:, 1:]], 1)

    def _run(
        self,
        expert: int,
        last: Tensor,
        saved: dict[int, Tensor],
        rows: Tensor | None = None,
        ran: Ran | None = None,
    ) -> dict[str, Any]:
        if rows is not None:
            last = last[rows]
            # Of YOLOv9e some layers give several maps.
            saved = {i: x[rows] if isinstance(x, Tensor) else tuple(one[rows] for one in x) for i, x in saved.items()}
        last, saved = self._before_head(expert, last, saved, {} if ran is None else ran)
        return {**head_outputs(self._expert(expert)[-1], last, saved), "maps": saved}

    def _before_head(
        self, expert: int, last: Tensor, saved: dict[int, Tensor], ran: Ran
    ) -> tuple[Any, dict[int, Tensor]]:
        """What the layers of an expert before its head make of frames, once for all heads."""
        while (shared := self.shared.get(expert)) and shared.form == HEAD:
            expert = shared.of
        if expert not in ran:
            ran[expert] = run_layers(self._expert(expert)[:-1], last, dict(saved), self.save)
        return ran[expert]

    def _own(self, shared: Shared) -> nn.ModuleList:
        return shared.own(self._expert(shared.of))

    def log_weights(self, logits: Tensor) -> Tensor:
        """Logarithm of each expert's weight, [B, K], from the gate's logits; -inf beyond the top k."""
        if self.top_k is not None:
            beyond = logits < logits.topk(self.top_k, 1).values[:, -1:]
            logits = logits.masked_fill(beyond, -torch.inf)
        return self.rule.log_weights(logits.log_softmax(1), self.robust)

    def grow(self, names: Sequence[str], source: int, form: str = WHOLE) -> None:
        """Add experts, each a copy of expert `source`, that at first are given next to no weight.

        The gate, and how far those that were grown before are asked, stay as they are, bit by bit. form: one of FORMS,
        what they do not share with it.

        Raises:
            DetguardError: there would be more than MOST_EXPERTS.
        """
        count = len(self.names)
        if count + len(names) > MOST_EXPERTS:
            raise DetguardError(f"{count} experts and {len(names)} more: at most {MOST_EXPERTS}")
        if not names:
            return
        old, like = self.kinds, self.gate.out.weight
        self.kinds = nn.Linear(self._kind_features(), self.grown + len(names)).to(like)
        with torch.no_grad():
            self.kinds.weight.zero_()
            self.kinds.bias.fill_(-UNASKED)
            if old is not None:
                self.kinds.weight[: self.grown] = old.weight
                self.kinds.bias[: self.grown] = old.bias
        if source in self.sparse:
            self.sparse += range(count, count + len(names))
        for expert in range(count, count + len(names)):
            if form == WHOLE:
                self.experts.append(unshared(self._expert(source)))
            else:
                self.shared[expert] = Shared(form, source)
                self.experts.append(self._own(self.shared[expert]))
        self.names += names
        self.grown += len(names)

    @property
    def leaders(self) -> range:
        """The numbers of the experts that were grown."""
        return range(len(self.names) - self.grown, len(self.names))

    def sparsen(self, frames: Iterable[Tensor], reach: float) -> None:
        """Have the robust expert set values to the mean of their channel within `reach` standard deviations of it.

        frames: float32 [B, 3, H, W] each, of clean photos, on which means and deviations are measured.
        """
        self.drop_sparse()
        self.sparse, layers = [self.robust], self.experts[self.robust]
        add_sparse(layers)
        fit_sparse(partial(self, route=self.robust), layers, frames, reach)

    def drop_sparse(self) -> None:
        """Have no expert do so, as they are while they learn."""
        drop_sparse(self)
        self.sparse = []

    def single(self, expert: int | None = None) -> Any:
        """The layers of the network of one expert, by default the only one, as the constructor takes those of a model.

        Raises:
            DetguardError: there are several experts, and none is named.
        """
        if expert is None and len(self.experts) > 1:
            raise DetguardError(f"a gated ensemble of {len(self.experts)} experts; expected one network")
        layers = [*self.trunk, *self._expert(expert or 0)]
        return SimpleNamespace(model=layers, save=self.save, names=self.class_names)

    @property
    def rule(self) -> Fusion:
        """The fusion rule by which the experts' answers become one."""
        return parse_fusion(self.fusion)

    @property
    def robust(self) -> int:
        """The number of the adversarial expert, or of the first where none is called so."""
        return self.names.index(EXPERTS[-1]) if EXPERTS[-1] in self.names else 0

    @property
    def head(self) -> Any:
        """The head of the first expert; all are of one kind."""
        return self.head_of(0)

    def head_of(self, number: int) -> Any:
        """The detection head of one expert."""
        return self._expert(number)[-1]

    def _expert(self, number: int) -> list[Any]:
        own: Any = self.experts[number]
        shared = self.shared.get(number)
        return shared.whole(self._expert(shared.of), own) if shared else list(own)

    def unshared(self) -> "GatedNetwork":
        """A network that computes the same, and whose experts' convolutions share nothing."""
        network = copy.copy(self)
        network._modules = self._modules | {"experts": unshared(list(self.experts))}
        return network


class GatedDetector(Detector):
    """A frozen gated ensemble; `route` forces one expert, so that attacks can try each way through it.

    `top_k` and `fusion` become the network's own, where they are given.
    """

    hardened = True

    def __init__(
        self,
        network: GatedNetwork,
        name: str,
        imgsz: int,
        device: str = "cpu",
        top_k: int | None = None,
        fusion: str | None = None,
    ) -> None:
        if top_k is not None:
            network.top_k = top_k if top_k < len(network.names) else None
        if fusion is not None:
            network.fusion = str(parse_fusion(fusion))
        self.name, self.class_names = name, network.class_names
        self.stride = max(int(network.head.stride.max()), 32)
        self.imgsz = math.ceil(imgsz / self.stride) * self.stride
        self.model: Any = network.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        self.device = torch.device(device)
        self.route: int | None = None
        # One expert alone answers as any detector does.
        self.experts = tuple(network.names) if len(network.names) > 1 else ()
        self.robust, self.leaders = network.robust, tuple(network.leaders)

    @override
    def variants(self) -> dict[str, Detector]:
        """route:I, each expert alone, whatever the gate says; dense, all experts, where top-k leaves some out."""
        routes: dict[str, Detector] = {f"route:{i}": self.through(i) for i in range(len(self.experts))}
        return routes | ({"dense": self.dense()} if self.experts and self.model.top_k else {})

    def through(self, route: int) -> "GatedDetector":
        """The same network through one expert alone."""
        forced = copy.copy(self)
        forced.route, forced.name, forced.experts = route, f"{self.name}, {self.model.names[route]} expert", ()
        return forced

    @override
    def state_hash(self) -> str:
        """As of any detector, with the expert that is forced; how experts are put together is the network's own."""
        parts = [super().state_hash(), str(self.route)]
        parts += [str(self.model.shared)] * bool(self.model.shared)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @override
    def letterbox(self, photo_shape: tuple[int, int]) -> Letterbox:
        return Letterbox.fit(photo_shape, self.imgsz, self.stride)

    def dense(self) -> "GatedDetector":
        """The same network with all experts computed, whatever its top k: a loss without its steps."""
        network = copy.copy(self.model)
        network.top_k = None
        whole = copy.copy(self)
        whole.model, whole.name = network, f"{self.name}, all experts"
        return whole

    @override
    def candidates(self, frames: Tensor) -> Candidates:
        raw, gate = self.model(frames, self.route)
        if len(self.model.names) == 1:
            return decode(self.model.head, raw, gate)
        if self.route is None:
            experts = self.model.log_weights(gate).exp()
        else:
            experts = torch.zeros_like(gate)
            experts[:, self.route] = 1
        return replace(decode(self.model.head, raw, gate), experts=experts)

    @override
    def predict(self, source: Source, conf: float, iou: float | None = None) -> Detections:
        return self.detect([source], conf, iou)[0]


class Gated(Family):
    """Gated ensembles: known by the card beside their weights, and by no official name."""

    runs = GatedDetector
    options: ClassVar = frozenset({"top_k", "fusion"})

    @override
    def owns(self, network: nn.Module) -> bool:
        return isinstance(network, GatedNetwork)


def gated_card(network: GatedNetwork) -> dict[str, Any]:
    """What the json beside the weights says of the ensemble; `build_gated` reads it."""
    return {
        "split": network.split,
        "experts": network.names,
        "top_k": network.top_k,
        "fusion": network.fusion,
        "sparse": network.sparse,
        "shared": {str(expert): shared.entry() for expert, shared in network.shared.items()},
        "grown": network.grown,
    }


def build_gated(model: Any, card: dict[str, Any], most: int) -> GatedNetwork:
    """The ensemble that a `gated_card` describes, on a fused model, of at most `most` weights.

    Raises:
        DetguardError: the card is not such a one.
    """
    try:
        names = [str(name) for name in card["experts"]]
        top_k = None if card["top_k"] is None else int(card["top_k"])
        split, grown = int(card["split"]), int(card["grown"])
        sparse = [int(expert) for expert in card["sparse"]]
        if not 0 <= grown < len(names) or not set(sparse) <= set(range(len(names))):
            raise ValueError("it has no such sparse or grown experts")
        entries = card["shared"]
        shared = {number: Shared.read(entries[key], number) for key in entries for number in [int(key)]}
        if not shared.keys() <= set(range(1, len(names))):
            raise ValueError("it has no such experts that share")
        layers = list(model.model[split:])
        of_whole = sum(p.numel() for layer in layers for p in layer.parameters())
        of_shared = sum(one.weights(layers) for one in shared.values())
        if (len(names) - len(shared)) * of_whole + of_shared > most:
            raise ValueError("it has more experts than the weights beside it")
        return GatedNetwork(model, split, names, top_k, str(card["fusion"]), sparse, shared, grown)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise DetguardError(f"the card's 'gated' entry cannot be read ({error})") from error
