import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from detguard import DetguardError
from detguard.data.batches import Samples, read_photos
from detguard.detectors.gated import GatedNetwork
from detguard.detectors.load import build_model
from detguard.detectors.ultralytics import UltralyticsDetector
from detguard.hardening.run import Plan, check_teacher, harden, narrowed, passes
from detguard.hardening.train import ADVERSARIAL, Setting
from detguard.hardening.validation import Validation
from detguard.runs import Run


def test_plain_fine_tuning_sees_no_attacks():
    (stage,) = Plan(recipe="finetune", attack="pgd").stages()
    assert stage.share[ADVERSARIAL] == 0


@pytest.mark.parametrize("split", ["backbone", "neck"])
@pytest.mark.parametrize("mix", [0.0, 0.2, 0.5])
def test_mix_is_the_share_of_other_kinds_that_an_expert_sees(mix, split):
    plan = Plan(mix=mix, split=split, attack="pgd", tune_normal=split == "backbone")
    shares = {stage.name: stage.share for stage in plan.stages()}
    assert shares["normal"] == pytest.approx((1 - mix, mix / 2, mix / 2))
    assert shares["hard"] == pytest.approx((mix / 2, 1 - mix, mix / 2))
    assert shares["adversarial"] == pytest.approx((mix / 2, mix / 2, 1 - mix))
    # By a free attack, whose first step is on the clean frame, there need be no clean ones beside it.
    assert Plan(mix=mix, split=split).stages()[0].share == pytest.approx((0, mix / 2, 1 - mix / 2))


def test_attacks_know_the_gate_but_where_an_expert_learns_to_resist():
    margins = {stage.name: stage.margins for stage in Plan(tune_normal=True).stages()}
    assert margins.pop("adversarial") == (0.0,)
    assert all(min(one) == 0 < 1 < max(one) for one in margins.values())


def test_the_normal_expert_of_whole_networks_learns_where_that_is_asked_for():
    assert "normal" not in {stage.name for stage in Plan().stages()}
    (tuned,) = (stage for stage in Plan(tune_normal=True).stages() if stage.name == "normal")
    assert (tuned.route, tuned.trunk, tuned.rate) == (0, False, pytest.approx(0.3 * Plan().rate))
    with pytest.raises(DetguardError, match="on a shared trunk the normal expert always learns"):
        Plan(split="neck", tune_normal=True)


@pytest.mark.parametrize("plan", [Plan(pretrain=True), Plan("pgd", pretrain=True), Plan(pretrain=True, split="neck")])
def test_a_backbone_that_learns_first_has_a_third_and_learns_slowly_then(plan):
    first, second, *rest = plan.stages()
    assert [stage.name for stage in (first, second)] == ["pretrain", "adversarial"]
    numbers = [stage.number for stage in (first, second, *rest)]
    assert numbers[0] / sum(numbers) == pytest.approx(1 / 3, abs=0.02)
    assert (first.backbone, second.backbone) == (1, 0.1)
    assert first.ramp > 0 == second.ramp
    assert not any("pretrain" in stage.name for stage in Plan().stages())


def test_a_backbone_learns_first_from_photos_of_its_own(bundled_model, bundled, bus_file, tmp_path):
    sets = [read_photos([([bus_file.with_name(name)], 1.0)], 64)[0] for name in ("bus.jpg", "zidane.jpg")]
    plan, setting, weights = Plan("pgd", pretrain=True, photos=12, batch=4, steps=1), Setting(4, 64), []
    for number, first in enumerate(sets):
        (tmp_path / str(number)).mkdir()
        run = Run(tmp_path / str(number), {"command": "harden"})
        harden(bundled_model, {}, bundled, sets[0], plan, setting, run, first=first)
        weights.append(load_file(run.path("weights/pretrain.safetensors")))
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_backbone_does_not_learn_first_where_that_makes_no_sense(bundled, bundled_model):
    with pytest.raises(DetguardError, match="`recipe` finetune sees no attacks"):
        Plan("finetune", pretrain=True)
    with pytest.raises(DetguardError, match="hardened already"):
        check_teacher(GatedNetwork(bundled.model, 0, ("pgd",)), bundled, "a.pt", "pgd", pretrain=True)
    larger = UltralyticsDetector(build_model("yolo11s.yaml", list(bundled.class_names.values())), "s", 64)
    with pytest.raises(DetguardError, match=r"s\.pt has other feature maps"):
        check_teacher(bundled_model, larger, "s.pt", pretrain=True)


