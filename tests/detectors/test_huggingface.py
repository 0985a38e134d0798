import json
import sys

import cv2
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

import detguard
from detguard import DetguardError
from detguard.cli import main
from detguard.data.stream import from_records
from detguard.detectors import huggingface
from detguard.detectors.contract import check_contract
from detguard.detectors.huggingface import ARCHITECTURES, HuggingFace
from detguard.detectors.load import detector_config, load_configured, load_detector
from detguard.evaluation.attacks import attack_objective
from detguard.hardening.monitor import Deployment, observe
from detguard.objectives import Outrank, Vanish
from detguard.photos import encode_png, frames_tensor
from detguard.runs import Run

transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")

NAMES = {0: "N/A", 1: "person", 2: "N/A", 3: "bus", 4: "dog"}  # not four, as a box has numbers
WIDTHS, SIZE = [8, 8, 16, 16], 96
RESNET = {"embedding_size": 8, "hidden_sizes": WIDTHS, "depths": [1, 1, 1, 1], "layer_type": "basic"}
ENCODER = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 12,
}  # fmt: skip
HYBRID = ENCODER | {
    "encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16], "decoder_in_channels": [32, 32, 32],
    "decoder_n_points": 2, "num_denoising": 0,
}  # fmt: skip


def backbone(kind):
    if kind == "d_fine":
        return transformers.HGNetV2Config(
            stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 8, 16], stage_mid_channels=[8, 8, 8, 8],
            stage_out_channels=WIDTHS, stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1],
            hidden_sizes=WIDTHS, depths=[1, 1, 1, 1], embedding_size=8, out_indices=[2, 3, 4],
        )  # fmt: skip
    if kind.startswith("rt_detr"):
        return transformers.RTDetrResNetConfig(**RESNET, out_indices=[2, 3, 4])
    stages = ["stage2", "stage3", "stage4"] if kind == "deformable_detr" else ["stage4"]
    return transformers.ResNetConfig(**RESNET, out_features=stages)


def settings(kind):
    if kind == "yolos":
        return {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
            "image_size": [96, 128], "num_detection_tokens": 12,
        }  # fmt: skip
    if kind in ("rt_detr", "rt_detr_v2", "d_fine"):
        return HYBRID | {"backbone_config": backbone(kind)}
    return ENCODER | {"backbone_config": backbone(kind)}


def write(folder, kind, photo):
    """Random weights of a tiny network, so large that what it says of a photo varies as of a trained one."""
    torch.manual_seed(1)
    known = ARCHITECTURES[kind]
    network = getattr(transformers, known.network)(
        getattr(transformers, known.config)(**settings(kind), id2label=NAMES)
    )
    fixed = known.processor == "RTDetrImageProcessor"
    size = {"height": SIZE, "width": SIZE} if fixed else {"shortest_edge": 64, "longest_edge": SIZE}
    processor = getattr(transformers, known.processor)(size=size)
    inputs = processor(images=[photo, photo[::-1].copy()], return_tensors="pt")
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "detection_tokens" in name or "query" in name or "position_emb" in name:
                value.normal_()
            elif value.ndim == 4:
                torch.nn.init.kaiming_normal_(value).mul_(0.7)
            elif value.ndim == 2:
                torch.nn.init.xavier_uniform_(value)
        width = len(NAMES) + known.softmax
        named = network.eval().named_modules()
        last = [m for name, m in named if getattr(m, "out_features", 0) == width and "enc_score" not in name]
        weights, biases = {m.weight for m in last}, {m.bias for m in last}  # layers may share them
        for bias in biases:
            bias.zero_()
        logits = network(**inputs).logits
        scale = 1.5 / logits.std(1).mean()
        for weight in weights:
            weight *= scale
            weight[[0, 2]] = 0.0
        for bias in biases:
            bias -= logits.mean((0, 1)) * scale
            bias[[0, 2]] = -30.0  # as a trained one says of classes that there are not
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photo(bus):
    return cv2.resize(bus, (150, 200), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, photo):
    root, made = tmp_path_factory.mktemp("hub"), {}

    def folder(kind):
        if kind not in made:
            made[kind] = write(root / kind, kind, photo)
        return made[kind]

    return folder


@pytest.fixture(scope="module", params=ARCHITECTURES)
def untrained(request, folders):
    return load_detector(folders(request.param))


def between(detector, photo, rank=4):
    """A confidence over which so many are found."""
    return detector.detect([photo], conf=1e-6)[0].scores[rank - 1 : rank + 1].mean().item()


def test_it_keeps_what_every_detector_promises(untrained, photo):
    conf = between(untrained, photo)
    assert {p.name: p.seen for p in check_contract(untrained, photo, conf) if p.state == "BROKEN"} == {}
    assert untrained.conf == 0.5
    assert untrained.class_names == {0: "person", 1: "bus", 2: "dog"}
    assert len(untrained.predict(photo, conf)) == 4


