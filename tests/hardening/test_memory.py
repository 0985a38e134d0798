import pytest
import torch

import detguard.hardening.memory as module
from detguard import DetguardError
from detguard.engine import free_memory
from detguard.hardening.memory import PEAK, PROBE, check_memory, kept_bytes


@pytest.fixture
def network():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.Sigmoid())


def loss(network):
    return lambda frames: network(frames).sum()


def test_what_a_forward_pass_keeps_is_counted_without_the_weights(network):
    frame, map_ = 4 * 3 * PROBE**2, 4 * 8 * PROBE**2
    assert kept_bytes(network, loss(network)) == frame + map_


def test_what_autocast_makes_of_weights_does_not_grow_with_the_frames(network):
    def rounded(frames):
        with torch.autocast("cpu", torch.bfloat16):
            return network(frames).sum()

    frame, maps = 2 * 3 * PROBE**2, 2 * 8 * PROBE**2
    assert kept_bytes(network, rounded) == frame + maps


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does(network, monkeypatch):
    of_frame = PEAK * kept_bytes(network, loss(network)) * (640 / PROBE) ** 2
    monkeypatch.setattr(module, "memory_of", lambda device: round(10.5 * of_frame))
    check_memory(network, loss(network), 640, 10)
    with pytest.raises(DetguardError, match=r"`batch` 11: .* frames of 640 px .*; `batch` 10 fits"):
        check_memory(network, loss(network), 640, 11)
    with pytest.raises(DetguardError, match="smaller frames"):
        check_memory(network, loss(network), 6400, 2)


def test_a_container_may_have_less_memory_than_its_machine(tmp_path):
    files = {
        "proc/meminfo": "MemTotal: 16000 kB\nMemAvailable:    8000 kB\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/memory.current": "3000000\n",
        "sys/fs/cgroup/memory.stat": "anon 5\ninactive_file 500000\n",
    }
    assert free_memory(tmp_path) is None
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == 8_192_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("4000000\n")
    assert free_memory(tmp_path) == 1_500_000
