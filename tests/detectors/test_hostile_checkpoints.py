"""Checkpoints that try to run, write, fetch or fill something: each is refused in one line, and nothing happens."""

import copy
import io
import pickle
import resource
import sys
import zipfile

import pytest
import torch
from torch import nn
from ultralytics.nn.modules.conv import Conv
from ultralytics.nn.tasks import DetectionModel

from detguard import DetguardError
from detguard.detectors.checkpoint import read_state
from detguard.detectors.load import load_detector
from detguard.detectors.pickles import Damaged
from detguard.detectors.rebuild import build as build_network
from detguard.detectors.rebuild import find_strides

# What reading data never needs. `exec` is what an import does once it has found its file.
FORBIDDEN = (
    "exec", "compile", "os.", "subprocess.", "socket.", "urllib.", "ctypes.", "shutil.", "pickle.find_class", "glob.",
    "code.__new__", "import", "webbrowser.", "tempfile.", "marshal.", "ftplib.", "http.", "smtplib.",
)  # fmt: skip
HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")
_watched: list[str] | None = None


def _note(event, args):
    if _watched is None or (event == "compile" and args[0] in (b"nearest", b"bilinear")):
        return  # how Ultralytics looks whether an argument is a number; these are of a list of ours
    writes = event == "open" and (set(str(args[1])) & set("wax+") or (isinstance(args[2], int) and args[2] & 0b11))
    if writes or (event.startswith(FORBIDDEN) and event not in HARMLESS):
        _watched.append(f"{event} {args!r:.200}")


@pytest.fixture(scope="module", autouse=True)
def _audit():
    sys.addaudithook(_note)


@pytest.fixture(scope="module")
def known(tmp_path_factory, checkpoint):
    """What a first time imports is no part of what is watched."""
    file = tmp_path_factory.mktemp("good") / "good.pt"
    file.write_bytes(checkpoint())
    load_detector(file)
    assert "x".encode("cp437") == "x".encode("raw_unicode_escape")


