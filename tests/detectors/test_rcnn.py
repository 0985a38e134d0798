import json
import sys

import cv2
import pytest
import torch
from safetensors.torch import save_file

from detguard.cli import main
from detguard.detectors.contract import check_contract
from detguard.detectors.load import build_model, load_detector
from detguard.detectors.rcnn import ARCHITECTURES, NOTHING, RcnnDetector
from detguard.evaluation.attacks import attack_objective
from detguard.objectives import Outrank, Vanish
from detguard.photos import frames_tensor

SMALLEST = "fasterrcnn_mobilenet_v3_large_320_fpn"
OUTPUTS = ["__background__", "person", "N/A", "bus"]
PROPOSALS = 60


@pytest.fixture(scope="module")
def photo(bus):
    return cv2.resize(bus[300:620, :320], (160, 160), interpolation=cv2.INTER_AREA)


def untrained_network(architecture, photo, outputs=OUTPUTS):
    """Random weights scaled so that what each layer of a head says of a photo varies as that of a trained one does."""
    torch.manual_seed(0)
    model = build_model(architecture, outputs)
    model.rpn._post_nms_top_n["testing"] = PROPOSALS
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    places = [torch.tensor([[0.0, 0, 90, 90], [30, 40, 150, 90], [20, 10, 40, 60]])] * 2
    rpn, stage = model.rpn.head, model.roi_heads
    with torch.no_grad():
        maps = model.train().backbone((frames_tensor([photo, photo[::-1].copy()]) - 0.45) / 0.225)
        first, second = rpn.conv(maps["0"]), stage.box_head(stage.box_roi_pool(maps, places, [(160, 160)] * 2))
        for layer, seen, spread in (
            (rpn.cls_logits, first, 1), (rpn.bbox_pred, first, 0.2),
            (stage.box_predictor.cls_score, second, 2), (stage.box_predictor.bbox_pred, second, 1),
        ):  # fmt: skip
            layer.weight *= spread / layer(seen).std()
    return model.eval()


@pytest.fixture(scope="module", params=[SMALLEST, "fasterrcnn_resnet50_fpn_v2"])
def untrained(request, photo):
    return RcnnDetector(untrained_network(request.param, photo), request.param, 160)


@pytest.fixture(scope="module")
def smallest(photo):
    return RcnnDetector(untrained_network(SMALLEST, photo), SMALLEST, 160)


def test_it_keeps_what_every_detector_promises(untrained, photo):
    conf = untrained.detect([photo], conf=1e-6)[0].scores[20:22].mean().item()
    assert {p.name: p.seen for p in check_contract(untrained, photo, conf) if p.state == "BROKEN"} == {}
    assert untrained.iou == 0.5


@pytest.mark.parametrize("architecture", ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"])
def test_boxes_are_those_that_come_with_masks_or_keypoints(photo, architecture):
    network = untrained_network(architecture, photo, OUTPUTS[:2])
    network.transform.min_size, network.transform.max_size = (160,), 160
    network.roi_heads.score_thresh = 0.001
    with torch.no_grad():
        (whole,) = network(list(frames_tensor([photo])))
    assert whole.keys() & {"masks", "keypoints"}
    found = RcnnDetector(network, "bare", 160).predict(photo, 0.001)
    assert len(found) == len(whole["boxes"]) > 5
    assert torch.allclose(found.boxes, whole["boxes"], atol=0.05)
    assert torch.allclose(found.scores, whole["scores"], atol=1e-4)


@pytest.mark.parametrize("name", ["all", "vanish", "rank"])
def test_the_gradient_of_every_loss_reaches_the_photo(smallest, photo, name):
    objects = smallest.detect([photo], 1e-6)[0][:3]
    frames = frames_tensor([photo, photo[::-1].copy()]).requires_grad_()
    candidates = smallest.candidates(frames)
    known = {"vanish": Vanish((0, 1)), "rank": Outrank((0, 1))}
    objective = known.get(name) or attack_objective(name, [0, 1], smallest)
    aims = [objective.aim(candidates[i : i + 1], objects, objective.attacked(objects)) for i in range(2)]
    gradients = torch.autograd.grad(objective.loss(candidates, aims, 1e-6).sum(), frames)[0]
    assert torch.isfinite(gradients).all()
    assert (gradients.abs().amax((1, 2, 3)) > 0).all()


def test_photos_of_few_proposals_have_as_many_candidates_as_others(smallest, photo, monkeypatch):
    frames = frames_tensor([photo, (photo * 0.5).astype("uint8")])
    monkeypatch.setattr(smallest.model.rpn, "nms_thresh", 0.1)
    together = smallest.candidates(frames)
    counts = [int((one.logits > NOTHING).any(2).sum()) for one in (together[:1], together[1:])]
    assert together.logits.shape == (2, PROPOSALS, 2)
    assert 0 < counts[0] != counts[1] < PROPOSALS
    for i in range(2):
        alone = smallest.candidates(frames[i : i + 1])
        assert torch.allclose(together.logits[i], alone.logits[0], atol=1e-3)
        assert torch.allclose(together.boxes[i], alone.boxes[0], atol=1e-2)


def test_what_a_photo_gives_does_not_depend_on_the_first_one(smallest, photo):
    network = untrained_network(SMALLEST, photo)
    network.roi_heads.box_roi_pool.scales = None  # as of a network that has seen nothing yet
    other = RcnnDetector(network, SMALLEST, 160)
    other.detect([cv2.resize(photo, (960, 36))], 1e-3)
    (before,), (after,) = smallest.detect([photo], 1e-3), other.detect([photo], 1e-3)
    assert torch.equal(before.scores, after.scores)


def test_a_photo_without_any_proposal_is_one_of_nothing(smallest, photo, monkeypatch):
    monkeypatch.setattr(smallest.model.rpn, "score_thresh", 2.0)
    assert smallest.candidates(frames_tensor([photo])).boxes.shape == (1, PROPOSALS, 2, 4)
    assert len(smallest.detect([photo], 1e-6)[0]) == len(smallest.predict(photo, 1e-6)) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_is_built_by_its_name(architecture):
    with torch.device("meta"):
        model = build_model(architecture, ["no person", "person"])
    assert model.outputs == ["no person", "person"]


def test_the_background_has_other_names(photo):
    network = untrained_network(SMALLEST, photo, ["no person", "person"])
    assert RcnnDetector(network, "one", 160).class_names == {0: "person"}


def test_an_attack_is_judged_and_verified_by_the_command_line(tmp_path, photo, monkeypatch, capsys):
    network = untrained_network(SMALLEST, photo)
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    card = {"architecture": SMALLEST, "classes": OUTPUTS, "imgsz": 160}
    (tmp_path / "own.json").write_text(json.dumps(card))
    cv2.imwrite(str(tmp_path / "bus.png"), photo[..., ::-1])
    best = load_detector(tmp_path / "own.safetensors").detect([photo], 0.001)[0]
    conf = float(best.of([0]).scores[:2].mean())  # one person is found

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["detguard", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr()

    options = ("--model", tmp_path / "own.safetensors", "--conf", conf, "--transforms", "none", "--eps", 16)
    code, shown = run("attack", tmp_path / "bus.png", *options, "--steps", 30, "--out", tmp_path / "run")
    assert code == 0, shown.err
    code, shown = run("verify", tmp_path / "run")
    assert code == 0, shown.err
