"""ONNX files as detectors: they find what the network finds that they were made of, and run nothing else."""

import copy
from pathlib import Path

import cv2
import pytest
import torch

import detguard
from detguard import DetguardError
from detguard.attacks.group import AttackOptions
from detguard.detectors.contract import check_contract
from detguard.detectors.load import load_detector
from detguard.detectors.onnx import _providers
from detguard.evaluation.compare import also_unlike
from detguard.reports.evaluation import headline

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def small(bus):
    return cv2.resize(bus, (240, 320), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def files(tmp_path_factory, small):
    """The bundled detector as detguard exports it: for any frames, for one size, with NMS."""
    from detguard.export.run import FORMATS, plan_export

    folder = tmp_path_factory.mktemp("onnx")
    kinds = {"any": {}, "fixed": {"dynamic": False}, "nms": {"nms": True, "conf": 0.04}}
    for name, options in kinds.items():
        wanted = plan_export("detguard-n", "onnx", [small], **options)
        FORMATS["onnx"].write(wanted, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in kinds}


def assert_same(found, known):
    assert found.classes.tolist() == known.classes.tolist()
    assert (found.boxes - known.boxes).abs().max() < 0.5
    assert (found.scores - known.scores).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["any", "nms"])
def test_it_finds_what_its_network_finds(files, bundled, bus, bus_file, kind):
    detector = load_detector(files[kind])
    known = bundled.predict(bus, 0.05)
    assert len(known) > 3
    assert_same(detector.predict(bus, 0.05), known)
    assert_same(detector.predict(bus_file, 0.05), known)
    assert_same(detector.detect([bus], 0.05)[0], known)
    assert detector.class_names == bundled.class_names


@pytest.mark.parametrize("kind", ["any", "fixed", "nms"])
def test_it_keeps_the_promises_but_that_of_a_gradient(files, small, kind):
    promises = list(check_contract(load_detector(files[kind]), small))
    assert {p.name: p.seen for p in promises if p.state == "BROKEN"} == {}
    assert [p.name for p in promises if p.state == "skipped"] == ["the gradient reaches the photo"]


def test_it_is_attacked_in_a_black_box_alone(files, small):
    detector = load_detector(files["any"], imgsz=160)
    before = detector.state_hash()
    options = {"transforms": "none", "budget": detguard.Masked.of(detguard.Linf(64), "inside")}
    with pytest.raises(DetguardError, match="any: has no gradient; give `black_box`"):
        list(detguard.attack(detector, small, **options))
    (result,) = detguard.attack(detector, small, black_box=True, queries=300, **options)
    assert result.success
    assert 2 <= result.record["queries"] <= 300
    assert not len(load_detector(files["any"], imgsz=160).predict(result.photo, 0.25).of([0]))
    assert detector.state_hash() == before != load_detector(files["nms"]).state_hash()


@pytest.fixture
def ultralytics_export(tmp_path, monkeypatch):
    """A network as Ultralytics' own exporter writes it."""
    from ultralytics import YOLO

    def export(network, recipe, **options):
        monkeypatch.chdir(tmp_path)
        made = YOLO(recipe, task="detect")
        if network is not None:
            made.model, args = copy.deepcopy(network), made.model.args
            made.model.args = args
        return Path(made.export(format="onnx", imgsz=320, simplify=False, opset=17, verbose=False, **options))

    return export


def test_what_ultralytics_exports_is_read(ultralytics_export, bundled, bundled_model, small):
    square = cv2.resize(small, (320, 320))  # fills a fixed frame as it does one of any size
    detector = load_detector(ultralytics_export(bundled_model, "yolo11n.yaml"))
    assert_same(detector.predict(square, 0.05), bundled.predict(square, 0.05))
    assert_same(detector.detect([square], 0.05)[0], bundled.predict(square, 0.05))


