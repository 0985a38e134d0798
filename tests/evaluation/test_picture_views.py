import copy
from dataclasses import replace

import numpy as np
import pytest

from detguard import DetguardError
from detguard.data.dataset import read_dataset
from detguard.evaluation.cache import Cache
from detguard.evaluation.metrics import read_metrics
from detguard.evaluation.pictures import check_pictures, patched, perturbed
from detguard.evaluation.run import Protocols, evaluate
from detguard.evaluation.views import Batch, Subject
from detguard.photos import encode_png
from detguard.reports.evaluation import evaluation_page, headline, tables
from detguard.runs import Run


@pytest.fixture
def subject(bundled, tiny_data, tmp_path):
    dataset = read_dataset(tiny_data, limit=2)
    return Subject("bundled", bundled, dataset, dataset.category_ids(bundled.class_names), Cache(tmp_path / "c.sqlite"))


@pytest.fixture
def file(tmp_path):
    patch = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (tmp_path / "patch.png").write_bytes(encode_png(patch))
    return str(tmp_path / "patch.png")


def test_each_patch_covers_the_same_pixels_of_labelled_objects_alone(subject, file):
    batch = Batch(subject, list(subject.dataset.files))
    person = subject.detector.class_index("person")
    shown = {view.label: view.show(batch) for view in patched(file, person, 0.4, 0)}
    assert list(shown) == ["grey", "random", "patch"]
    for i, (photo, objects) in enumerate(zip(batch.photos, batch.objects, strict=True)):
        covered = {kind: (photos[i] != photo).any(2) for kind, photos in shown.items()}
        assert covered["patch"].any()
        for box in objects.of([person]).boxes.tolist():
            x, y = round((box[0] + box[2]) / 2), round((3 * box[1] + box[3]) / 4)
            assert (shown["grey"][i][y, x] == 128).all()
        # Here and there a pixel has the patch's colour by chance.
        assert (covered["patch"] != covered["random"]).mean() < 0.001
    assert not (shown["patch"][0] == shown["random"][0]).all()


def test_the_ap_of_the_class_is_told_of_clean_grey_random_and_patch(subject, file, tmp_path):
    wanted = Protocols(protocols=("clean",), patch=file, patch_size=1.0)
    run = Run.create("evaluate", tmp_path / "run", {})
    evaluation = evaluate([subject], wanted, run)
    found = evaluation.metrics["bundled"]["patch"]
    assert (found["class"], found["size"]) == ("person", 1.0)
    assert list(found["shown"]) == ["clean", "grey", "random", "patch"]
    assert found["shown"]["clean"]["AP"] > 0.9 > found["shown"]["patch"]["AP"]
    assert found["shown"]["clean"]["objects"] == found["shown"]["patch"]["objects"] >= 4
    (table,) = [table for table in tables(evaluation.metrics) if table.title == "Patch: AP of person"]
    assert [row[0] for row in table.rows] == ["clean", "grey", "random", "patch"]
    assert len(table.rows[0]) == 1 + 2
    assert "patch AP" in headline(evaluation.metrics, "").head
    assert len(evaluation.draws["bundled"]["patch"]) == 100
    assert read_metrics(tmp_path / "run/metrics.json") == evaluation.metrics
    page = evaluation_page([subject], evaluation, wanted, ["detguard"]).decode()
    assert "Patch: AP of person" in page
    assert page.count("changed: patch") >= 2
    assert (tmp_path / "run/detections/bundled/grey-patch.json").exists()


def test_another_patch_is_another_entry_of_the_cache(subject, file, tmp_path):
    (tmp_path / "other.png").write_bytes(encode_png(np.zeros((32, 32, 3), np.uint8)))
    views = [patched(str(one), 0, 0.3, 0)[-1] for one in (file, tmp_path / "other.png")]
    assert views[0].key(subject, 11) != views[1].key(subject, 11)


def test_a_patch_that_is_not_square_is_refused(tmp_path):
    (tmp_path / "wide.png").write_bytes(encode_png(np.zeros((32, 40, 3), np.uint8)))
    with pytest.raises(DetguardError, match=r"wide\.png: 40 x 32 px; expected a square"):
        patched(str(tmp_path / "wide.png"), 0, 0.3, 0)


def test_a_class_that_is_not_evaluated_is_refused(subject, file):
    person = subject.detector.class_index("person")
    subject.category_ids = {k: v for k, v in subject.category_ids.items() if k != person}
    with pytest.raises(DetguardError, match="`patch_target` person: not evaluated"):
        check_pictures(subject, patched(file, person, 0.3, 0))


def test_the_ap_is_told_of_clean_random_and_universal(subject, tmp_path):
    (tmp_path / "u.png").write_bytes(encode_png(np.random.default_rng(0).integers(1, 256, (32, 32, 3), np.uint8)))
    wanted = Protocols(protocols=("clean",), universal=str(tmp_path / "u.png"))
    evaluation = evaluate([subject], wanted, Run.create("evaluate", tmp_path / "run", {}))
    found = evaluation.metrics["bundled"]["universal"]
    assert found["eps"] == 127
    assert list(found["shown"]) == ["clean", "random", "universal"]
    assert found["shown"]["clean"]["AP"] > 0.9 > found["shown"]["universal"]["AP"]
    (table,) = [table for table in tables(evaluation.metrics) if table.title == "Universal perturbation"]
    assert [row[0] for row in table.rows] == ["clean", "random", "universal"]
    assert "universal AP" in headline(evaluation.metrics, "").head
    assert read_metrics(tmp_path / "run/metrics.json") == evaluation.metrics
    page = evaluation_page([subject], evaluation, wanted, ["detguard"]).decode()
    assert page.count("changed: universal") >= 2


def test_random_signs_use_the_budget_of_the_perturbation(subject, tmp_path):
    picture = np.random.default_rng(0).integers(125, 132, (320, 320, 3), dtype=np.uint8)
    (tmp_path / "u.png").write_bytes(encode_png(picture))
    batch = Batch(subject, list(subject.dataset.files))
    for view in perturbed(str(tmp_path / "u.png"), 0):
        for shown, photo in zip(view.show(batch), batch.photos, strict=True):
            assert 1 <= np.abs(shown.astype(int) - photo).max() <= 3


def test_a_perturbation_that_changes_nothing_is_refused(tmp_path):
    (tmp_path / "u.png").write_bytes(encode_png(np.full((32, 32, 3), 128, np.uint8)))
    with pytest.raises(DetguardError, match=r"`universal` .*u\.png: changes nothing"):
        perturbed(str(tmp_path / "u.png"), 0)
    (tmp_path / "u.png").write_bytes(encode_png(np.zeros((32, 32, 3), np.uint8)))
    with pytest.raises(DetguardError, match=r"u\.png: changes by up to 128 levels; expected one that"):
        perturbed(str(tmp_path / "u.png"), 0)


def test_another_size_target_or_label_is_another_entry_of_the_cache(subject, file):
    moved = replace(subject, dataset=copy.deepcopy(subject.dataset))
    moved.dataset.annotations.imgToAnns[11][0]["bbox"][0] += 5
    views = [patched(file, target, size, 0)[-1] for target in (0, 4) for size in (0.3, 0.5)]
    assert len({view.key(one, 11) for view in views for one in (subject, moved)}) == 8