def test_frames_that_no_detector_takes_are_refused():
    with pytest.raises(DetguardError, match="`crop` 100"):
        Plan(crop=100)


def test_only_a_detector_of_the_same_boxes_that_knows_all_classes_is_imitated(bundled_model, bundled):
    check_teacher(bundled_model, bundled, "a.pt")
    other_classes = GatedNetwork(bundled.model, 0, ("pgd",))
    other_classes.class_names = {**other_classes.class_names, 0: "wombat"}
    with pytest.raises(DetguardError, match="lacks classes that `detector` has: wombat"):
        check_teacher(other_classes, bundled, "a.pt")
    without_bins = UltralyticsDetector(build_model("yolo26n.yaml", list(bundled.class_names.values())), "b", 64)
    with pytest.raises(DetguardError, match="boxes are made in another way"):
        check_teacher(bundled_model, without_bins, "b.pt")


def test_a_larger_teacher_of_more_classes_is_imitated_but_is_no_expert_beside_a_robust_network(bundled, bundled_model):
    larger = UltralyticsDetector(build_model("yolo11s.yaml", ["cat", "wombat", *bundled.class_names.values()]), "s", 64)
    check_teacher(bundled_model, larger, "s.pt")
    single = GatedNetwork(bundled.model, 0, ("pgd",))
    check_teacher(single, larger, "s.pt", "pgd")
    with pytest.raises(DetguardError, match="architecture"):
        check_teacher(single, larger, "s.pt", "gated")


def test_a_narrowed_detector_says_of_its_classes_what_it_said(bundled):
    frames = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    said = bundled.candidates(frames).logits
    one = GatedNetwork(narrowed(bundled.model, ["dog", "person"]), 0, ("one",))
    raw = one(frames)[0]
    names = list(bundled.class_names.values())
    torch.testing.assert_close(raw["scores"].transpose(1, 2), said[:, :, [names.index("dog"), 0]])
    assert one.class_names == {0: "dog", 1: "person"}
    assert narrowed(bundled.model, names) is bundled.model


def test_networks_of_torchvision_are_not_hardened_yet(bundled):
    network = build_model("ssdlite320_mobilenet_v3_large", ["__background__", "person"])
    with pytest.raises(DetguardError, match="only Ultralytics"):
        check_teacher(network, bundled, "a.pt")


def test_hours_are_shared_among_stages_by_what_their_photos_cost():
    plan = Plan(hours=2, split="neck")
    timed, counted = plan.stages(), Plan(split="neck", photos=1000 * plan.batch).stages()
    assert sum(stage.seconds for stage in timed) == pytest.approx(7200)
    cost = [stage.seconds / (passes(stage, 1) * other.number) for stage, other in zip(timed, counted, strict=True)]
    assert max(cost) == pytest.approx(min(cost), rel=0.01)
    assert all(stage.number is None for stage in timed)


def test_of_hours_the_joint_stage_of_whole_networks_has_as_many_photos_for_more_of_them():
    hours, photos = (
        {split: {s.name: s for s in Plan(split=split, **of).stages()} for split in ("backbone", "neck")}
        for of in ({"hours": 2}, {"photos": 1000 * 32})
    )

    def cost(split):
        one, other = ((hours[split][n].seconds, photos[split][n].number) for n in ("joint", "adversarial"))
        return (one[0] / one[1]) / (other[0] / other[1])

    assert cost("backbone") == pytest.approx(1.7 * cost("neck"), rel=0.01)


