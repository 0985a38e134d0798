import hashlib
import io
import json

import pytest
import torch
from safetensors.torch import save_file

from detguard import DetguardError
from detguard.detectors.load import build_model, load_detector
from detguard.detectors.torchvision import ARCHITECTURES, TorchvisionDetector, frame_size, softmax_logits
from detguard.evaluation.attacks import attack_objective
from detguard.objectives import Vanish
from detguard.photos import frames_tensor

OUTPUTS = ["__background__", "person", "N/A", "bus"]


def untrained_network(architecture):
    """Random weights of which the confidences differ from place to place, as those of a trained network do."""
    torch.manual_seed(0)
    model = build_model(architecture, OUTPUTS)
    for name, parameter in model.named_parameters():
        if "head" in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.002 if architecture == "ssd300_vgg16" else 0.02)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train().head(list(model.backbone(torch.rand(2, 3, 320, 320)).values()))
    return model.eval()


@pytest.fixture(scope="module", params=ARCHITECTURES[1:])
def untrained(request):
    model = untrained_network(request.param)
    return TorchvisionDetector(model, request.param, frame_size(model) if "ssd" in request.param else 160)


@pytest.fixture
def photo(bus):
    return bus[300:620, :320].copy()


def test_outputs_that_stand_for_no_class_are_left_out(untrained):
    assert untrained.class_names == {0: "person", 1: "bus"}


def test_the_tensor_path_is_the_public_predict_path(untrained, photo):
    conf = untrained.detect([photo], conf=1e-6)[0].scores[30:32].mean().item()
    ours, theirs = untrained.detect([photo], conf, 0.5)[0], untrained.predict(photo, conf, 0.5)
    assert len(ours) == len(theirs) >= 5
    assert torch.equal(ours.classes, theirs.classes)
    assert torch.allclose(ours.scores, theirs.scores, atol=1e-5)
    assert torch.allclose(ours.boxes, theirs.boxes, atol=0.05)


def test_nms_is_the_networks_own_unless_told(untrained, photo):
    of_network = build_model(untrained.name, OUTPUTS).nms_thresh
    assert untrained.iou == of_network < 0.7
    conf = untrained.detect([photo], conf=1e-6)[0].scores[30:32].mean().item()
    for found in (untrained.predict(photo, conf), untrained.detect([photo], conf)[0]):
        assert torch.allclose(found.scores, untrained.predict(photo, conf, of_network).scores, atol=1e-5)


@pytest.mark.parametrize("name", ["all", "vanish"])
def test_the_gradient_reaches_the_photo(untrained, photo, name):
    objects = untrained.detect([photo], 1e-6)[0][:3]
    frames = frames_tensor([photo, photo[::-1].copy()]).requires_grad_()
    candidates = untrained.candidates(frames)
    objective = Vanish((0, 1)) if name == "vanish" else attack_objective(name, [0, 1], untrained)
    aims = [objective.aim(candidates[i : i + 1], objects, objective.attacked(objects)) for i in range(2)]
    gradients = torch.autograd.grad(objective.loss(candidates, aims, 1e-6).sum(), frames)[0]
    assert torch.isfinite(gradients).all()
    assert (gradients.abs().amax((1, 2, 3)) > 0).all()


def test_every_candidate_has_its_point_and_stride(untrained, photo):
    anchors = untrained.candidates(frames_tensor([photo])).anchors
    finest = anchors.points[anchors.strides[:, 0] == anchors.strides.min(), 1].round(decimals=2).unique()
    assert torch.allclose(finest.diff(), anchors.strides.min(), rtol=0.02)
    assert 0 <= finest.min() < anchors.strides.min()
    assert photo.shape[0] - anchors.strides.min() <= finest.max()


def test_a_box_may_be_shown_as_several_classes(untrained, photo):
    assert untrained.candidates(frames_tensor([photo])).multi_label


def test_softmax_logits_are_those_of_the_softmax_and_do_not_saturate():
    logits = torch.tensor([[30.0, -30.0, 0.0], [0.2, -1.0, 0.7]], dtype=torch.float64, requires_grad=True)
    assert torch.allclose(softmax_logits(logits).sigmoid(), logits.softmax(1))
    assert torch.autograd.gradcheck(softmax_logits, logits)
    single = logits.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(softmax_logits(single)[0, 0], single)
    assert gradient[0, 0] == 1