@pytest.mark.parametrize("name", ["all", "vanish", "rank"])
def test_the_gradient_of_every_loss_reaches_the_photo(untrained, photo, name):
    objects = untrained.detect([photo], 1e-6)[0][:3]
    frames = frames_tensor([photo]).requires_grad_()
    candidates = untrained.candidates(frames)
    known = {"vanish": Vanish((0, 1)), "rank": Outrank((0, 1))}
    objective = known.get(name) or attack_objective(name, [0, 1, 2], untrained)
    aims = [objective.aim(candidates, objects, objective.attacked(objects))]
    gradient = torch.autograd.grad(objective.loss(candidates, aims, 1e-6).sum(), frames)[0]
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


def test_a_query_of_a_softmax_is_found_once_and_one_of_sigmoids_for_every_class(folders, photo):
    counts = []
    for kind in ("detr", "rt_detr"):
        detector = load_detector(folders(kind))
        found = detector.detect([photo], 1e-6)[0]
        counts.append(len(found.boxes.unique(dim=0)))
        assert len(found) == 12
    assert counts[0] == 12 > counts[1]


def test_what_users_hold_is_found_by_transformers_own_way(folders, photo):
    """The documented lines, from the files alone."""
    folder = folders("detr")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = transformers.AutoModelForObjectDetection.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(**processor(images=photo, return_tensors="pt"))
    (theirs,) = processor.post_process_object_detection(outputs, 0.3, [photo.shape[:2]])
    ours = load_detector(folder).predict(photo, 0.3)
    best = theirs["scores"].argsort(descending=True)
    assert len(ours) == len(best) > 0
    assert torch.allclose(ours.scores, theirs["scores"][best], atol=1e-6)
    names = [model.config.id2label[int(label)] for label in theirs["labels"][best]]
    assert [load_detector(folder).class_names[int(k)] for k in ours.classes] == names


@pytest.mark.parametrize(("kind", "imgsz", "longest"), [("detr", 80, 80), ("rt_detr", 100, 128), ("yolos", 128, 128)])
def test_frames_of_another_size(folders, photo, kind, imgsz, longest):
    detector = load_detector(folders(kind), imgsz)
    shape = detector._inputs(frames_tensor([photo]))["pixel_values"].shape
    assert detector.imgsz == longest
    # YOLOS cuts the shorter side to whole patches; RT-DETR fills whole strides.
    assert max(shape[2:]) <= longest
    assert load_configured(detector_config(detector, str(folders(kind)))).imgsz == longest
    promises = check_contract(detector, photo, between(detector, photo))
    assert {p.name: p.seen for p in promises if p.state == "BROKEN"} == {}


def test_whole_levels_are_resized_on_the_cpu_whatever_the_device(folders):
    detector, seen = load_detector(folders("detr")), []

    def processed(levels):
        seen.append((levels.device.type, levels.dtype))
        return {"pixel_values": levels.float(), "pixel_mask": levels[:, 0] > 0}

    detector._processed = processed
    with FakeTensorMode():
        inputs = detector._inputs(torch.rand(1, 3, 64, 64, device="cuda").requires_grad_())
        assert {value.device.type for value in inputs.values()} == {"cuda"}
        assert inputs["pixel_values"].requires_grad
    assert seen == [("cpu", torch.uint8), ("cuda", torch.float32)]


def test_another_normalization_is_another_detector(folders, tmp_path):
    before = load_detector(folders("detr")).state_hash()
    copy = changed(folders("detr"), tmp_path, processor={"image_mean": [0.5, 0.5, 0.5]})
    assert load_detector(copy).state_hash() != before
    assert load_detector(folders("detr")).state_hash() == before


def changed(folder, to, config=None, processor=None, weights=None):
    """A copy of a folder, other entries in its files."""
    to.mkdir(exist_ok=True)
    for name, more in (("config.json", config), ("preprocessor_config.json", processor)):
        (to / name).write_text(json.dumps(json.loads((folder / name).read_text()) | (more or {})))
    save_file(load_file(folder / "model.safetensors") | (weights or {}), to / "model.safetensors")
    return to