def test_what_goes_on_learns_at_a_third_of_the_rate_unless_told(bundled):
    ensemble, single = GatedNetwork(bundled.model, 11), GatedNetwork(bundled.model, 0, ("pgd",))
    rates = [Plan.of({}, model).rate for model in (None, bundled.model, single)]
    assert rates == [Plan().rate] * 3
    for recipe, model in (("gated", ensemble), ("pgd", single)):
        assert Plan.of({"recipe": recipe, "rate": None}, model).rate == pytest.approx(Plan().rate / 3)
        assert Plan.of({"recipe": recipe, "rate": 0.003}, model).rate == 0.003


def test_what_was_only_fine_tuned_is_made_robust_from_the_start(bundled):
    tuned = GatedNetwork(bundled.model, 0, ("finetune",))
    for recipe in ("gated", "pgd"):
        plan = Plan.of({"recipe": recipe}, tuned)
        assert plan.rate == Plan().rate
        stages = {stage.name: stage for stage in plan.stages(tuned)}
        assert stages["adversarial"].ramp > 0
    assert Plan.of({"recipe": "finetune"}, tuned).rate == pytest.approx(Plan().rate / 3)
    robust = GatedNetwork(bundled.model, 0, ("pgd",))
    assert "adversarial" not in {stage.name for stage in Plan.of({}, robust).stages(robust)}


def test_what_goes_on_keeps_its_rule_and_its_split_unless_told(bundled):
    ensemble = GatedNetwork(bundled.model, 11, top_k=2, fusion="average:0.5")
    plan = Plan.of({}, ensemble)
    assert (plan.split, plan.top_k, plan.fusion) == ("11", 2, "average:0.5")
    assert Plan.of({"split": "11"}, ensemble).split == "11"
    with pytest.raises(DetguardError, match="`split` head: the experts of this ensemble have layers from 11 on"):
        Plan.of({"split": "head"}, ensemble)
    assert Plan.of({"fusion": "bounded:1"}, ensemble).fusion == "bounded:1"
    with pytest.raises(DetguardError, match="on a shared trunk"):
        Plan.of({"tune_normal": True}, ensemble)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "finetune", "attack": "pgd"}, "`attack`: does nothing in `recipe` finetune"),
        ({"recipe": "finetune", "sparse": 0.2}, "`sparse`"),
        ({"recipe": "pgd", "fusion": "average:0.5"}, "`fusion`: does nothing in `recipe` pgd"),
        ({"photos": 9, "hours": 1}, "`hours`: instead of `photos`"),
        ({"eps": "4"}, "`eps`: expected a number"),
        ({"transforms": ["median:3"]}, "transforms"),
        ({"rate": 0}, "rate"),
        ({"hours": 0}, "hours"),
        ({"batch": 1}, "batch"),
        ({"seed": -1}, "seed"),
    ],
)
def test_options_that_are_wrong_or_do_nothing_are_refused(given, message):
    with pytest.raises(DetguardError, match=message):
        Plan.of(given)


def test_an_ensemble_goes_on_with_the_whole_budget_and_only_with_its_own_experts(bundled_model, bundled):
    ensemble, single = GatedNetwork(bundled.model, 11), GatedNetwork(bundled.model, 0, ("pgd",))
    check_teacher(ensemble, bundled, "a.pt")
    for plan, model, stages in (
        (Plan(), ensemble, ["adversarial", "hard", "joint"]),
        (Plan("pgd"), single, ["adversarial"]),
        (Plan("pgd"), ensemble, ["adversarial"]),
    ):
        assert [stage.name for stage in plan.stages(model)] == stages
        assert not any(stage.ramp for stage in plan.stages(model))
    assert [stage.name for stage in Plan().stages(single)] == ["hard", "joint"]
    with pytest.raises(DetguardError, match="experts a, b"):
        check_teacher(GatedNetwork(bundled.model, 11, ("a", "b")), bundled, "a.pt")