def test_own_weights_load_from_safetensors(tmp_path, photo):
    network = untrained_network("ssdlite320_mobilenet_v3_large")
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    card = {"architecture": "ssdlite320_mobilenet_v3_large", "classes": OUTPUTS, "imgsz": 320}
    (tmp_path / "own.json").write_text(json.dumps(card))
    detector = load_detector(tmp_path / "own.safetensors")
    whole = TorchvisionDetector(network, "own", 320)
    assert detector.state_hash() == whole.state_hash()
    assert torch.equal(detector.detect([photo], 1e-3)[0].boxes, whole.detect([photo], 1e-3)[0].boxes)
    with pytest.raises(DetguardError, match="320 px only"):
        load_detector(tmp_path / "own.safetensors", imgsz=640)


def test_own_weights_of_frozen_batch_norms_load(tmp_path):
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as built

    state = built(weights=None, weights_backbone=None, num_classes=len(OUTPUTS)).state_dict()
    # As they are kept of a network that began with published weights.
    kept = {key: value.contiguous() for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert kept.keys() < state.keys()
    save_file(kept, tmp_path / "own.safetensors")
    card = {"architecture": built.__name__, "classes": OUTPUTS, "imgsz": 320}
    (tmp_path / "own.json").write_text(json.dumps(card))
    assert load_detector(tmp_path / "own.safetensors").class_names == {0: "person", 1: "bus"}


def test_another_frame_size_is_taken_where_the_network_has_none_of_its_own(bus):
    model = build_model("retinanet_resnet50_fpn", OUTPUTS)
    assert frame_size(model) == 1333
    images, _ = TorchvisionDetector(model, "retinanet", 256).model.transform([frames_tensor([bus])[0]])
    assert max(images.image_sizes[0]) == 256


def test_official_weights_that_cannot_be_had_are_an_error_that_says_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(
        DetguardError, match=r"ssd300_vgg16: cannot be downloaded.*checkpoints.ssd300_vgg16_coco-\w+\.pth"
    ):
        load_detector("ssd300_vgg16")


def test_a_hostile_file_in_the_cache_does_not_run(tmp_path, monkeypatch):
    from torchvision.models import get_model_weights

    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    file = folder / get_model_weights("ssd300_vgg16").DEFAULT.url.rsplit("/", 1)[1]
    torch.save({"a": Touch()}, file)
    with pytest.raises(DetguardError, match="hash is not the published one"):
        load_detector("ssd300_vgg16")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Put what it is given where torchvision keeps SSDlite's weights, under the name that its hash makes of it."""
    from torchvision.models import get_model_weights

    def publish(value):
        data = io.BytesIO()
        torch.save(value, data)
        name = f"ssdlite-{hashlib.sha256(data.getvalue()).hexdigest()[:8]}.pth"
        folder = tmp_path / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(data.getvalue())
        weights = get_model_weights("ssdlite320_mobilenet_v3_large").DEFAULT
        monkeypatch.setattr(weights.value, "url", f"https://127.0.0.1:9/{name}")
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    return publish


def test_published_weights_are_used_where_they_are_kept(published):
    network = build_model("ssdlite320_mobilenet_v3_large", ["__background__", *(f"c{i}" for i in range(90))])
    published(network.state_dict())
    found = load_detector("ssdlite320_mobilenet_v3_large").model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())


def test_published_weights_cannot_run_code_either(published, tmp_path):
    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    published({"a": Touch()})
    with pytest.raises(DetguardError, match="cannot be downloaded or read"):
        load_detector("ssdlite320_mobilenet_v3_large")
    assert not (tmp_path / "ran").exists()


def test_outputs_of_which_one_alone_is_true_begin_with_the_background_whatever_it_is_called():
    ssd = build_model("ssdlite320_mobilenet_v3_large", ["background", "person", "car"])
    assert TorchvisionDetector(ssd, "ssd", 320).class_names == {0: "person", 1: "car"}
    alone = build_model("retinanet_resnet50_fpn", ["person"])
    assert TorchvisionDetector(alone, "retinanet", 160).class_names == {0: "person"}


@pytest.mark.parametrize(
    ("architecture", "count"), [("ssd300_vgg16", 1), ("fcos_resnet50_fpn", 0), ("yolo11n.yaml", 0)]
)
def test_too_few_classes_are_said_to_be_that(architecture, count):
    with pytest.raises(DetguardError, match=f"`classes`: {count}; expected"):
        build_model(architecture, ["a"] * count)
