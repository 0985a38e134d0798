"""Training steps on a device that only pretends: no tensor is left on the CPU, and nothing is read back from it."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from detguard import DetguardError
from detguard.hardening.train import Setting
from detguard.ranks import Ranks


def test_a_step_of_every_stage_stays_on_its_device_and_what_does_not_is_an_error():
    program = Path(__file__).with_name("pretended.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
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
