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


@pytest.fixture(scope="module")
def told():
    """What went wrong in the steps of `pretended.py`."""
    program = Path(__file__).with_name("pretended.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "step",
    [
        "adversarial", "hard", "joint", "joint, pgd, all learn", "normal on a shared trunk", "pgd", "fgsm", "mtd",
        "labels, too", "pretrain", "finetune", "adapt, full", "adapt, frozen",
    ],
)  # fmt: skip
def test_a_step_of_every_stage_stays_on_its_device(told, step):
    assert not told[step], told[step]


def test_what_waits_for_a_device_is_told(told):
    assert "DataDependentOutputException" in told["a loss that is read"]
    assert "FakeTensorDeviceMismatchError" in told["a tensor on the CPU"]


def test_without_bfloat16_passes_are_as_they_are():
    assert isinstance(Setting().precision(), nullcontext)
    assert Setting(bf16=True).precision().fast_dtype == torch.bfloat16


def test_several_processes_do_not_share_one_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DetguardError, match="`device` cuda:0: 2 processes get a GPU each"):
        Ranks.start("cuda:0")