ODD = {
    "another architecture": ({"config": {"model_type": "llama"}}, "no known architecture"),
    "no classes": ({"config": {"id2label": None}}, "names no classes"),
    "classes that are none": ({"config": {"id2label": {"0": ["person"]}}}, "text"),
    "a larger network": ({"config": {"decoder_layers": 2000}}, "larger"),
    "a wider one": ({"config": {"encoder_ffn_dim": 1 << 30}}, "odd encoder_ffn_dim"),
    "a wide one": ({"config": {"encoder_ffn_dim": 1 << 14, "decoder_ffn_dim": 1 << 14}}, "not those|larger"),
    "queries without end": ({"config": {"num_queries": 9999}}, "over 2000 queries"),
    "queries of no number": ({"config": {"num_queries": "many"}}, "no number of them"),
    "a backbone of no name": ({"config": {"backbone_config": {"model_type": ["resnet"]}}}, "no known kind"),
    "a foreign backbone": ({"config": {"backbone_config": {"model_type": "swin"}}}, "no known kind"),
    "a backbone of the hub": (
        {"config": {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:a/b"}}}, "no known kind",
    ),
    "a backbone of a file": (
        {"config": {"backbone_config": None, "use_timm_backbone": True, "backbone": "local-dir:/x"}}, "no known kind",
    ),
    "an odd activation": ({"config": {"activation_function": "os.system"}}, "damaged"),
    "enormous frames": ({"processor": {"size": {"height": 99999, "width": 99999}}}, "odd; expected a size"),
    "no resize": ({"processor": {"do_resize": False}}, "odd; expected a size"),
    "no means": ({"processor": {"image_mean": "x"}}, "odd"),
    "a padding that is too small": ({"processor": {"pad_size": {"height": 64, "width": 64}}}, "odd"),
    "weights that are no numbers": (
        {"weights": {"bbox_predictor.layers.0.weight": torch.full((32, 32), torch.nan)}}, "finite",
    ),
    "weights of another": ({"weights": {"bbox_predictor.layers.0.weight": torch.zeros(8, 8)}}, "not those"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_odd_folders_are_refused_in_one_line(folders, tmp_path, case):
    changes, wrong = ODD[case]
    folder = changed(folders("detr"), tmp_path, **changes)
    with pytest.raises(DetguardError, match=wrong) as error:
        load_detector(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "odd", [{"anchor_image_size": [64, 64]}, {"anchor_image_size": 0}, {"encode_proj_layers": [9]}], ids=str
)
def test_layers_that_do_not_fit_the_frames_are_one_line(folders, photo, tmp_path, odd):
    detector = load_detector(changed(folders("rt_detr"), tmp_path, odd))
    for find in (lambda: detector.predict(photo, 0.5), lambda: detector.detect([photo])):
        with pytest.raises(DetguardError, match=r"on frames of 96 px \(.*\); its config\.json is odd") as error:
            find()
        assert "\n" not in str(error.value)


def test_of_a_backbone_that_is_only_named_nobody_is_asked(folders, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address[0]) or [])
    folder = changed(folders("rt_detr"), tmp_path, {"backbone": "resnet50", "backbone_config": None})
    with pytest.raises(DetguardError):
        load_detector(folder)
    assert asked == []


def test_what_a_folder_says_of_code_is_not_read(folders, tmp_path):
    """Names of modules, kernels and adapters of elsewhere, which `from_pretrained` would import or fetch."""
    foreign = {
        "auto_map": {"AutoModelForObjectDetection": "evil.Model"}, "attn_implementation": "a/kernel",
        "_attn_implementation": "a/kernel", "quantization_config": {"quant_method": "evil"},
    }  # fmt: skip
    own = {"auto_map": {"AutoImageProcessor": "evil.P"}, "image_processor_type": "EvilProcessor"}
    folder = changed(folders("detr"), tmp_path, foreign, own)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/b", "peft_type": "LORA"}))
    detector = load_detector(folder)
    assert detector.state_hash() == load_detector(folders("detr")).state_hash()
    assert detector.model.config._attn_implementation in ("sdpa", "eager")


def test_pickled_weights_are_not_read(folders, tmp_path):
    folder = changed(folders("detr"), tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DetguardError, match=r"has no model\.safetensors; other files of weights could run code"):
        load_detector(folder)


def test_an_overlap_for_nms_is_refused_where_there_is_none(folders):
    with pytest.raises(DetguardError, match=r"`iou` 0\.2: .* lists its detections itself, without NMS"):
        load_detector(folders("detr"), iou=0.2)
    assert load_detector(folders("detr"), iou=0.7).listed  # as a run keeps it


def test_a_folder_of_something_else_is_told(tmp_path):
    with pytest.raises(DetguardError, match=r"without config\.json"):
        load_detector(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/made.safetensors").touch()
    with pytest.raises(DetguardError, match=r"its detector is .*weights/made\.safetensors"):
        load_detector(tmp_path)


def test_without_the_extra_the_pip_line_is_told(folders, monkeypatch):
    monkeypatch.setattr(huggingface.importlib.util, "find_spec", lambda name: None)
    for name in (folders("detr"), "PekingU/rtdetr_v2_r18vd"):
        with pytest.raises(DetguardError, match=r"pip install 'detguard\[huggingface\]'"):
            load_detector(name)


def test_a_transformers_that_is_too_old_is_told(folders, monkeypatch):
    monkeypatch.setattr(huggingface, "version", lambda name: "5.3.0")
    with pytest.raises(DetguardError, match=r"needs transformers 5\.4 or newer"):
        load_detector(folders("detr"))


@pytest.mark.parametrize("name", ["runs/best.pt", "runs/best", "yolo11n", "a/b/c", "../x", "x/..", "a/b.json"])
def test_names_of_files_are_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert HuggingFace().fetch(name) is None


def test_a_detector_of_the_hub_is_taken_from_the_cache(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DetguardError, match=r"owner/tiny: no such file, and cannot be downloaded"):
        load_detector("owner/tiny")
    with pytest.raises(DetguardError, match=r"owner/tiny: the run was made with a detector .* that is not here"):
        load_configured({"model": "owner/tiny", "imgsz": 320, "end_to_end": False, "top_k": None, "fusion": None})
    here, commit = tmp_path / "models--owner--tiny", "0" * 40
    (here / "refs").mkdir(parents=True)
    (here / "refs" / "main").write_text(commit)
    (here / "snapshots").mkdir()
    changed(folders("yolos"), here / "snapshots" / commit)
    detector = load_detector("owner/tiny")
    assert (detector.name, detector.state_hash()) == ("tiny", load_detector(folders("yolos")).state_hash())


def test_backbones_of_timm(photo, tmp_path):
    pytest.importorskip("timm")
    config = transformers.DetrConfig(
        **ENCODER, backbone="resnet18", use_timm_backbone=True, backbone_config=None, id2label=NAMES
    )
    transformers.DetrForObjectDetection(config).save_pretrained(tmp_path)
    transformers.DetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}).save_pretrained(tmp_path)
    detector = load_detector(tmp_path)
    frames = frames_tensor([photo]).requires_grad_()
    (gradient,) = torch.autograd.grad(detector.candidates(frames).logits.sum(), frames)
    assert gradient.abs().max() > 0


def test_too_narrow_a_photo_is_refused_and_the_others_go_on(folders, photo, tmp_path):
    detector, narrow = load_detector(folders("yolos")), cv2.resize(photo, (400, 8))
    with pytest.raises(DetguardError, match="too narrow"):
        detector.letterbox((9, 400))
    attacked = detguard.attack(detector, [narrow, photo], transforms="none", steps=1, conf=0.01)
    assert sorted("too narrow" in result.record.get("error", "") for result in attacked) == [False, True]
    files = [tmp_path / "narrow.png", tmp_path / "photo.png"]
    for file, one in zip(files, (narrow, photo), strict=True):
        file.write_bytes(encode_png(one))
    person = {"class": "person", "box": [0, 0, 50, 8]}
    lines = [{"photo": str(file), "objects": [person]} for file in files]
    photos = from_records(lines, detector.class_names)
    watched = observe(Run.create("monitor", tmp_path / "run", {}), Deployment(detector), photos, "adwin", 8)
    assert ["too narrow" in record.get("error", "") for record in watched] == [True, False]
    coco = {
        "images": [
            {"id": i, "file_name": file.name, "width": width, "height": height}
            for i, (file, width, height) in enumerate(zip(files, (400, 150), (8, 200), strict=True))
        ],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 50, 8]} for i in (0, 1)],
        "categories": [{"id": 1, "name": "person"}],
    }
    (tmp_path / "data.json").write_text(json.dumps(coco))
    setting = detguard.evaluate(detector, tmp_path / "data.json", cache=tmp_path / "c.sqlite")["yolos"]["setting"]
    assert (setting["photos"], setting["left_out"]) == (1, 1)


