import copy
import json

import cv2
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detguard import DetguardError
from detguard.attacks.budgets import Linf
from detguard.attacks.group import AttackOptions, attack_group
from detguard.detectors.gated import GatedDetector, GatedNetwork
from detguard.detectors.load import fused, load_detector, load_model, save_gated
from detguard.evaluation.attacks import attack_objective, attacks_on
from detguard.objectives import Vanish
from detguard.photos import frames_tensor

HEAD, NECK = 23, 11


@pytest.fixture(scope="module")
def frames(bundled, bus):
    box = bundled.letterbox(bus.shape[:2])
    frame = box(bus)
    return frames_tensor([frame, frame[:, ::-1].copy(), 255 - frame])


@pytest.fixture(scope="module")
def small(bus):
    return cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)


def network(bundled_model, split=NECK, seed=0, noise=0.02, **options):
    """An ensemble whose experts differ a little."""
    torch.manual_seed(seed)
    made = GatedNetwork(fused(bundled_model), split, **options).eval().requires_grad_(False)
    for name, parameter in made.experts.named_parameters():
        if "dfl" not in name:
            parameter += noise * parameter.std() * torch.randn_like(parameter)
    return made


def detector(bundled_model, bundled, **options):
    return GatedDetector(network(bundled_model, **options), "gated", bundled.imgsz)


@pytest.mark.parametrize("split", [0, NECK, HEAD])
def test_equal_experts_are_the_detector_that_they_were_made_from(bundled_model, bundled, frames, split):
    made = detector(bundled_model, bundled, split=split, noise=0)
    with torch.no_grad():
        ours, original = made.candidates(frames), bundled.candidates(frames)
    assert torch.allclose(ours.logits, original.logits, atol=1e-3)
    assert torch.allclose(ours.boxes, original.boxes, atol=0.02)
    assert ours.gate.shape == (3, 3)


def test_probabilities_are_averaged_with_the_gates_weights(bundled_model, bundled, frames):
    made = detector(bundled_model, bundled)
    with torch.no_grad():
        together = made.candidates(frames)
        alone = [made.through(i).candidates(frames).logits.sigmoid() for i in range(3)]
    weights = together.gate.softmax(1)[:, :, None, None]
    mean = sum(weights[:, i] * p for i, p in enumerate(alone))
    assert torch.allclose(together.logits.sigmoid(), mean, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_weights_sum_to_one_and_all_but_the_top_k_are_zero(k, rows, seed):
    made = GatedNetwork.__new__(GatedNetwork)
    torch.nn.Module.__init__(made)
    made.top_k, made.fusion = (k if k < 5 else None), "average:0"
    made.names = list("abcde")
    logits = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed))
    weights = made.log_weights(logits).exp()
    assert torch.allclose(weights.sum(1), torch.ones(rows), atol=1e-5)
    assert ((weights > 0).sum(1) == k).all()


def test_a_bounded_ensemble_asks_its_robust_expert_for_every_frame(bundled_model, bundled, frames, monkeypatch):
    made = detector(bundled_model, bundled, top_k=1, fusion="bounded:0.5")
    monkeypatch.setattr(made.model.gate, "forward", lambda x: torch.tensor([[2.0, 1.0, 0.0]] * len(x)))
    with torch.no_grad():
        fused = made.candidates(frames).logits
        led, favourite = (made.through(i).candidates(frames).logits for i in (2, 0))
    assert torch.allclose(fused, favourite.minimum(led + 0.5).maximum(led - 0.5), atol=1e-3)


def test_top_k_computes_only_the_chosen_experts_for_each_frame(bundled_model, bundled, frames, monkeypatch):
    made = detector(bundled_model, bundled)
    wanted = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [2.0, 0.0, 1.0]])
    monkeypatch.setattr(made.model.gate, "forward", lambda x: wanted[: len(x)])
    calls = []
    for i, expert in enumerate(made.model.experts):
        expert[-1].cv2[0].register_forward_hook(lambda m, x, y, i=i: calls.append((i, len(y))))
    with torch.no_grad():
        made.model.top_k = 1
        routed = made.candidates(frames)
        assert calls == [(0, 2), (1, 1)]
        alone = [made.through(i).candidates(frames[j : j + 1]).logits[0] for j, i in enumerate((0, 1, 0))]
    for logits, expected in zip(routed.logits, alone, strict=True):
        assert torch.allclose(logits, expected, atol=1e-4)


