"""Training steps on a device that only pretends: no tensor is left on the CPU, and nothing is read back from it."""

import json
import multiprocessing
from contextlib import nullcontext

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
