"""metrics.json of strangers, of other versions, and of what does not fit together."""

import json
from typing import Annotated, Literal, NotRequired, TypedDict

import pytest

from detguard import DetguardError
from detguard.evaluation.metrics import SCHEMA, read_draws, read_metrics
from detguard.schema import Items, Maybe, shape_of, size, text

SETTING = {
    "schema": SCHEMA, "version": "1", "data": "d", "photos": 4, "photos_sha256": "a", "classes": 1,
    "unknown_classes": {}, "imgsz": 320, "end_to_end": False, "nms": 0.7, "seed": 0, "sha256": "b", "left_out": 0,
}  # fmt: skip
FIGURE = {"AP": 0.1, "AP50": None}
FOG = FIGURE | {"severities": {"3": FIGURE}}
BUDGET = FIGURE | {"by": "all-0", "attacks": {"worst": FIGURE, "all-0": FIGURE}}
METRICS = {
    "setting": SETTING,
    "corruptions": FIGURE | {"mPC": 0.1, "rPC": None, "kinds": {"fog": FOG, "snow": FOG}},
    "attack": FIGURE | {"by": "all-0", "eps": 4, "seed": 0, "budgets": {"2": BUDGET, "4": BUDGET}},
    "patch": {"class": "person", "size": 0.3, "file": "p.png", "content": "c", "shown": {"patch": None}},
    "universal": {"eps": 4, "file": "u.png", "content": "c", "shown": {"universal": FIGURE}},
}


@pytest.fixture
def write(tmp_path):
    def written(change):
        found = {"a": json.loads(json.dumps(METRICS))}
        change(found["a"])
        (tmp_path / "metrics.json").write_text(json.dumps(found))
        return tmp_path / "metrics.json"

    return written


def test_a_file_of_a_later_detguard_is_not_called_damaged(write):
    file = write(lambda m: m["setting"].update(schema=SCHEMA + 1, new="of it"))
    with pytest.raises(DetguardError, match=r"written by a later detguard .* update this one"):
        read_metrics(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("setting"), "a.setting: missing"),
        (lambda m: m["attack"].update(AP="high"), "a.attack.AP: expected a number, 0 to 1"),
        (lambda m: m["corruptions"]["kinds"]["fog"]["severities"].update({"x": FIGURE}), "severities.x: not known"),
        (lambda m: m["corruptions"]["kinds"]["fog"].update({"made by": "p"}), "kinds.fog.made by: not known"),
        (lambda m: m["corruptions"]["kinds"].clear(), "corruptions.kinds: expected one or more"),
        (lambda m: m["corruptions"]["kinds"]["fog"].update(severities={"1": FIGURE}), "of the same severities"),
        (lambda m: m["attack"].update(eps=8), "attack.budgets: expected some of 1 to 255, `eps` among them"),
        (lambda m: m["attack"]["budgets"].update({"x": BUDGET}), "attack.budgets: expected some of 1 to 255"),
        (lambda m: m["attack"].update(by="vanish-0"), "attack.budgets: expected the same attacks of each, `by`"),
        (lambda m: m["attack"]["budgets"]["2"].update(by="worst", attacks={"worst": FIGURE}), "the same attacks"),
        (lambda m: m["patch"].update(shown={}), "patch.shown.patch: missing"),
        (lambda m: m["universal"].update(shown={}), "universal.shown.universal: missing"),
    ],
)
def test_what_does_not_fit_is_refused_with_how_it_is_written_anew(write, change, message):
    file = write(change)
    with pytest.raises(DetguardError) as raised:
        read_metrics(file)
    assert message in str(raised.value)
    assert f"detguard evaluate --resume {file.parent}" in str(raised.value)


@pytest.mark.parametrize("data", ["[]", '{"a": 3}', '{"a": {"clean": [0.5]}}', "{"])
def test_draws_that_are_none_are_refused(tmp_path, data):
    (tmp_path / "draws.json").write_text(data)
    with pytest.raises(DetguardError, match=r"draws\.json: .*evaluate --resume"):
        read_draws(tmp_path / "draws.json")


def test_a_type_says_what_a_file_must_hold():
    class Inner(TypedDict, total=False):
        name: str

    class Outer(Inner):
        sizes: list[Annotated[int, size]]
        levels: dict[Literal["1", "2"], str]
        rest: NotRequired[dict[str, str] | None]

    assert shape_of(Outer) == {
        "name?": text,
        "sizes": Items(size),
        "levels": {"1?": text, "2?": text},
        "rest?": Maybe({"*": text}),
    }
