import copy
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detguard import DetguardError
from detguard.data.batches import PhotoSet, batches, draw_frame, read_photos
from detguard.data.stream import Labelled
from detguard.detectors.gated import GatedNetwork, backbone_end
from detguard.detectors.load import build_model, fused
from detguard.detectors.ultralytics import decode
from detguard.hardening.adversary import Adversary, perturb
from detguard.hardening.losses import MAPS, Goal, feature_variances, imitation_loss, label_loss
from detguard.hardening.train import (
    Layout,
    Lesson,
    Setting,
    Stage,
    _losses,
    _single,
    learned_parameters,
    train_stage,
    worst,
)
from detguard.photos import PADDING_LEVEL, encode_png, read_photo
from detguard.ranks import ALONE, Ranks
from detguard.transforms.base import Transform

SETTING = Setting(batch=4, size=64, save_every=1e9)
MIXED = (0.25, 0.25, 0.5)


@pytest.fixture(scope="module")
def source(bus_file):
    return read_photos([([bus_file, bus_file.with_name("zidane.jpg")], 1.0)], SETTING.size)[0]


@pytest.fixture(scope="module")
def mislabelled(bus_file, bundled):
    """Photos whose objects are labelled as of another class than the detector says."""
    files = [bus_file, bus_file.with_name("zidane.jpg")]
    found = [bundled.detect([read_photo(file)], 0.3)[0] for file in files]
    labels = [replace(one, classes=one.classes + 1) for one in found]
    labelled = [Labelled(*pair) for pair in zip(files, labels, strict=True)]
    return read_photos([(labelled, 1.0)], SETTING.size)[0]


@pytest.fixture
def undefended(bundled):
    return GatedNetwork(bundled.model, 0, ("undefended",)).requires_grad_(False)


@pytest.fixture
def network(bundled_model):
    return GatedNetwork(fused(bundled_model), split=11)


def make_frames(source, count, size, zoom=1.0):
    return np.stack([draw_frame(source, size, np.random.default_rng(i), zoom)[0] for i in range(count)])


def stage(**options):
    return Stage(**{"name": "test", "number": 4, "route": None, "trunk": True, "share": MIXED} | options)


def test_frames_are_the_same_whichever_processes_make_them(source):
    (alone,) = batches(source, 5, 64, 5, 2, 3, hard=3)
    for rank in range(2):
        ranks = Ranks(rank=rank, count=2)
        (part,) = list(batches(source, 5, 64, 5, 1, 3, hard=3, workers=2, ranks=ranks))[1:]
        assert torch.equal(part.shown, alone.shown[rank::2])
        assert part.hard == (2, 1)[rank]


def test_frames_are_the_same_for_the_same_seed_and_whatever_came_before(source):
    ahead = list(batches(source, 3, 64, 5, 0, 4, hard=1))
    (later,) = batches(source, 3, 64, 5, 3, 4, hard=1)
    assert torch.equal(ahead[3].shown, later.shown)
    assert not torch.equal(ahead[2].clean, ahead[3].clean)
    assert torch.equal(later.clean[1:], later.shown[1:])
    assert not torch.equal(later.clean[0], later.shown[0])


def test_photos_are_drawn_by_their_share():
    photos = [np.full((40, 40, 3), value, np.uint8) for value in (10, 250)]
    rare = PhotoSet.of(map(encode_png, photos), [0.1, 0.9])
    frames = make_frames(rare, 60, 32)
    assert ((frames > 180) & (frames != 114)).mean() > 4 * (frames < 60).mean()


