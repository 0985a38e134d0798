"""MAITE's own tasks on what is ours, with every call checked against its protocols."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from maite import tasks
from maite.protocols import object_detection as od
from maite.spotcheck import spotcheck, spotcheck_component

from detguard import DetguardError
from detguard.data.dataset import read_dataset
from detguard.detectors.contract import check_contract
from detguard.evaluation.cache import Cache
from detguard.evaluation.corruptions import corrupt
from detguard.evaluation.score import score
from detguard.evaluation.views import Clean, Subject, fill
from detguard.integrations.maite import Attack, CocoMetric, Corruption, Dataset, MaiteDetector, Model, to_photo
from detguard.photos import photo_seed


@pytest.fixture(scope="module")
def dataset(tiny_data, bundled):
    return Dataset(tiny_data, bundled.class_names)


def evaluate(bundled, dataset, augmentation=None):
    """Metrics and images by MAITE's own task, checked."""
    checked = spotcheck(tasks.evaluate, ai_problem="object_detection")
    asked = {"model": Model(bundled), "dataset": dataset, "metric": CocoMetric(), "batch_size": 4}
    metrics, _, data = checked(**asked, augmentation=augmentation, return_augmented_data=True)
    return metrics, data[0][0]


def test_its_evaluation_gives_the_figures_of_ours(bundled, dataset, tiny_data, tmp_path):
    ours = read_dataset(tiny_data)
    subject = Subject("bundled", bundled, ours, ours.category_ids(bundled.class_names), Cache(tmp_path / "c.sqlite"))
    fill(subject, [Clean()])
    expected = score(subject, Clean(), sizes=True).stats
    metrics, _ = evaluate(bundled, dataset)
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(np.nan if expected[name] is None else expected[name], abs=2e-3, nan_ok=True)


def test_corruptions_are_the_published_ones_by_the_id_of_an_image(bundled, dataset):
    metrics, images = evaluate(bundled, dataset, Corruption("contrast", 5))
    assert metrics["AP"] < 0.8
    image, _, metadata = dataset[1]
    noise = Corruption("gaussian_noise", 2, seed=7)
    (alone,), _, _ = noise(([image], [None], [metadata]))
    seed = photo_seed(f"{metadata['id']}/gaussian_noise-2", 7) % 2**32
    assert np.array_equal(to_photo(alone), corrupt(to_photo(image), "gaussian_noise", 2, seed))
    assert images[1].shape == image.shape


def test_attacks_take_ap_away_within_their_budget(bundled, dataset):
    metrics, images = evaluate(bundled, dataset, Attack(bundled, eps=8, steps=2))
    assert metrics["AP"] < 0.6
    for number, image in enumerate(images):
        assert 0 < np.abs(image.astype(int) - dataset[number][0]).max() <= 8


def test_floats_stay_floats(dataset):
    image, target, metadata = dataset[0]
    (changed,), _, _ = Corruption("brightness", 1)(([np.float32(image / 255)], [target], [metadata]))
    (whole,), _, _ = Corruption("brightness", 1)(([image], [target], [metadata]))
    assert changed.dtype == np.float32
    assert np.array_equal(np.rint(changed * 255), whole)
    assert np.array_equal(to_photo(image[:, ::-1, ::-1]), image.transpose(1, 2, 0)[::-1, ::-1])


def test_its_models_are_detectors_that_keep_what_detectors_promise(bundled, bus):
    checked = spotcheck_component(od.Model)(Model(bundled))
    detector = MaiteDetector(checked)
    promises = list(check_contract(detector, bus[::2, ::2].copy(), 0.05))
    assert [promise.name for promise in promises if promise.state == "BROKEN"] == []
    found, theirs = detector.predict(bus, 0.3), bundled.detect([bus], 0.3, multi_label=True)[0]
    assert len(found) == len(theirs) > 3
    assert torch.allclose(found.boxes, theirs.boxes, atol=0.01)
    assert detector.state_hash() != MaiteDetector(checked).state_hash()


@pytest.mark.parametrize(
    ("augmentation", "option", "value"),
    [
        *((Attack, "eps", value) for value in (2.5, 300, 0, -3)),
        (Attack, "steps", 0),
        (Corruption, "kind", "fgo"),
        (Corruption, "severity", 9),
    ],
)
def test_settings_that_there_are_not_are_refused_at_once(bundled, augmentation, option, value):
    others = {Attack: {"detector": bundled}, Corruption: {"kind": "fog", "severity": 3}}[augmentation]
    with pytest.raises(DetguardError, match=f"`{option}`"):
        augmentation(**others | {option: value})


def test_a_model_without_class_names_and_a_detector_without_a_gradient_are_refused(bundled):
    class Nameless:
        metadata = {"id": "nameless"}  # noqa: RUF012

    with pytest.raises(DetguardError, match="no index2label"):
        MaiteDetector(Nameless())
    with pytest.raises(DetguardError, match="no gradient"):
        Attack(MaiteDetector(Model(bundled)))


def test_answers_that_a_model_does_not_declare_are_refused(bundled, bus):
    class Model:
        metadata = {"id": "odd", "index2label": {0: "person", 2: "bus"}}  # noqa: RUF012

        def __init__(self, label, count=1):
            self.label, self.count = label, count

        def __call__(self, images):
            one = SimpleNamespace(boxes=np.zeros((1, 4)), labels=np.array([self.label]), scores=np.array([0.9]))
            return [one] * self.count

    assert len(MaiteDetector(Model(2)).predict(bus, 0.25)) == 1
    for label in (1, 3):
        with pytest.raises(DetguardError, match=f"odd: finds labels that its index2label does not name: {label}"):
            MaiteDetector(Model(label)).predict(bus, 0.25)
    with pytest.raises(DetguardError, match="odd: answers for 2 of 1 images"):
        MaiteDetector(Model(2, 2)).predict(bus, 0.25)