def test_gradients_reach_the_photo_through_gate_and_experts(bundled_model, bundled, frames):
    for top_k in (None, 1):
        made = detector(bundled_model, bundled, top_k=top_k)
        shown = frames.clone().requires_grad_()
        candidates = made.candidates(shown)
        for output in (candidates.logits.amax(2).sum(), candidates.boxes.sum(), candidates.gate[:, 0].sum()):
            (gradient,) = torch.autograd.grad(output, shown, retain_graph=True)
            assert torch.isfinite(gradient).all()
            assert (gradient != 0).float().mean() > 0.9


def test_the_whole_is_differentiable_in_its_weights(bundled_model, frames):
    made = network(bundled_model).requires_grad_(True)
    raw, _ = made(frames)
    (raw["scores"].sum() + raw["boxes"].square().sum()).backward()
    learned = [(n, p) for n, p in made.named_parameters() if "dfl" not in n]  # dfl only decodes
    without = [n for n, p in learned if p.grad is None or not torch.isfinite(p.grad).all()]
    assert without == []


def test_it_saves_without_code_and_loads_as_a_detector(bundled_model, bundled, bus, tmp_path):
    made = network(bundled_model, top_k=2, fusion="average:0.1", names=("normal", "adversarial", "fog"))
    card = {"architecture": "yolo11n.yaml", "classes": list(bundled.class_names.values()), "imgsz": bundled.imgsz}
    save_gated(made, card, tmp_path / "hard.safetensors")
    again = load_detector(tmp_path / "hard.safetensors")
    assert isinstance(again, GatedDetector)
    assert (again.model.names, again.model.top_k) == (["normal", "adversarial", "fog"], 2)
    assert again.model.fusion == "average:0.1"
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.model.parameters(), strict=True))
    original = GatedDetector(made, "gated", bundled.imgsz)
    assert torch.equal(again.detect([bus])[0].scores, original.detect([bus])[0].scores)
    assert torch.equal(again.predict(bus, 0.25).boxes, again.detect([bus])[0].boxes)