def test_unreadable_photos_are_named_and_the_rest_is_used(bus_file, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    found, messages = read_photos([([tmp_path / "broken.jpg", bus_file], 0.3), ([bus_file], 0.7)], 96)
    assert found.probability.tolist() == pytest.approx([0.3, 0.7])
    assert max(found.photo(0).shape) == 144
    assert "broken.jpg" in messages[0]


def test_small_frames_show_photos_at_the_scale_of_large_ones():
    stripes = np.zeros((96, 96, 3), np.uint8)
    stripes[:, np.arange(96) // 8 % 2 == 0] = 250
    source = PhotoSet.of([encode_png(stripes)], [1.0])

    def stripe(size, zoom):
        frames = make_frames(source, 60, size, zoom)
        return np.median(
            np.concatenate([np.diff(np.flatnonzero(np.diff(row > 125))) for row in frames[:, size // 3, :, 0]])
        )

    assert stripe(96, 2.0) == pytest.approx(stripe(192, 1.0), rel=0.15)
    assert stripe(96, 1.0) == pytest.approx(stripe(192, 1.0) / 2, rel=0.15)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 32), st.sampled_from([("pgd", 1), ("pgd", 4), ("fgsm", 1), ("free", 2)]), st.integers(0, 9))
def test_perturbed_frames_stay_in_the_budget_and_in_range(eps, method, seed):
    frames = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    weights = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed + 1))
    adversary = Adversary(eps, method[1], method[0])
    torch.manual_seed(seed)
    moved = perturb(frames, lambda x: (x * weights).flatten(1).sum(1), adversary)
    assert (moved - frames).abs().max() <= eps / 255 + 1e-6
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert ((moved - frames) * weights).sum() >= -1e-4


@pytest.mark.parametrize("method", [("pgd", 4), ("fgsm", 1), ("free", 2)])
def test_padding_is_not_attacked_for_attacks_on_photos_do_not_reach_it(method):
    frames = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    frames[..., :3] = PADDING_LEVEL / 255
    moved = perturb(frames, lambda x: x.flatten(1).sum(1), Adversary(8, method[1], method[0]))
    changed = moved != frames
    assert not changed[..., :3].any()
    assert changed[..., 3:].all(1).float().mean() > 0.8


def test_fgsm_is_one_full_step_from_the_frame_itself():
    frames, weights = torch.full((1, 3, 4, 4), 0.5), torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    adversary = Adversary(8, 1, "fgsm")
    moved = perturb(frames, lambda x: (x * weights).flatten(1).sum(1), adversary)
    assert torch.allclose(moved, frames + 8 / 255 * weights.sign())


def test_the_worst_attack_is_chosen_frame_by_frame():
    attacks = [torch.tensor([1.0, 5.0, 0.0]).view(3, 1, 1, 1), torch.tensor([2.0, 4.0, 1.0]).view(3, 1, 1, 1)]
    assert worst(attacks, lambda x: x.flatten(1).sum(1)).flatten().tolist() == [2, 5, 1]


def test_the_budget_grows_over_the_ramp():
    growing = stage(number=10, ramp=0.5, adversary=Adversary(4))
    assert [growing.adversary_at(done).eps for done in (0.1, 0.5, 1)] == [pytest.approx(0.8), 4, 4]


@pytest.mark.parametrize("batch", range(1, 12))
@pytest.mark.parametrize("share", [(0.7, 0.3, 0.0), (0.5, 0.5, 0.0), (0.25, 0.25, 0.5), (0.3, 0.7, 0.0)])
def test_no_batch_has_more_frames_than_it_has_or_attacked_ones_where_none_are_to_be(share, batch):
    layout = Layout.of(stage(share=share), batch)
    assert 0 <= layout.hard <= batch
    assert 0 <= layout.attacked <= batch - layout.hard
    assert layout.attacked == 0 or share[2]


def steps(network, undefended, source, one, samples=None):
    """What a batch tells of a stage, without an update."""
    layout = Layout.of(one, SETTING.batch)
    (batch,) = batches(source, 4, 64, 0, 0, 1, layout.hard, samples=samples, sampled=layout.sampled)
    return Lesson(network, undefended, batch, one, SETTING, 0, 1.0).learn(lambda loss: None)


def test_a_stage_of_hard_frames_shows_those_of_the_chosen_corruptions(network, undefended, source, tmp_path):
    one, seen = stage(share=(0.0, 1.0, 0.0), number=1), {network: [], undefended: []}
    for model, frames in seen.items():
        first = model.trunk[0] if model.split else model.experts[0][0]
        first.register_forward_pre_hook(lambda _, given, frames=frames: frames.append(given[0].detach().clone()))
    setting = replace(SETTING, corruptions=("brightness",))
    train_stage(network, undefended, source, one, setting, tmp_path / "last.pt")
    (clean,), (shown,) = seen[undefended], seen[network]
    inside = (clean * 255 - PADDING_LEVEL).abs().amax(1) > 0.25
    assert ((shown - clean).mean(1)[inside] > -0.05).float().mean() > 0.99
    assert all(float((more - less).mean()) > 0.02 for more, less in zip(shown, clean, strict=True))


def test_a_lesson_attacks_with_the_budget_and_the_margin_of_its_time(network, undefended, source):
    one = stage(number=10, ramp=0.5, adversary=Adversary(4), margins=(0.0, 1.0, 10.0))
    (batch,) = batches(source, 4, 64, 0, 0, 1, Layout.of(one, SETTING.batch).hard)
    lessons = [Lesson(network, undefended, batch, one, SETTING, number, (number + 1) / 10) for number in range(3)]
    assert [lesson.adversary.eps for lesson in lessons] == pytest.approx([0.8, 1.6, 2.4])
    assert [lesson.margin for lesson in lessons] == [0.0, 1.0, 10.0]


@pytest.mark.parametrize("route", [None, 1])
def test_attacks_with_a_margin_fool_the_gate_too(network, undefended, source, route):
    told = [
        steps(network, undefended, source, stage(route=route, gate=0.1, margins=(margin,), adversary=Adversary(32)))
        for margin in (0.0, 1e5)
    ]
    assert told[1]["gate adversarial 0"] > told[0]["gate adversarial 0"] + 1e-3


class Told(Transform):
    """One that changes nothing and counts."""

    kind, example = "told", "told"

    def __init__(self):
        self.times = 0

    @classmethod
    def parse(cls, value):
        return cls()

    def __call__(self, photo):
        self.times += 1
        return photo


@pytest.mark.parametrize(("method", "times"), [("pgd", 3), ("free", 2)])
def test_attacked_frames_go_through_a_transform_in_every_step_and_when_they_are_learned_from(
    network, undefended, source, method, times
):
    told = Told()
    one = stage(share=(0.0, 0.25, 0.75), adversary=Adversary(4, 2, method), transforms=(told,))
    steps(network, undefended, source, one)
    generators = [np.random.default_rng((0, 0, i, 1)) for i in (1, 2, 3)]
    drawn = [int(rng.integers(2)) for rng in generators for _ in range(times)]
    assert told.times == sum(drawn) > 0


def test_free_training_learns_from_every_step_of_the_attack(network, undefended, source, tmp_path):
    told = []

    def updates(method):
        one = stage(number=1, share=(0.0, 0.25, 0.75), adversary=Adversary(16, 2, method))
        train_stage(
            network,
            undefended,
            source,
            one,
            SETTING,
            tmp_path / f"{method}.pt",
            lambda number, done, losses: told.append(losses) or True,
        )

    for method in ("pgd", "free"):
        with pytest.raises(KeyboardInterrupt):
            updates(method)
    states = [torch.load(tmp_path / f"{method}.pt")["optimizer"]["adam"] for method in ("pgd", "free")]
    assert [state["state"][0]["step"] for state in states] == [1, 3]
    assert told[1]["adversarial"] > told[1]["normal"]


@pytest.mark.parametrize(
    ("options", "learns"),
    [
        ({"route": 1, "trunk": False}, {"experts.1"}),
        ({"route": 2, "trunk": True}, {"experts.2", "trunk"}),
        ({"route": 2, "trunk": True, "backbone": 0.0}, {"experts.2"}),
        ({"experts": (2,), "trunk": False}, {"experts.2", "gate"}),
        ({}, {"experts.0", "experts.1", "experts.2", "trunk", "gate"}),
    ],
)
def test_a_stage_changes_what_it_is_told_to_and_nothing_else(network, undefended, source, tmp_path, options, learns):
    before = copy.deepcopy(network.state_dict())
    train_stage(network, undefended, source, stage(number=2, **options), SETTING, tmp_path / "last.pt")
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    parts = {".".join(k.split(".")[: 2 if k.startswith("experts") else 1]) for k in changed}
    assert parts == learns


def test_decoding_constants_never_learn(network):
    learned = {id(p) for p in learned_parameters(network, stage())}
    constants = [p for n, p in network.named_parameters() if "dfl" in n]
    assert constants
    assert not any(id(p) in learned for p in constants)


@pytest.mark.parametrize(("method", "learn"), [("pgd", "teacher"), ("free", "both")])
def test_stopped_and_resumed_it_gives_the_same_weights(bundled_model, undefended, mislabelled, tmp_path, method, learn):
    def made():
        torch.manual_seed(0)
        return GatedNetwork(fused(bundled_model), split=11)

    source, adversary = mislabelled, Adversary(4, 2, method)
    wanted = stage(number=3, margins=(0.0, 1.0), gate=0.1, adversary=adversary, learn=learn)
    whole = train_stage(made(), undefended, source, wanted, SETTING, tmp_path / "a.pt").state_dict()
    with pytest.raises(KeyboardInterrupt):
        train_stage(
            made(), undefended, source, wanted, SETTING, tmp_path / "b.pt", lambda number, done, losses: number == 1
        )
    resumed = train_stage(made(), undefended, source, wanted, SETTING, tmp_path / "b.pt").state_dict()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_process_of_batches_that_is_killed_in_training_changes_nothing(bundled_model, undefended, source, tmp_path):
    def trained(name, on_batch=None):
        torch.manual_seed(0)
        network = GatedNetwork(fused(bundled_model), split=11)
        train_stage(network, undefended, source, stage(number=3), SETTING, tmp_path / name, on_batch)
        return network.state_dict()

    killed = []

    def kill(number, done, losses):
        killed.extend(process.pid for process in multiprocessing.active_children())
        if number == 0:
            os.kill(killed[-1], signal.SIGKILL)

    whole, broken = trained("a.pt"), trained("b.pt", kill)
    assert len(set(killed)) == 2
    assert all(torch.equal(whole[k], broken[k]) for k in whole)


def attacked(frames, harm):
    """The mean loss of frames under an attack that raises it."""
    torch.manual_seed(1)
    moved = perturb(frames, harm, Adversary(4, 5))
    with torch.no_grad():
        return float(harm(moved).mean())


@pytest.mark.parametrize(
    "options",
    [
        {"adversary": Adversary(4, 2)},
        {"adversary": Adversary(4, 2), "aims": ("class", "box")},
        {"adversary": Adversary(4, 2, "free")},
    ],
    ids=["pgd", "mtd", "free"],
)
def test_training_brings_the_attacked_outputs_nearer_to_the_clean_ones(
    bundled_model, bundled, undefended, source, tmp_path, options
):
    torch.manual_seed(0)
    network = GatedNetwork(fused(bundled_model), split=0, names=("adversarial",))
    batch = next(batches(source, 4, 64, 99, 0, 1))
    with torch.no_grad():
        wanted = bundled.candidates(batch.clean)

    def harm(x):
        return imitation_loss(decode(network.head, network(x, 0)[0]), wanted)

    before = attacked(batch.clean, harm)
    only = stage(**{"number": 12, "route": 0, "share": (0.25, 0, 0.75)} | options)
    train_stage(network, undefended, source, only, SETTING, tmp_path / "last.pt")
    assert attacked(batch.clean, harm) < 0.8 * before


@pytest.mark.parametrize("route", [None, 0])
def test_in_bfloat16_boxes_lie_between_pixels_and_the_gate_speaks_in_single_precision(network, source, route):
    frames = next(batches(source, 2, 128, 0, 0, 1)).clean
    with torch.no_grad():
        found, _ = replace(SETTING, size=128, bf16=True).run(network, frames, route)
    assert {x.dtype for x in (found.boxes, found.logits, found.gate, found.anchors.bins)} == {torch.float32}
    assert (found.boxes != found.boxes.bfloat16()).float().mean() > 0.5
    points = found.anchors.points
    assert torch.equal(points[:, 0].unique()[:3], torch.tensor([4.0, 8, 12]))


@pytest.mark.parametrize(("learn", "aims"), [("labels", ("all",)), ("both", ("class", "box"))])
def test_labels_that_the_teacher_would_not_give_are_learned_under_attack(
    bundled_model, undefended, mislabelled, tmp_path, learn, aims
):
    network = GatedNetwork(fused(bundled_model), split=0, names=("adversarial",))
    batch = next(batches(mislabelled, 4, 64, 99, 0, 1))

    def harm(x):
        return label_loss(SETTING.run(network, x, 0)[0], batch.labels)

    before = attacked(batch.clean, harm)
    only = stage(number=12, route=0, share=(0.25, 0, 0.75), rate=1e-2, learn=learn, aims=aims)
    train_stage(network, undefended, mislabelled, only, SETTING, tmp_path / "last.pt")
    assert attacked(batch.clean, harm) < 0.66 * before  # what imitates alone ends at .78


@pytest.mark.parametrize(("split", "method"), [(0, "pgd"), (22, "free")])
def test_a_backbone_alone_learns_to_make_of_attacked_frames_the_maps_of_clean_ones(
    bundled_model, undefended, source, tmp_path, split, method
):
    torch.manual_seed(0)
    network = GatedNetwork(fused(bundled_model), split, ("normal", "adversarial"))
    start, end = copy.deepcopy(network.state_dict()), backbone_end(list(bundled_model.model))
    batch = next(batches(source, 4, 64, 99, 0, 1))
    with torch.no_grad():
        wanted = SETTING.maps(undefended, batch.clean, 0)
    goal = Goal(maps=wanted, variances=feature_variances(wanted, lambda mean: mean))

    def harm(x):
        return goal.loss(None, SETTING.maps(network, x, 1))

    before = attacked(batch.clean, harm)
    only = stage(number=12, route=1, share=(0.0, 0.25, 0.75), adversary=Adversary(4, 2, method), learn=MAPS, gate=0.3)
    train_stage(network, undefended, source, only, SETTING, tmp_path / "last.pt")
    assert attacked(batch.clean, harm) < 0.8 * before
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, start[k])}
    part = "trunk." if split else "experts.1."
    assert {k.removeprefix(part).split(".")[0] for k in changed} <= set(map(str, range(end)))
    assert len(changed) > 2 * end


