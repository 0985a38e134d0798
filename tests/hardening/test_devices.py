"""Training steps on a device that only pretends: no tensor is left on the CPU, and nothing is read back from it."""

import json
import multiprocessing
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from detguard import DetguardError
from detguard.hardening.train import Setting
from detguard.ranks import Ranks


def pretend(file):
    """What a process of its own does, which alone may import the device."""
    from pretended import tell

    tell(file)


def test_a_step_of_every_stage_stays_on_its_device_and_what_does_not_is_an_error(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["detguard.workflows.harden"])
    process = context.Process(target=pretend, args=(tmp_path / "errors.json",))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    errors = json.loads((tmp_path / "errors.json").read_text())
    assert "DataDependentOutputException" in errors.pop("a loss that is read")
    assert "FakeTensorDeviceMismatchError" in errors.pop("a tensor on the CPU")
    assert len(errors) == 16
    assert not any(errors.values()), "\n".join(f"{step}: {error}" for step, error in errors.items() if error)


def test_without_bfloat16_passes_are_as_they_are():
    assert isinstance(Setting().precision(), nullcontext)
    assert Setting(bf16=True).precision().fast_dtype == torch.bfloat16


def test_several_processes_do_not_share_one_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DetguardError, match="`device` cuda:0: 2 processes get a GPU each"):
        Ranks.start("cuda:0")


@pytest.mark.parametrize(("others", "shared"), [(("a", "0"), True), (("a", "1"), False), (("b", "0"), False)])
def test_more_processes_than_gpus_are_refused(monkeypatch, others, shared):
    def gather(lists, own, **_):
        lists[:] = [own, [others]]

    state = SimpleNamespace(device=torch.device("cuda", 0), process_index=0, num_processes=2)
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr("accelerate.PartialState", lambda **_: state)
    monkeypatch.setattr("socket.gethostname", lambda: "a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0"))
    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: None)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    if not shared:
        assert Ranks.start("cuda").device == state.device
        return
    with pytest.raises(DetguardError, match=r"`device` cuda: 2 processes on a share 1 GPU\(s\); .* --nproc_per_node 1"):
        Ranks.start("cuda")