def test_a_head_without_nms_gives_detections(ultralytics_export, small):
    detector = load_detector(ultralytics_export(None, "yolo26n.yaml"))
    found = detector.detect([small], 0.0)[0]
    assert len(found) == 300
    promises = check_contract(detector, small, float(found.scores[100]))
    assert {p.name: p.seen for p in promises if p.state == "BROKEN"} == {}


def test_an_nms_that_ultralytics_puts_inside_finds_the_same_in_each_of_several_photos(
    ultralytics_export, bundled_model, small
):
    detector = load_detector(ultralytics_export(bundled_model, "yolo11n.yaml", nms=True, dynamic=True))
    first, second = detector.detect([small, small], detector.conf)
    assert len(first)
    assert_same(second, first)


def test_a_fixed_frame_has_one_size(files):
    with pytest.raises(DetguardError, match=r"`imgsz` 640: fixed was exported for frames of 320 px"):
        load_detector(files["fixed"], imgsz=640)


def external(model):
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def external_inside(model):
    branch = onnx.GraphProto(name="branch")
    external_tensor = branch.initializer.add(name="w", data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    external_tensor.external_data.add(key="location", value="../secret")
    node = model.graph.node.add(op_type="If", name="if")
    node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(branch)


def custom(model):
    model.graph.node[0].domain = "com.evil"


def endless(model):
    model.graph.node.add(op_type="Loop")


def functions(model):
    model.functions.add(name="f", domain="mine")


def told(**changed):
    def change(model):
        kept = {one.key: one.value for one in model.metadata_props} | changed
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {key: value for key, value in kept.items() if value is not None})

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (external, "another file"), (external_inside, "another file"), (custom, "operator 'Constant' of 'com.evil'"),
        (endless, "a Loop"), (functions, "functions of its own"), (told(names=None), "says no names"),
        (told(names="__import__('os').getpid()"), "odd names"), (told(names="[" * 10**5), "odd names"),
        (told(names="{0: 'a'" + " " * (1 << 20) + "}"), "too much"), (told(names="{}"), "no names"),
        (told(names="{0: 'person'}"), r"its output is \[1, 17, 2100\], expected \[B, 5, N\]"),
        (told(names="{5: 'person'}"), "names for its 1 classes"), (told(task="segment"), "only box detection"),
        (told(head="RTDETRDecoder"), "is an RT-DETR"),
        (told(imgsz="[320, 640]"), "square"), (told(imgsz="[10**9]"), "odd imgsz"),
        (told(imgsz="9999999"), "frame size"),
        (told(stride="0"), "odd stride"), (told(args="3"), "odd args"),
        (told(args="{'nms': True, 'conf': 'low'}"), "odd args of its NMS"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_say_is_refused(files, tmp_path, change, reason):
    model = onnx.load(files["any"])
    change(model)
    file = tmp_path / "odd.onnx"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(DetguardError, match=f"odd.*{reason}"):
        load_detector(file)


def test_what_a_file_says_beside_is_not_passed_on(files, tmp_path, small):
    model = onnx.load(files["any"])
    told(session="x", forward="x", channels="9", batch="900000")(model)
    file = tmp_path / "odd.onnx"
    file.write_bytes(model.SerializeToString())
    assert len(load_detector(file).predict(small, 0.25))


@pytest.mark.parametrize("content", [b"", b"\x08\x09", b"no model"])
def test_what_is_no_onnx_is_refused(tmp_path, content):
    (tmp_path / "odd.onnx").write_bytes(content)
    with pytest.raises(DetguardError, match=r"odd\.onnx"):
        load_detector(tmp_path / "odd.onnx")


def test_without_its_packages_the_command_that_installs_them_is_told(files, monkeypatch):
    monkeypatch.setattr("detguard.detectors.onnx.find_spec", lambda name: None if name == "onnxruntime" else 1)
    with pytest.raises(DetguardError, match=r"needs onnxruntime; pip install 'detguard\[export\]'"):
        load_detector(files["any"])


def test_a_device_without_a_provider_is_refused():
    with pytest.raises(DetguardError, match="`device` xpu: onnxruntime has only the CPU here; give `device` cpu"):
        _providers("xpu")


def test_frames_of_any_number_are_taken_by_a_graph_of_one(files):
    frames = torch.rand(2, 3, 320, 320)
    fixed, any_number = (load_detector(files[kind]).candidates(frames) for kind in ("fixed", "any"))
    assert torch.allclose(fixed.logits, any_number.logits, atol=1e-3)


def test_what_needs_a_gradient_or_a_network_refuses_it(files, bundled_model, bus_file):
    from detguard.attacks.pictures import stages
    from detguard.export.run import plan_export
    from detguard.hardening.run import check_teacher
    from detguard.objectives import Vanish

    detector = load_detector(files["any"])
    with pytest.raises(DetguardError, match="any: has no gradient, by which a picture learns"):
        stages(detector, [(bus_file, None)], Vanish((0,)), 0.25)
    with pytest.raises(DetguardError, match="only Ultralytics' YOLO families"):
        plan_export(str(files["any"]), "onnx")
    with pytest.raises(DetguardError, match="only Ultralytics' YOLO families can be hardened"):
        check_teacher(detector.model, detector, "any.onnx", "gated", pretrain=False)
    with pytest.raises(DetguardError, match=r"any\.onnx: expected a detector of Ultralytics' YOLO families"):
        check_teacher(bundled_model, detector, "any.onnx", "gated", pretrain=False)


def test_an_nms_inside_says_at_what_and_takes_no_other(files, tmp_path):
    detector = load_detector(files["nms"])
    assert detector.nms_inside == (0.04, 0.7)
    assert load_detector(files["nms"], iou=0.7).iou == 0.7
    AttackOptions(black_box=True, conf=0.04).check_detector(detector)
    with pytest.raises(DetguardError, match=r"`conf` 0.03: the NMS of .* would count as fooled"):
        AttackOptions(black_box=True, conf=0.03).check_detector(detector)
    with pytest.raises(DetguardError, match=r"`iou` 0.5: the NMS of .* is inside it, at 0.7; export it without"):
        load_detector(files["nms"], iou=0.5)
    model = onnx.load(files["nms"])
    told(args="{'nms': True}")(model)
    onnx.save(model, tmp_path / "theirs.onnx")
    assert load_detector(tmp_path / "theirs.onnx").nms_inside == (0.25, 0.7)


def test_ap_of_an_nms_inside_is_told_to_miss_what_is_less_sure(files, tiny_data, tmp_path, recwarn):
    made = {}
    for kind in ("any", "nms"):
        made |= detguard.evaluate(
            load_detector(files[kind]), tiny_data, protocols=("clean",), limit=1, cache=tmp_path / "c.sqlite"
        )
    assert headline(made, "").note.count("its NMS is inside; its AP misses what is less sure than .04") == 1
    assert also_unlike(*made.values())[1:] == ["nms_inside None, 0.04"]
    assert ["NMS is inside, at a confidence of 0.04" in str(one.message) for one in recwarn].count(True) == 1


def test_checks_leave_it_out_and_say_so(files, bundled, tiny_data, tmp_path):
    detector, options = load_detector(files["any"], imgsz=64), {"limit": 1, "cache": tmp_path / "c.sqlite"}
    with pytest.raises(DetguardError, match="`protocols` checks: any: no gradient, which they are of"):
        detguard.evaluate(detector, tiny_data, protocols=("checks",), **options)
    with pytest.warns(UserWarning, match="any: has no gradient, checks left out"):
        (found,) = detguard.evaluate(detector, tiny_data, protocols=("clean", "checks"), **options).values()
    assert "checks" not in found


@pytest.mark.parametrize(("kind", "listed"), [("any", False), ("nms", True)])
def test_whether_nms_comes_after_it_is_told_by_what_the_graph_gives(files, kind, listed):
    assert load_detector(files[kind]).listed is listed


def test_an_export_for_several_frames_at_once_is_told_what_to_do(files, tmp_path):
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    frames = helper.make_tensor_value_info("images", kind, [4, 3, 320, 320])
    found = helper.make_tensor_value_info("found", kind, [4, 17, 1])
    value = helper.make_tensor("value", kind, [4, 17, 1], [0.0] * 68)
    node = helper.make_node("Constant", [], ["found"], value=value)
    known = onnx.load(files["fixed"])
    graph = helper.make_model(helper.make_graph([node], "four", [frames], [found]), ir_version=known.ir_version)
    graph.metadata_props.extend(known.metadata_props)
    onnx.save(graph, tmp_path / "four.onnx")
    with pytest.raises(DetguardError, match="four: was exported for 4 frames at once; expected an export with batch=1"):
        load_detector(tmp_path / "four.onnx")


@pytest.mark.parametrize(("kind", "shape"), [("FLOAT", None), ("FLOAT", []), ("STRING", [1, 17, 1])])
def test_an_output_that_is_no_array_of_numbers_is_one_line(files, tmp_path, kind, shape):
    helper = onnx.helper
    frames = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, 320, 320])
    found = helper.make_tensor_value_info("found", getattr(onnx.TensorProto, kind), shape)
    size = [1, 17, 1] if kind == "STRING" else []
    value = helper.make_tensor("value", getattr(onnx.TensorProto, kind), size, [b"a"] * 17 if size else [0.0])
    known = onnx.load(files["fixed"])
    node = helper.make_node("Constant", [], ["found"], value=value)
    graph = helper.make_model(helper.make_graph([node], "odd", [frames], [found]), ir_version=known.ir_version)
    graph.metadata_props.extend(known.metadata_props)
    onnx.save(graph, tmp_path / "odd.onnx")
    with pytest.raises(DetguardError, match="odd: "):
        load_detector(tmp_path / "odd.onnx")