def test_a_damaged_checkpoint_is_named(network, undefended, source, tmp_path):
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(DetguardError, match=r"last\.pt: damaged"):
        train_stage(network, undefended, source, stage(), SETTING, tmp_path / "last.pt")


def test_the_gate_learns_each_kind_alike_however_many_a_batch_has(network, source):
    frames = next(batches(source, 2, 64, 0, 0, 1)).shown
    with torch.no_grad():
        found, _ = SETTING.run(network, frames)
    few, many = torch.tensor([1, 0]), torch.tensor([1, 1, 1, 0])
    of_few, of_many = (
        _losses(
            torch.zeros(len(rows)), found.gate[rows], Layout(len(rows), len(rows) - 1, 0).kinds(ALONE), len(rows), 1.0
        )["gate"]
        for rows in (few, many)
    )
    assert float(of_few) == pytest.approx(float(of_many), abs=1e-5)


def test_free_attacks_with_a_margin_fool_the_gate_too(network, undefended, source):
    told = []
    for margin in (0.0, 1e5):
        one = stage(share=(0.0, 0.25, 0.75), gate=0.1, margins=(margin,), adversary=Adversary(32, 2, "free"))
        (batch,) = batches(source, 4, 64, 0, 0, 1, Layout.of(one, 4).hard)
        told.append(Lesson(network, undefended, batch, one, SETTING, 0, 1.0).learn(torch.Tensor.backward))
    assert told[1]["gate adversarial 0"] > told[0]["gate adversarial 0"] + 1e-3


