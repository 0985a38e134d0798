"""Attacks on gated ensembles go where their names say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from detguard.data.dataset import read_dataset
from detguard.detectors.gated import GatedDetector, GatedNetwork
from detguard.detectors.load import fused
from detguard.detectors.ultralytics import UltralyticsDetector
from detguard.evaluation.attacks import AttackSet, attacks_on
from detguard.evaluation.cache import Cache
from detguard.evaluation.run import Protocols
from detguard.evaluation.views import Batch, Subject
from detguard.reports.evaluation import tables
from detguard.workflows.evaluate import evaluate

ATTACK = AttackSet(("all",), eps=4, steps=2)


@pytest.fixture(scope="module")
def gated(bundled_model, tiny_data, tmp_path_factory):
    """Two photos, and an ensemble of three experts, which differ, of which one is asked."""
    torch.manual_seed(0)
    network = GatedNetwork(fused(bundled_model), 22, top_k=1)
    with torch.no_grad():
        for expert in network.experts[1:]:
            for parameter in expert.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    dataset = read_dataset(tiny_data, limit=2)
    detector = GatedDetector(network, "three", 160)
    cache = Cache(tmp_path_factory.mktemp("cache") / "c.sqlite")
    return Subject("three", detector, dataset, dataset.category_ids(detector.class_names), cache)


def photos(subject, attack, detector=None):
    """Two photos after one attack, one after the other."""
    subject = replace(subject, detector=detector or subject.detector)
    return np.concatenate(
        [p.ravel() for ids in subject.batches() for p in ATTACK.attack(Batch(subject, ids), attack, 0)]
    )


def test_a_route_is_attacked_through_its_expert(gated):
    through = {i: photos(gated, f"route:{i}") for i in range(3)}
    for i, attacked in through.items():
        assert np.array_equal(attacked, photos(gated, "all", gated.detector.through(i)))
    assert not any(np.array_equal(through[i], through[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_dense_is_the_attack_on_all_experts_at_once(gated):
    attacked = photos(gated, "dense")
    assert np.array_equal(attacked, photos(gated, "all", gated.detector.dense()))
    assert not np.array_equal(attacked, photos(gated, "all"))


def test_the_gates_weight_is_in_the_name(gated):
    assert not np.array_equal(photos(gated, "gate:1"), photos(gated, "gate:100"))


def test_an_ensemble_is_attacked_in_every_way_through_it(gated):
    ways = ("gate:1", "gate:10", "gate:100", "route:0", "route:1", "route:2", "rank:0", "rank:1", "rank:2", "dense")
    assert attacks_on(gated.detector, ("all",)) == ("all", *ways)


def test_vanish_goes_on_below_the_confidence_that_users_see(gated, monkeypatch):
    attacked = photos(gated, "vanish")
    monkeypatch.setattr("detguard.evaluation.attacks.VANISH_BELOW", 0.25)
    assert not np.array_equal(attacked, photos(gated, "vanish"))


class Blind(UltralyticsDetector):
    differentiable = False

    def candidates(self, frames):
        assert not torch.is_grad_enabled()
        return super().candidates(frames)


def test_what_has_no_gradient_is_attacked_by_square_alone(bundled, bundled_model, tiny_data, tmp_path):
    blind = Blind(bundled_model, "blind", 160)
    plan = {"protocols": ("attack", "blackbox", "checks"), "eps": (16,), "queries": 8}
    assert [view.name for view in Protocols(**plan).views(blind)] == ["clean", "blackbox-eps16-queries8"]
    metrics = evaluate(blind, tiny_data, cache=tmp_path / "c.sqlite", limit=2, **plan)
    found = metrics["blind"]
    assert found["blackbox"]["AP"] == found["attack"]["AP"]
    assert list(found["attack"]["budgets"]["16"]["attacks"]) == ["worst", "square-0"]
    assert found["attack"]["queries"] == 8
    assert not {"steps", "restarts"} & found["attack"].keys()
    assert "checks" not in found
    result, attacks = tables(metrics)
    assert "eps 16, Square, 8 queries" in result.rows[0]
    assert "blind: no gradient" in result.note
    assert attacks.title == "Attacks without a gradient"
    assert "PGD" not in attacks.note


def test_the_order_of_one_expert_is_attacked_through_it(gated):
    for i in range(3):
        assert np.array_equal(photos(gated, f"rank:{i}"), photos(gated, "rank", gated.detector.through(i)))
