"""The process that detguard runs in: its memory and its arithmetic."""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from detguard import DetguardError, first_line

if TYPE_CHECKING:
    import torch

Given = ParamSpec("Given")
Result = TypeVar("Result")

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step instead of giving it back to the system; elsewhere do nothing.

    Every step of an attack or a training frees all its activations and wants them again at once. Given back in
    between, each page has to be faulted in anew: two fifths of a training step on two cores went there.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def torch_device(name: "str | int | torch.device") -> str:
    """What torch calls a device.

    Args:
        name: as users name it: auto (a GPU where CUDA finds one, else the CPU), a number of a GPU, or as torch does.
    """
    name = str(name)
    if name == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{name}" if name.isdecimal() else name


def usable_device(name: "str | int | torch.device") -> str:
    """What torch calls a device, as `torch_device`, that it has here.

    Raises:
        DetguardError: it cannot be used.
    """
    import torch

    device = torch_device(name)
    try:
        float(torch.zeros(1, device=device))  # of "meta", which holds no numbers, too
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).partition(". ")[0]  # torch goes on with all that it has
        raise DetguardError(f"`device` {device}: cannot be used ({reason})") from error
    # By number: libraries take the bare word for the first one.
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def with_gradients(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function, or generator, in which there are gradients, whatever its caller has turned off."""
    import torch

    return torch.inference_mode(mode=False)(function)


def with_doubles(x: "torch.Tensor") -> "torch.Tensor":
    """A tensor where it can be made one of doubles: on the CPU, for Apple's devices and some of Intel's have none."""
    return x.cpu() if x.device.type in ("mps", "xpu") else x


def die_with(parent: int) -> None:
    """Have this process, just started by `parent`, be killed when that one ends; elsewhere than on Linux do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: to be sent when the parent ends
        if os.getppid() != parent:
            os._exit(0)  # it has ended


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take of the machine, or of its container; None where Linux does not tell."""
    free: list[int] = []
    if match := re.search(r"^MemAvailable: *(\d+) kB", _told(root / "proc/meminfo"), re.MULTILINE):
        free.append(1024 * int(match[1]))
    group = root / "sys/fs/cgroup"
    most, used = _told(group / "memory.max").strip(), _told(group / "memory.current").strip()
    if most.isdecimal() and used.isdecimal():
        cached = re.search(r"^inactive_file (\d+)", _told(group / "memory.stat"), re.MULTILINE)
        free.append(max(0, int(most) - int(used) + (int(cached[1]) if cached else 0)))
    return min(free, default=None)


def _told(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def bf16_helps(device: "torch.device | None" = None) -> bool:
    """Whether a device, by default the CPU, multiplies bfloat16 in hardware; emulated, it is slower than float32."""
    import torch  # late: every command, --help too, starts with this module

    if device is not None and device.type == "cuda":
        # `torch.cuda.is_bf16_supported` answers for the current GPU.
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device is not None and device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