@pytest.fixture
def refused(tmp_path, known):
    """Load a file, and return the line that it is refused with; nothing may happen on the way."""

    def load(data, name="evil.pt"):
        global _watched
        (tmp_path / name).write_bytes(data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _watched = []
        try:
            with pytest.raises(DetguardError) as caught:
                load_detector(tmp_path / name)
            happened = list(_watched)
        finally:
            _watched = None
        assert not happened
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
        line = str(caught.value)
        assert "\n" not in line
        assert line.startswith(f"{tmp_path / name}: ")
        return line.removeprefix(f"{tmp_path / name}: ")

    return load


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = DetectionModel("yolov8n.yaml", nc=2, verbose=False).half()
    model.names, model.args, model.task = {0: "person", 1: "bus"}, {"imgsz": 64}, "detect"
    return model


@pytest.fixture(scope="module")
def checkpoint(model):
    """The bytes of a checkpoint of a small model after `change` has had its way with it."""

    def make(change=lambda model: None):
        changed = copy.deepcopy(model)
        changed = change(changed) or changed
        data = io.BytesIO()
        torch.save({"model": None, "ema": changed}, data)
        return data.getvalue()

    return make


def named(module, name):
    """Instructions that leave a function or class on the stack of an unpickler."""
    return b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"


def plain(value):
    """Instructions that leave plain data there."""
    return pickle.dumps(value, 2)[2:-1]


def call(function, *args):
    """Instructions that call what `function` left with what `args` left."""
    return function + b"(" + b"".join(args) + b"t" + b"R"


def build(instance, state):
    """Instructions that set the state of an object."""
    return instance + state + b"b"


def archive(instructions, compression=zipfile.ZIP_STORED, protocol=4, **entries):
    """A `torch.save` archive with a pickle of these instructions."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as file:
        file.writestr("evil/data.pkl", b"\x80" + bytes([protocol]) + instructions + b".")
        file.writestr("evil/version", "3")
        for name, content in entries.items():
            file.writestr(f"evil/data/{name.removeprefix('_')}", content)
    return data.getvalue()


def in_model(value):
    """A dict with `value` where a checkpoint has its model."""
    return b"}" + plain("model") + value + b"s"


YOLO = named("ultralytics.nn.tasks", "DetectionModel")
LINEAR = named("torch.nn.modules.linear", "Linear")
UNKNOWN = {
    "getattr": call(named("builtins", "getattr"), YOLO, plain("__init__")),
    "eval": call(named("builtins", "eval"), plain("1")),
    "exec through a module that torch imports": call(named("os", "system"), plain("true")),
    "an old name of the builtins": call(named("__builtin__", "getattr"), YOLO, plain("fuse")),
    "a function of the archive's own project": call(named("detguard.files", "write_file"), plain("a"), plain(b"b")),
    "importlib": call(named("importlib", "import_module"), plain("antigravity")),
    "runpy": call(named("runpy", "run_path"), plain("evil.py")),
    "operator": call(named("operator", "methodcaller"), plain("system")),
    "pickle in a pickle": call(named("pickle", "loads"), plain(b"cos\nsystem\n.")),
    "a class of somebody's own": call(named("models.yolo", "Model")),
}
INERT = {
    "a method of nn.Module": call(named("torch.nn.modules.module", "Module.compile"), LINEAR),
    "torch.load": call(named("torch", "load"), plain("other.pt")),
    "torch.hub.load": call(named("torch.hub", "load"), plain("stranger/repo"), plain("model")),
    "torch.utils.cpp_extension": call(named("torch.utils.cpp_extension", "load_inline"), plain("x"), plain("int x;")),
    "a constructor with a module": call(named("torch.nn.modules.container", "Sequential"), call(LINEAR, plain(1))),
    "a huge layer": call(LINEAR, plain(40_000), plain(40_000)),
    "a huge layer by another call": LINEAR + plain((40_000, 40_000)) + b"\x81",
    "functools.partial": call(named("functools", "partial"), named("torch", "load"), plain("x.pt")),
    "a path": call(YOLO, plain("/etc/passwd")),
    "a URL": call(YOLO, plain("https://127.0.0.1:9/evil.yaml")),
    "a pattern": call(YOLO, plain("yolo*.yaml")),
    "a distillation model": call(named("ultralytics.nn.distill_model", "DistillationModel"), plain("yolo11n.pt")),
    "torchvision weights": call(named("ultralytics.nn.modules.block", "TorchVision"), plain(64), plain("resnet50")),
    "numpy from a file": call(named("numpy", "fromfile"), plain("/dev/zero")),
    "a state for a class": build(YOLO, plain({"forward": 1})),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_no_checkpoint_needs_is_refused_by_its_name(refused, name):
    assert "refused, made with classes that detguard does not know: " in refused(archive(in_model(UNKNOWN[name])))


@pytest.mark.parametrize("name", INERT)
def test_what_is_called_by_a_pickle_is_not(refused, name):
    line = refused(archive(in_model(INERT[name])))
    assert any(text in line for text in ("does not know", "holds no Ultralytics model", "has no yaml"))


@pytest.mark.parametrize("protocol", range(6))
def test_no_protocol_of_pickles_calls_anything(refused, protocol):
    class Call:
        def __reduce__(self):
            return print, ("called",)

    data = pickle.dumps({"model": Call()}, protocol)
    assert "does not know: builtins.print" in refused(archive(data[2:-1] if protocol > 1 else data[:-1]))


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_is_no_checkpoint(refused, protocol):
    assert "damaged, or not a checkpoint" in refused(pickle.dumps({"model": 1}, protocol))


BOMBS = {
    "ten million empty dicts": b"(" + b"}" * 10_000_000 + b"t",
    "a memo of two billion": plain(1) + b"r\xff\xff\xff\x7f" + b"0" + plain({}),
    "a byte array of an exabyte": b"\x96" + (1 << 60).to_bytes(8, "little"),
    "text of an exabyte": b"\x8d" + (1 << 60).to_bytes(8, "little"),
    "a number of a million digits": b"L" + b"9" * 1_000_000 + b"L\n",
    "lists in lists": b"]" * 100_000 + b"a" * 99_999,
    "keys of one hash": b"}(" + b"".join(plain(k * (2**61 - 1)) + b"N" for k in range(40, 5_000)) + b"u",
    "keys that are tuples": b"}" + plain((1, 2)) + b"Ns",
    "an opcode of nothing": b"\xff",
    "nothing": b"",
    "a stack that is empty": b"R",
    "itself": b"}q\x00" + plain("model") + b"h\x00s",
}


COPIES = {
    "a list, again and again": (
        b"](" + b"N" * 2_000 + b"eq\x000" + (named("builtins", "list") + b"h\x00\x85R0") * 2_000 + b"}",
        "more objects than a detector needs",
    ),
    "arguments, again and again": (
        plain((1,) * 2_000) + b"q\x000" + (LINEAR + b"h\x00}\x920") * 2_000 + b"}",
        "more objects than a detector needs",
    ),
    "a text as arguments": (LINEAR + plain("a" * 100) + b"}\x92", "calls what is no function"),
    "a name": (plain("torch") + plain("a" * 1_000) + b"\x93", "a length that none has"),
    "what is remembered by one hash": (
        b"N" + b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(1, 10)),
        "remembers oddly",
    ),
}


@pytest.mark.parametrize("name", COPIES)
def test_what_a_few_bytes_would_copy_is_bounded(refused, name):
    instructions, expected = COPIES[name]
    assert expected in refused(archive(instructions))


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_fill_memory_or_time_is_refused(refused, name):
    assert refused(archive(BOMBS[name]))


def test_a_zip_that_unpacks_to_gigabytes_is_refused(refused):
    line = refused(archive(in_model(b"N") + b"0" + b"N0" * 20_000_000 + b"}", zipfile.ZIP_DEFLATED))
    assert "compressed or too large" in line


def test_a_table_of_contents_without_end_is_refused(refused):
    data = archive(in_model(b"N"))
    end = data.rindex(b"PK\x05\x06")
    directory = data.index(b"PK\x01\x02")
    entry = data[directory:end]
    many = entry * ((8 << 20) // len(entry))
    longer = data[:directory] + many + data[end : end + 12] + len(many).to_bytes(4, "little") + data[end + 16 :]
    assert "table of contents" in refused(longer)


def test_torchscript_is_told_from_a_checkpoint(refused):
    data = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Identity()), data)
    assert "TorchScript archive" in refused(data.getvalue())


def stored(key="0", numel=1, offset=0, size=(1,), stride=(1,), kind="FloatStorage"):
    storage = b"(" + plain("storage") + named("torch", kind) + plain(key) + plain("cpu") + plain(numel) + b"tQ"
    rebuilt = named("torch._utils", "_rebuild_tensor_v2")
    return call(rebuilt, storage, plain(offset), plain(size), plain(stride), plain(False), plain({}))


@pytest.mark.parametrize(
    "tensor",
    [
        stored(offset=1), stored(offset=-1), stored(size=(2,)), stored(size=(-1,)), stored(size=(2,), stride=(0,)),
        stored(size=(10**12,), stride=(0,)), stored(numel=2, size=(2,)), stored(numel=10**18, size=(10**18,)),
        stored(key="../version"), stored(key="1"), stored(kind="UntypedStorage"), stored(kind="load"),
        stored(size=(1,), stride=(2**70,)), stored(size=(2**70, 0), stride=(1, 1)), stored(offset=2**70, size=(0,)),
        stored(size=(1,) * 9, stride=(1,) * 9), stored(size=1), stored(numel=True, size=(True, True), stride=(1,)),
    ],
)  # fmt: skip
def test_tensors_that_are_not_within_their_file_are_refused(tmp_path, tensor):
    (tmp_path / "state.pt").write_bytes(archive(tensor, _0=b"\0\0\0\0"))
    with pytest.raises(DetguardError, match=r"state\.pt: "):
        read_state(tmp_path / "state.pt")


def test_many_tensors_of_one_storage_cannot_fill_memory(tmp_path):
    tensor = stored(numel=1_000_000, size=(1_000_000,))
    (tmp_path / "state.pt").write_bytes(archive(b"(" + tensor * 100 + b"t", _0=bytes(4_000_000)))
    with pytest.raises(DetguardError, match="many times larger than the file"):
        read_state(tmp_path / "state.pt")


def test_tensors_of_a_number_cannot_have_a_large_storage_read_again_and_again(tmp_path):
    tensor = stored(numel=1_000_000)
    (tmp_path / "state.pt").write_bytes(archive(b"(" + tensor * 100 + b"t", _0=bytes(4_000_000)))
    with pytest.raises(DetguardError, match="or read it many times"):
        read_state(tmp_path / "state.pt")


def test_lists_that_hold_others_twice_cannot_fill_memory(tmp_path):
    data = plain([]) + b"".join(b"q\x00](h\x00h\x00e" for _ in range(40))
    (tmp_path / "state.pt").write_bytes(archive(data))
    with pytest.raises(DetguardError, match="too often"):
        read_state(tmp_path / "state.pt")


def test_a_training_state_comes_back_as_it_was(tmp_path):
    state = {
        "number": 3,
        "network": {"a": torch.arange(6).view(2, 3).T, "b": torch.zeros(0, 2)},
        "x": [1.5, (None, "t")],
    }
    torch.save(state, tmp_path / "state.pt")
    found = read_state(tmp_path / "state.pt")
    assert found["number"] == 3
    assert found["x"] == state["x"]
    assert torch.equal(found["network"]["a"], state["network"]["a"])
    assert found["network"]["b"].shape == (0, 2)


def with_yaml(**entries):
    def change(model):
        model.yaml = model.yaml | entries

    return change


def with_layer(number, layer):
    def change(model):
        model.yaml = copy.deepcopy(model.yaml)
        model.yaml["backbone"][number] = layer

    return change


def with_attribute(name, value):
    def change(model):
        vars(model)[name] = value

    return change


RECIPES = {
    "an activation that runs": (with_yaml(activation="open('ran', 'w')"), "activation"),
    "an activation that is no activation": (with_yaml(activation="nn.Linear(40000)"), "activation"),
    "a layer by a dotted name": (with_layer(0, [-1, 1, "torch.hub.load", ["a", "b"]]), "does not know: torch.hub.load"),
    "a layer that fetches": (with_layer(0, [-1, 1, "TorchVision", [64, "resnet50"]]), "does not know: TorchVision"),
    "ten million layers": (with_layer(2, [-1, 10_000_000, "C2f", [128, True]]), "odd layer"),
    "a hundred thousand layers": (with_yaml(backbone=[[-1, 1, "nn.Identity", []]] * 100_000), "lists no layers"),
    "more layers than it holds": (with_layer(2, [-1, 100, "C2f", [128, True]]), "not the one that its yaml"),
    "a huge layer": (with_layer(0, [-1, 1, "Conv", [40_000, 3, 2]]), "odd argument"),
    "a large layer that it does not hold": (
        with_layer(9, [-1, 1, "Conv", [16_000, 3, 1]]),
        "not the one that its yaml",
    ),
    "an argument that is looked up": (with_layer(0, [-1, 1, "Conv", ["d", 3, 2]]), "odd argument"),
    "an argument that is NaN": (with_layer(0, [-1, 1, "Conv", [float("nan"), 3, 2]]), "odd argument"),
    "a huge window": (with_layer(9, [-1, 1, "SPPF", [1024, 9999]]), "enormous"),
    "a huge frame around a map": (with_layer(0, [-1, 1, "Conv", [64, 3, 2, 9999]]), "enormous"),
    "a huge spread of a window": (with_layer(0, [-1, 1, "Conv", [64, 3, 2, 1, 1, 9999]]), "enormous"),
    "a huge enlargement": (with_yaml(scales={"n": [1, 1e9, 1e9]}), "odd"),
    "a scale that is a list": (with_yaml(scales={"n": [1, 1, 64]}, scale=["n"]), "no such scale"),
    "a number of scales": (with_yaml(scales=3), "no such scale"),
    "a layer from nowhere": (with_layer(3, [77, 1, "Conv", [256, 3, 2]]), "no network can be made"),
    "a yaml that is a pattern": (with_attribute("yaml", "yolo*.yaml"), "no yaml"),
    "a yaml that is a URL": (with_attribute("yaml", "https://127.0.0.1:9/a.yaml"), "no yaml"),
    "a yaml of no layers": (with_yaml(head=[]), "lists no layers"),
    "another yaml": (with_yaml(depth_multiple=3.0, scales=None), "its yaml"),
    "a million classes": (with_yaml(nc=1_000_000), "odd nc"),
    "names for other classes": (with_attribute("names", {0: "person"}), "no names for its 2 classes"),
    "names that are no text": (with_attribute("names", {0: "person", 1: ["bus"]}), "no text"),
    "a name of a megabyte": (with_attribute("names", {0: "person", 1: "b" * 2**20}), "no text"),
    "a frame of no size": (with_attribute("args", {"imgsz": 0}), "odd frame size"),
    "a frame of a gigapixel": (with_attribute("args", {"imgsz": 10**9}), "odd frame size"),
    "a frame size that is text": (with_attribute("args", {"imgsz": "640"}), "odd frame size"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_more_than_a_network_is_refused(refused, checkpoint, name):
    change, expected = RECIPES[name]
    assert expected in refused(checkpoint(change))


def test_attention_over_a_large_map_is_refused_before_it_takes_its_memory(model):
    recipe = copy.deepcopy(model.yaml)
    recipe["backbone"][1] = [-1, 1, "AIFI", [64, 8]]
    network = build_network(DetectionModel, recipe, 1000)
    network.model.to_empty(device="cpu")
    with pytest.raises(Damaged, match="enormous attention"):
        find_strides(network)


def test_a_network_that_cannot_be_made_leaves_the_activation_of_others_as_it_was(model):
    recipe = copy.deepcopy(model.yaml) | {"activation": "nn.ReLU()"}
    recipe["backbone"][3] = [77, 1, "Conv", [256, 3, 2]]
    with pytest.raises(Damaged, match="no network can be made"):
        build_network(DetectionModel, recipe, 1000)
    assert isinstance(Conv.default_act, nn.SiLU)


def relu(model):
    model.model[0].act = nn.ReLU()


def wider(model):
    model.model[0].conv.padding = (3, 3)


def other_stride(model):
    model.model[-1].stride = torch.tensor([8.0, 16.0, 64.0])


def not_finite(model):
    model.model[3].conv.weight.data[0, 0, 0, 0] = float("nan")


def integers(model):
    model.model[0].conv.weight = nn.Parameter(model.model[0].conv.weight.to(torch.int8), requires_grad=False)


def many_long_names(model):
    leaf = nn.Identity()
    part = nn.Module()
    part._modules["a" * 20_000] = leaf
    model.model[0].parts = nn.ModuleList([part] * 9_000)


def one_more(model):
    model.model[0].extra = nn.Conv2d(1, 1, 1)


def one_less(model):
    del model.model[0].bn


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (relu, "model.0.act is a ReLU"), (wider, "model.0.conv.padding"), (other_stride, "model.22.stride"),
        (not_finite, "not finite"), (integers, "of another type"), (one_more, "model.0.extra"),
        (one_less, "model.0.bn"), (many_long_names, "a module that is none"),
    ],
)  # fmt: skip
def test_a_network_that_is_not_what_its_yaml_says_is_refused(refused, checkpoint, change, expected):
    assert expected in refused(checkpoint(change))


def test_a_model_without_a_model_is_refused(refused):
    assert "has no yaml" in refused(archive(in_model(build(call(YOLO), plain({"yaml": 1})))))


def test_hooks_and_methods_that_a_file_sets_are_not_honoured(tmp_path, checkpoint, bus):
    def hooked(model):
        for name in ("forward", "state_dict", "fuse", "float", "eval", "to", "parameters", "load_state_dict"):
            vars(model)[name] = print
            vars(model.model[0])[name] = print
        model._forward_hooks[0] = model.model[0]._forward_pre_hooks[0] = print
        model._state_dict_hooks[0] = print
        model.model[0].conv._backward_hooks[0] = print

    (tmp_path / "plain.pt").write_bytes(checkpoint())
    (tmp_path / "hooked.pt").write_bytes(repacked(checkpoint(hooked)))
    ours, theirs = (load_detector(tmp_path / name) for name in ("plain.pt", "hooked.pt"))
    assert ours.state_hash() == theirs.state_hash()
    assert ours.detect([bus], 0.0)[0].boxes.equal(theirs.detect([bus], 0.0)[0].boxes)


def repacked(data):
    """The archive with `print` called `torch.print`: of a module that checkpoints do name."""
    with zipfile.ZipFile(io.BytesIO(data)) as given:
        parts = {name: given.read(name) for name in given.namelist()}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        for name, part in parts.items():
            file.writestr(name, part.replace(b"c__builtin__\nprint\n", b"ctorch\nprint\n"))
    return made.getvalue()


def test_what_is_told_of_a_file_is_bounded_though_its_data_are_not(refused, checkpoint):
    def endless(model):
        activation = "x"
        for _ in range(64):  # in words, 2^64 letters
            activation = [activation, activation]
        model.yaml["activation"] = activation

    assert "activation that detguard does not know: list" in refused(checkpoint(endless))


def test_names_of_classes_are_text_that_files_can_hold(refused, checkpoint):
    def halves(model):
        model.names = {0: "person", 1: "b\udce8s"}

    assert "class names that are no text" in refused(checkpoint(halves))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([[-1, 1, "nn.Upsample", [None, 9, "nearest"]]], "enormous windows"),
        ([[-1, 1, "nn.ConvTranspose2d", [64, 1, 9]]], "enormous windows"),
        (
            [[-1, 1, "nn.Upsample", [None, 8, "nearest"]], [-1, 1, "nn.Upsample", [None, 2, "nearest"]]],
            "enormous outputs",
        ),
    ],
)
def test_layers_that_enlarge_without_end_are_refused(model, layers, message):
    recipe = copy.deepcopy(model.yaml)
    recipe["backbone"][: len(layers)] = layers
    network = build_network(DetectionModel, recipe, 1000)
    network.model.to_empty(device="cpu")
    with pytest.raises(Damaged, match=message):
        find_strides(network)


def test_a_network_of_far_more_modules_than_its_file_has_is_not_made(model):
    with pytest.raises(Damaged, match="a larger one than detectors are"):
        build_network(DetectionModel, copy.deepcopy(model.yaml), -240)  # 40 are left


def test_numbers_of_a_big_endian_machine_are_not_read_as_others(refused, checkpoint):
    swapped = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(checkpoint())) as old, zipfile.ZipFile(swapped, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("/byteorder") else old.read(name))
    assert "big-endian" in refused(swapped.getvalue())