def test_budget_steps_crop_and_transforms_are_those_of_every_stage():
    stages = Plan(eps=8.0, steps=3, crop=64, transforms="median:3", tune_normal=True).stages()
    assert {(s.adversary.eps, s.adversary.steps, s.size) for s in stages} == {(8.0, 3, 64)}
    assert [[str(t) for t in s.transforms] for s in stages] == [["median:3"]] * 4
    methods = {s.name: s.adversary.method for s in stages}
    assert methods == {"adversarial": "free", "normal": "pgd", "hard": "pgd", "joint": "free"}


def test_multi_task_attacks_aim_at_classes_and_at_boxes():
    (stage,) = Plan.of({"recipe": "mtd"}).stages()
    assert (stage.aims, stage.adversary.method) == (("class", "box"), "pgd")


@pytest.fixture
def begun(monkeypatch):
    """What each stage is given, with the weights at that time; the last expert changes as if it had learned."""
    given = {}

    def noted(network, teacher, source, stage, setting, checkpoint, on_stage, log, validate, samples):
        given[stage.name] = SimpleNamespace(
            stage=stage, weights=copy.deepcopy(network.state_dict()), validate=validate, samples=samples
        )
        with torch.no_grad():
            for parameter in network.experts[-1].parameters():
                parameter.mul_(2)

    monkeypatch.setattr("detguard.hardening.run.train_stage", noted)
    monkeypatch.setattr("detguard.hardening.run._check_memory", lambda *_: None)
    return given


def grown_apart(bundled):
    ensemble = GatedNetwork(bundled.model, 11)
    with torch.no_grad():
        for number, expert in enumerate(ensemble.experts):
            for parameter in expert.parameters():
                parameter.mul_(1 + number / 10)
    return ensemble


def test_an_ensemble_goes_on_from_its_own_experts_and_gate(begun, bundled, tmp_path):
    ensemble = grown_apart(bundled)
    plan = Plan.of({"photos": 8, "batch": 4, "sparse": 0.0}, ensemble)
    harden(ensemble, {}, bundled, None, plan, Setting(4, 64), Run(tmp_path, {"command": "harden"}))
    weights = begun["adversarial"].weights
    assert all(torch.equal(weights[key], value) for key, value in ensemble.state_dict().items())


def test_photos_of_attacks_are_a_quarter_of_the_adversarial_frames(begun, bundled_model, bundled, tmp_path):
    samples, run = Samples(None, None), Run(tmp_path, {"command": "harden"})
    plan = Plan("pgd", photos=4, batch=4, sparse=0.0)
    harden(bundled_model, {}, bundled, None, plan, Setting(4, 64), run, samples=samples)
    assert begun["adversarial"].stage.sampled == 0.25
    assert begun["adversarial"].samples is samples


def test_on_a_shared_trunk_the_others_start_from_the_adversarial_expert(begun, bundled_model, bundled, tmp_path):
    plan, run = Plan(split="neck", photos=8, batch=4, sparse=0.0), Run(tmp_path, {"command": "harden"})
    harden(bundled_model, {}, bundled, None, plan, Setting(4, 64), run)
    for number, name in enumerate(("normal", "hard")):
        weights, own = begun[name].weights, f"experts.{number}."
        keys = [key for key in weights if key.startswith(own)]
        assert keys
        assert all(torch.equal(weights[key], weights[key.replace(own, "experts.2.")]) for key in keys)


def test_what_is_attacked_is_validated_and_robust_weights_compete_from_the_start(begun, bundled, tmp_path):
    ensemble, held = grown_apart(bundled), Validation([np.zeros((64, 64, 3), np.uint8)])
    plan = Plan.of({"photos": 8, "batch": 4, "sparse": 0.0}, ensemble)
    harden(ensemble, {}, bundled, None, plan, Setting(4, 64), Run(tmp_path, {"command": "harden"}), held=held)
    assert begun["adversarial"].validate.start
    assert begun["hard"].validate is None