@pytest.mark.parametrize(("architecture", "first"), [("yolov6n.yaml", 11), ("yolov8n.yaml", 10)])
def test_the_neck_begins_where_maps_grow(architecture, first):
    assert backbone_end(build_model(architecture, ["a"]).model) == first


def test_maps_of_layers_that_give_several_are_left_out():
    assert list(_single({3: torch.zeros(1), 10: (torch.zeros(1), torch.zeros(1))})) == [3]


def test_each_kind_teaches_the_gate_its_own_expert_by_the_weight_of_the_stage():
    right = torch.tensor([[0.0, 9, 0], [9, 0, 0], [0, 0, 9]])  # of a hard frame, a normal and an attacked one
    kinds = Layout(3, 1, 1).kinds(ALONE)
    good, bad = (_losses(torch.ones(3), logits, kinds, 3, 0.3) for logits in (right, right.flip(1)))
    assert good["gate"] < 0.01 < 1 < bad["gate"]
    assert float(bad["loss"]) == pytest.approx(1 + 0.3 * float(bad["gate"]))


def test_the_error_of_feature_maps_is_learned_by_its_weight(network, undefended, source):
    one = {"share": (0.5, 0.5, 0.0), "route": 1}
    without, told = (steps(network, undefended, source, stage(**one, features=weight)) for weight in (0.0, 5.0))
    assert told["features"] > 0
    assert float(told["loss"]) == pytest.approx(float(without["loss"] + 5 * told["features"]), rel=1e-4)


def test_crops_are_made_at_the_scale_of_whole_frames(network, undefended, source, tmp_path, monkeypatch):
    asked = []

    def noted(*given):
        asked.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr("detguard.hardening.train.batches", noted)
    with pytest.raises(KeyboardInterrupt):
        train_stage(network, undefended, source, stage(size=32), SETTING, tmp_path / "last.pt")
    assert [(given[2], given[7]) for given in asked] == [(32, 2.0)]


def test_all_experts_learn_whatever_top_k_which_is_what_it_was_afterwards(bundled_model, undefended, source, tmp_path):
    network, asked = GatedNetwork(fused(bundled_model), split=22, top_k=1), []
    train_stage(
        network, undefended, source, stage(number=1), SETTING, tmp_path / "last.pt",
        lambda *_: asked.append(network.top_k),
    )  # fmt: skip
    assert asked == [None]
    assert network.top_k == 1
