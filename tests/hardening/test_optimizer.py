import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from detguard.hardening.optimizer import CLIP, MOMENTUM, Optimizer, orthogonal


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        made[0].weight.mul_(100)
    return made.to(memory_format=torch.channels_last)


def loss_of(network):
    x = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    return network(x).square().mean()


def moved(network, before):
    return [(now.detach() - was).square().mean().sqrt() for now, was in zip(network.parameters(), before, strict=True)]


def test_steps_are_in_proportion_to_the_weights_of_a_layer_or_of_the_rate_itself(network):
    before = [p.detach().clone() for p in network.parameters()]
    fixed = list(network[3].parameters())
    Optimizer(list(network.parameters()), fixed).update(loss_of(network), 1e-3)
    for step, was in list(zip(moved(network, before), before, strict=True))[:6:2]:
        assert float(step) == pytest.approx(1e-3 * float(was.square().mean().sqrt()), rel=0.35)
    assert float(moved(network, before)[6]) == pytest.approx(1e-3, rel=0.05)


def test_those_that_learn_slower_have_a_share_of_the_step(network):
    before, other = [p.detach().clone() for p in network.parameters()], copy.deepcopy(network)
    for one, shares in ((network, {}), (other, dict.fromkeys(other[2].parameters(), 0.1))):
        Optimizer(list(one.parameters()), [], shares=shares).update(loss_of(one), 1e-3)
    whole, slower = moved(network, before), moved(other, before)
    shares = [float(b / a) for a, b in zip(whole, slower, strict=True)]
    assert shares == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 1, 1], rel=0.05)


def test_steps_of_matrices_go_in_directions_that_the_gradient_hardly_has(network):
    weight = network[2].weight
    before = weight.detach().clone()
    Optimizer(list(network.parameters()), []).update(loss_of(network), 1e-3)
    step, gradient = (torch.linalg.svdvals(x.flatten(1)) for x in (weight.detach() - before, weight.grad))
    assert step.max() / step.min() < 0.2 * gradient.max() / gradient.min()


def test_weights_decay_where_no_gradient_is_and_biases_do_not(network):
    before = [p.detach().clone() for p in network.parameters()]
    Optimizer(list(network.parameters()), []).update(0 * loss_of(network), 1e-1)
    for now, was in zip(network.parameters(), before, strict=True):
        assert (now.abs() < was.abs()).all() if was.ndim > 1 else torch.equal(now, was)


def test_the_loss_falls(network):
    optimizer, first = Optimizer(list(network.parameters()), []), loss_of(network).item()
    for _ in range(20):
        optimizer.update(loss_of(network), 1e-2)
    assert loss_of(network).item() < 0.8 * first


def test_restored_it_goes_on_as_if_it_had_not_stopped(network):
    optimizer = Optimizer(list(network.parameters()), [])
    optimizer.update(loss_of(network), 1e-2)
    other, state = copy.deepcopy(network), copy.deepcopy(optimizer.state_dict())
    resumed = Optimizer(list(other.parameters()), [])
    resumed.load_state_dict(state)
    for one, steps in ((network, optimizer), (other, resumed)):
        steps.update(loss_of(one), 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("bf16", [False, True])
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(2, 40), st.integers(0, 9))
def test_an_orthogonal_step_keeps_the_directions_of_a_matrix_and_evens_their_lengths(bf16, rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    with pytest.MonkeyPatch.context() as patch:  # which processors multiply it does not matter for what comes out
        patch.setattr("detguard.hardening.optimizer.bf16_helps", lambda device: bf16)
        made = orthogonal(matrix[None])[0] / max(rows, columns) ** 0.5
    assert made.dtype == torch.float32
    lengths = (u.mT @ made @ v.mT).diagonal()
    assert lengths.min() > 0
    assert 0.6 < lengths.median() < 1.3
    assert (made - u @ lengths.diag() @ v).abs().max() < 0.05


def test_a_gradient_out_of_all_bounds_does_not_fill_the_momentum(network):
    optimizer = Optimizer(list(network.parameters()), [])
    optimizer.update(1e6 * loss_of(network), 1e-3)
    kept = sum(float(momentum.square().sum()) for momentum in optimizer.momenta) ** 0.5
    assert 0 < kept <= 1.001 * (1 - MOMENTUM) * CLIP