def test_commands_attack_and_verify_and_do_not_harden(tmp_path, folders, photo, monkeypatch, capsys):
    cv2.imwrite(str(tmp_path / "bus.png"), photo[..., ::-1])
    folder = folders("yolos")
    best = load_detector(folder).detect([photo], 0.001)[0].of([0])
    conf = float(best.scores[:2].mean())  # one person is found

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["detguard", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr()

    options = ("--model", folder, "--conf", conf, "--transforms", "none", "--eps", 16)
    code, shown = run("attack", tmp_path / "bus.png", *options, "--steps", 30, "--out", tmp_path / "run")
    assert code == 0, shown.err
    code, shown = run("verify", tmp_path / "run")
    assert code == 0, shown.err
    code, shown = run("harden", "--model", folder, "--data", tmp_path)
    assert code == 2
    assert "only Ultralytics' YOLO families can be hardened" in shown.err


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_what_was_kept_in_a_callers_inference_mode_bears_gradients(folders, photo, kind):
    detector = load_detector(str(folders(kind)))
    with torch.inference_mode():
        detector.detect([photo])
        detector.predict(photo, 0.5)
    frames = frames_tensor([photo], detector.device).requires_grad_()
    detector.candidates(frames).logits.sum().backward()
    assert frames.grad.abs().sum() > 0