def test_what_a_graph_finds_is_of_its_classes_and_in_the_photo(files, tmp_path, small):
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    rows = [[10, 10, 50, 50, 0.9, 0], *([10, 10, 50, 50, 0.8, kind] for kind in (99, -1)), [*[torch.nan] * 4, 0.7, 0]]
    value = helper.make_tensor("value", kind, [1, 4, 6], [float(one) for row in rows for one in row])
    ends = [helper.make_tensor_value_info(*end) for end in (("images", kind, [1, 3, 320, 320]), ("f", kind, [1, 4, 6]))]
    known = onnx.load(files["fixed"])
    node = helper.make_node("Constant", [], ["f"], value=value)
    graph = helper.make_model(helper.make_graph([node], "odd", ends[:1], ends[1:]), ir_version=known.ir_version)
    graph.metadata_props.extend(known.metadata_props)
    onnx.save(graph, tmp_path / "odd.onnx")
    detector = load_detector(tmp_path / "odd.onnx")
    (found,) = detector.predict(small, 0.25).records(detector.class_names)
    assert (found["class"], found["confidence"]) == ("person", 0.9)


def test_a_photo_that_a_graph_does_not_take_is_one_line(files, tmp_path, small):
    model = onnx.load(files["any"])
    for side in model.graph.input[0].type.tensor_type.shape.dim[2:]:  # but of any number of frames
        side.dim_value = 320
    onnx.save(model, tmp_path / "odd.onnx")
    detector = load_detector(tmp_path / "odd.onnx")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for find in (lambda: detector.predict(small, 0.25), lambda: detector.detect([small], 0.25)):
            with pytest.raises(DetguardError, match="odd: cannot be run by onnxruntime"):
                find()
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_device_that_onnxruntime_gives_up_on_is_an_error(files, monkeypatch):
    monkeypatch.setattr("detguard.detectors.onnx._providers", lambda _: ["CUDAExecutionProvider"])
    with pytest.raises(DetguardError, match=r"any: (cannot be run by onnxruntime|onnxruntime cannot run it)"):
        load_detector(files["any"])
