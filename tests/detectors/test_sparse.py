import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detguard import DetguardError
from detguard.detectors import sparse
from detguard.detectors.gated import GatedDetector, GatedNetwork
from detguard.detectors.load import fused, load_detector, save_gated
from detguard.detectors.sparse import FREE, HELD, MeanSparse


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.floats(0, 2))
def test_values_near_the_mean_of_their_channel_are_set_to_it_and_the_gradient_does_not_notice(seed, reach):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 4, 5, generator=generator).requires_grad_()
    layer = MeanSparse(3)
    layer.mean.copy_(torch.tensor([0.0, 1.0, -2.0]))
    layer.limit.copy_(torch.tensor([0.0, reach, 1.0]))
    mean, limit = (value[:, None, None].expand_as(x) for value in (layer.mean, layer.limit))
    away = (x - mean).abs()
    made = layer(x)
    assert torch.allclose(made[away <= HELD * limit], mean[away <= HELD * limit], atol=1e-6)
    assert torch.equal(made[away >= FREE * limit], x[away >= FREE * limit])
    between = (made - mean).abs()
    assert (between <= away + 1e-6).all()
    (gradient,) = torch.autograd.grad(made.sum(), x)
    assert (gradient == 1).all()


def test_rounding_does_not_jump_over_a_threshold():
    layer, x = MeanSparse(1), torch.linspace(-2, 2, 4001).view(1, 1, 1, -1)
    layer.limit.fill_(1.0)
    assert layer(x).diff().max() < 7 * x.diff().max()
    assert (layer(x).diff() >= 0).all()


@pytest.fixture
def network(bundled):
    return GatedNetwork(bundled.model, 11, fusion="bounded:0.25").eval().requires_grad_(False)


@pytest.fixture
def frames():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_its_ramp_is_part_of_what_a_detector_is(monkeypatch, bundled_model):
    hashes = set()
    for free in (FREE, FREE + 0.1):
        monkeypatch.setattr(sparse, "FREE", free)
        ensemble = GatedNetwork(fused(bundled_model), 11, sparse=(2,))
        hashes.add(GatedDetector(ensemble, "a", 320).state_hash())
    assert len(hashes) == 2


def test_it_changes_the_robust_expert_alone_by_how_far_it_reaches(network, frames):
    before = [network(frames, route)[0]["scores"] for route in range(3)]
    apart = []
    for reach in (0.0, 0.1, 0.5):
        network.sparsen([frames], reach)
        after = [network(frames, route)[0]["scores"] for route in range(3)]
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[1], before[1])
        apart.append(float((after[2] - before[2]).abs().mean()))
    assert apart[0] < 1e-5 < apart[1] < apart[2]
    network.drop_sparse()
    assert torch.equal(network(frames, 2)[0]["scores"], before[2])


def test_it_is_kept_in_files_and_by_experts_that_grow_from_a_sparse_one(network, frames, bundled, tmp_path):
    network.sparsen([frames], 0.2)
    network.grow(["new"], 2)
    card = {"architecture": "yolo11n.yaml", "classes": list(bundled.class_names.values()), "imgsz": 64}
    save_gated(network, card, tmp_path / "grown.safetensors")
    again = load_detector(tmp_path / "grown.safetensors")
    assert isinstance(again, GatedDetector)
    assert again.model.sparse == [2, 3]
    for route in (2, 3):
        assert torch.allclose(again.model(frames, route)[0]["scores"], network(frames, route)[0]["scores"], atol=1e-4)


@pytest.mark.parametrize("given", ["[7]", '["x"]', "5", "[-1]"])
def test_a_card_of_no_such_experts_is_refused(network, frames, bundled, tmp_path, given):
    network.sparsen([frames], 0.2)
    card = {"architecture": "yolo11n.yaml", "classes": list(bundled.class_names.values()), "imgsz": 64}
    save_gated(network, card, tmp_path / "odd.safetensors")
    text = (tmp_path / "odd.json").read_text()
    (tmp_path / "odd.json").write_text(re.sub(r'"sparse": \[\s*2\s*\]', f'"sparse": {given}', text))
    with pytest.raises(DetguardError, match="gated"):
        load_detector(tmp_path / "odd.safetensors")