def test_saved_weights_have_the_rights_of_any_new_file(bundled_model, tmp_path):
    save_gated(network(bundled_model), {}, tmp_path / "hard.safetensors")
    (tmp_path / "any").touch()
    assert (tmp_path / "hard.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def with_card(saved, folder, **changed):
    """A file of the weights of another, with a card that says something else of how they are put together."""
    card = json.loads(saved.with_suffix(".json").read_text())
    (folder / "hard.json").write_text(json.dumps(card | {"gated": card["gated"] | changed}))
    (folder / "hard.safetensors").hardlink_to(saved)
    return folder / "hard.safetensors"


@pytest.fixture(scope="module")
def card(bundled):
    return {"architecture": "yolo11n.yaml", "classes": list(bundled.class_names.values()), "imgsz": 320}


@pytest.fixture(scope="module")
def saved(bundled_model, card, tmp_path_factory):
    file = tmp_path_factory.mktemp("saved") / "saved.safetensors"
    save_gated(network(bundled_model), card, file)
    return file


@pytest.fixture(scope="module")
def saved_grown(bundled_model, card, tmp_path_factory):
    made = network(bundled_model)
    made.grow(["fog"], 0, "adapter")
    file = tmp_path_factory.mktemp("grown") / "saved.safetensors"
    save_gated(made, card, file)
    return file


@pytest.mark.parametrize(
    "broken",
    [
        {"split": 99}, {"split": None}, {"experts": []}, {"fusion": "average:2"}, {"fusion": "sum:1"},
        {"fusion": None}, {"grown": 3}, {"grown": "x"}, {"grown": -1},
    ],
)  # fmt: skip
def test_a_broken_card_is_an_error(saved, tmp_path, broken):
    with pytest.raises(DetguardError, match="hard"):
        load_model(with_card(saved, tmp_path, **broken))


def test_it_is_attacked_like_any_other(bundled_model, bundled, bus):
    made = detector(bundled_model, bundled)
    clean = made.detect([bus])[0]
    assert len(clean.of([0])) >= 3
    before = copy.deepcopy(made.state_hash())
    (attempt,) = attack_group(
        made, [("bus", bus, clean)], Vanish((0,)), [], AttackOptions(budget=Linf(8), step=2, steps=30)
    )
    assert attempt.done
    assert not len(made.predict(attempt.adversarial, 0.25).of([0]))
    assert made.state_hash() == before


def test_how_experts_are_put_together_is_part_of_its_state(bundled_model, bundled):
    made = detector(bundled_model, bundled)
    before = made.state_hash()
    assert made.through(0).state_hash() != before
    made.model.fusion = "average:0.2"
    assert made.state_hash() != before


def test_evaluation_adds_attacks_that_know_the_gate(bundled_model, bundled):
    made = detector(bundled_model, bundled)
    names = attacks_on(made, ("all",))
    routes = [f"{kind}:{i}" for kind in ("route", "rank") for i in range(3)]
    assert names == ("all", "gate:1", "gate:10", "gate:100", *routes)
    assert attacks_on(bundled, ("all",)) == ("all",)
    made.model.grow(["fog"], 0)
    grown = attacks_on(GatedDetector(made.model, "grown", 320), ("all",))
    assert set(grown) - set(names) == {"lead:3:10", "lead:3:100", "route:3", "rank:3"}
    assert attacks_on(detector(bundled_model, bundled, top_k=1), ("all",))[-1] == "dense"


def test_detections_say_how_much_each_expert_had_to_say(bundled_model, bundled, bus):
    made = detector(bundled_model, bundled)
    (found,) = made.detect([bus])
    with torch.no_grad():
        gate = made.candidates(frames_tensor([made.letterbox(bus.shape[:2])(bus)])).gate
    assert torch.allclose(found.experts, gate.softmax(1)[0])
    assert made.through(1).detect([bus])[0].experts.tolist() == [0, 1, 0]
    assert bundled.detect([bus])[0].experts is None


def test_all_experts_of_a_top_k_ensemble_can_be_asked(bundled_model, bundled, frames):
    chosen, everyone = (detector(bundled_model, bundled, top_k=k) for k in (1, None))
    with torch.no_grad():
        dense = chosen.dense().candidates(frames).logits
        assert torch.equal(dense, everyone.candidates(frames).logits)
        assert not torch.equal(dense, chosen.candidates(frames).logits)


@pytest.mark.parametrize("grown", [(), ("fog",)])
def test_the_gate_term_turns_the_gate_away_from_its_adversarial_expert(bundled_model, bundled, small, grown):
    made = GatedDetector(network(bundled_model), "gated", 160)
    made.model.grow(grown, 0)
    labels = made.detect([small], 0.4)[0]

    def margin(photo):
        with torch.no_grad():
            gate = made.candidates(frames_tensor([made.letterbox(photo.shape[:2])(photo)])).gate[0]
        return float(gate[2] - gate[[0, 1, *range(3, len(gate))]].max())

    left = {}
    for weight in (0, 1000):
        options = AttackOptions(budget=Linf(4), step=2, steps=10, stop=False, gradient="exact")
        objective = attack_objective(f"gate:{weight}", tuple(bundled.class_names), made)
        (attempt,) = attack_group(made, [("bus", small, labels)], objective, [], options)
        left[weight] = margin(attempt.adversarial)
    assert left[1000] < left[0]
    assert left[1000] < margin(small)


def test_an_attack_leads_photos_to_the_expert_that_was_grown(bundled_model, bundled, small):
    grown = network(bundled_model)
    grown.grow(["fog"], 0)
    with torch.no_grad():
        grown.kinds.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    made = GatedDetector(grown, "grown", 160)
    labels = made.detect([small], 0.4)[0]

    def weight(photo):
        with torch.no_grad():
            return float(made.candidates(frames_tensor([made.letterbox(photo.shape[:2])(photo)])).gate[0, 3])

    options = AttackOptions(budget=Linf(4), step=2, steps=10, stop=False, gradient="exact")
    objective = attack_objective("lead:3:100", tuple(bundled.class_names), made)
    (attempt,) = attack_group(made.through(3), [("bus", small, labels)], objective, [], options)
    assert weight(attempt.adversarial) > weight(small) + 1


def test_a_grown_ensemble_says_the_same_until_it_learns(bundled_model, bundled, card, frames, tmp_path):
    made = detector(bundled_model, bundled)
    rows = made.model.gate.out.weight
    with torch.no_grad():
        before = made.candidates(frames)
        made.model.grow(["fog", "night"], 1)
        after = made.candidates(frames)
    assert made.model.gate.out.weight is rows
    assert torch.allclose(after.gate.softmax(1)[:, :3], before.gate.softmax(1), atol=1e-3)
    assert (after.experts[:, 3:] < 1e-3).all()
    assert torch.allclose(after.logits.sigmoid(), before.logits.sigmoid(), atol=1e-3)
    assert made.model.names == ["normal", "hard", "adversarial", "fog", "night"]
    save_gated(made.model, card, tmp_path / "grown.safetensors")
    again = load_detector(tmp_path / "grown.safetensors")
    assert again.state_hash() == made.state_hash()
    assert again.leaders == (3, 4)


def test_experts_that_share_weights_are_saved_with_what_is_their_own(bundled_model, card, frames, tmp_path):
    made = network(bundled_model, noise=0, sparse=(2,))
    sizes = []
    for form, source in (("whole", 2), ("adapter", 2), ("head", 3), ("adapter", 5), ("whole", 4)):
        made.grow([form], source, form)
        sizes.append(sum(p.numel() for p in made.experts[-1].parameters()))
        with torch.no_grad():
            assert torch.equal(made(frames, source)[0]["scores"], made(frames, len(made.names) - 1)[0]["scores"])
            for name, parameter in made.experts[-1].named_parameters():
                if name.endswith(".up"):
                    parameter.normal_(std=2e-4)
    assert sizes[1] < sizes[0] / 5
    assert sizes[2] < sizes[0] / 2
    save_gated(made, card, tmp_path / "grown.safetensors")
    again, copied = load_detector(tmp_path / "grown.safetensors"), copy.deepcopy(made)
    assert again.state_hash() == GatedDetector(made, "grown", 320).state_hash()
    with torch.no_grad():
        scores = [made(frames, expert)[0]["scores"] for expert in range(8)]
        for same in (again.model, copied, made.unshared()):
            for i, wanted in enumerate(scores):
                assert torch.allclose(same(frames, i)[0]["scores"], wanted, atol=1e-3)
            assert torch.allclose(same(frames)[0]["scores"], made(frames)[0]["scores"], atol=1e-3)
        next(copied.experts[2].parameters()).mul_(2)  # of a copy, the adapter follows the copy
        assert not torch.allclose(copied(frames, 4)[0]["scores"], scores[4], atol=0.1)
        assert torch.equal(made(frames, 4)[0]["scores"], scores[4])
        assert not torch.allclose(scores[4], scores[2], atol=0.1)


@pytest.mark.parametrize(
    "shared",
    [
        {"3": {"form": "head", "of": 3, "rank": 8}}, {"9": {"form": "head", "of": 0, "rank": 8}}, ["head"],
        {"0": {"form": "head", "of": -1, "rank": 8}}, {"3": {"form": "adapter", "of": 0, "rank": 10**9}},
        {"3": {"form": "x", "of": 0, "rank": 8}}, {"3": {"form": "head"}}, {"3": {"form": "head", "of": 1, "rank": 8}},
    ],
)  # fmt: skip
def test_a_card_whose_experts_share_oddly_is_an_error(saved_grown, tmp_path, shared):
    with pytest.raises(DetguardError, match="hard"):
        load_model(with_card(saved_grown, tmp_path, shared=shared))


def test_the_floor_stays_under_the_adversarial_expert_when_others_come(bundled_model, bundled, frames):
    made = detector(bundled_model, bundled, fusion="average:0.3")
    made.model.grow(["fog"], 0)
    with torch.no_grad():
        experts = made.candidates(frames).experts
    assert (experts[:, 2] >= 0.3).all()
    assert (experts[:, 3] < 0.3).all()


def test_there_is_an_end_to_growing(bundled_model):
    made = network(bundled_model, split=HEAD)
    with pytest.raises(DetguardError, match="at most 64"):
        made.grow(["more"] * 62, 0)


def test_variants_are_each_expert_and_what_top_k_leaves_out(bus):
    detector = load_detector("detguard-n-hard")
    assert detector.experts == ("normal", "hard", "adversarial")
    assert list(detector.variants()) == ["route:0", "route:1", "route:2"]
    assert detector.variants()["route:1"].experts == ()
    assert list(load_detector("detguard-n-hard", top_k=1).variants())[-1] == "dense"
    assert load_detector().variants() == {}


def test_kinds_are_told_by_the_photo_and_not_by_the_padding_around_it(bundled_model, bundled, bus):
    made = network(bundled_model)
    photo = bus[:400]
    frame = frames_tensor([bundled.letterbox(photo.shape[:2])(photo)])
    square = torch.full((1, 3, 320, 320), 114 / 255)
    square[:, :, : frame.shape[2], : frame.shape[3]] = frame
    with torch.no_grad():
        alone, padded, blind = (
            made.kind_features(frame),
            made.kind_features(square),
            made.kind_features(square, torch.ones(1, 1, 320, 320)),
        )
    assert (padded - alone).norm() < 0.3 * (blind - alone).norm()
