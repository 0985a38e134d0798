"""What a step of training takes of memory, measured on one small frame before there is a step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from detguard import DetguardError
from detguard.engine import free_memory
from detguard.ranks import ALONE, Ranks

# Side of the frame that is measured, a multiple of all strides: what is kept for the backward pass grows with the area.
PROBE = 192
# A step at its peak takes so many times what one forward pass keeps: 1.4 to 1.9 of YOLO11n, by stage and batch.
PEAK = 1.7


def check_memory(
    network: nn.Module, loss: Callable[[Tensor], Tensor], size: int, batch: int, ranks: Ranks = ALONE
) -> None:
    """See that there is memory for steps on a batch of frames of `size` pixels, which `ranks` share.

    loss: of frames, [B, 3, H, W], by the network, both on the device of this process.

    Raises:
        DetguardError: there is not; tells the largest batch that fits.
    """
    free = memory_of(ranks.device)
    if free is None:
        return
    # Of a GPU each process has one to itself; on CPUs those of a machine share its memory.
    of_batch = (ranks.local if ranks.device.type == "cpu" else 1) / ranks.count
    of_frame = PEAK * kept_bytes(network, loss, ranks.device) * (size / PROBE) ** 2 * of_batch
    if batch * of_frame <= free:
        return
    fits = int(free / of_frame)
    advice = f"`batch` {fits} fits" if fits > 1 else "train on smaller frames"
    raise DetguardError(
        f"`batch` {batch}: a step on frames of {size} px takes about {batch * of_frame / 1e9:.1f} GB, of which "
        f"{free / 1e9:.1f} are free; {advice}"
    )


def memory_of(device: torch.device) -> int | None:
    """Bytes of a device that are free, those that torch keeps for later included; None where nothing tells."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return free_memory() if device.type == "cpu" else None


def kept_bytes(network: nn.Module, loss: Callable[[Tensor], Tensor], device: torch.device = torch.device("cpu")) -> int:
    """Bytes that one frame more, PROBE pixels wide, has a forward pass keep for the backward pass.

    What does not grow with the frames, as weights and what autocast or low ranks make of them, does not count.
    """

    def kept(count: int) -> int:
        found: dict[int, Tensor] = {}  # which are not freed, or others would get their places

        def keep(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        frames = torch.full((count, 3, PROBE, PROBE), 0.5, device=device)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss(frames.contiguous(memory_format=torch.channels_last).requires_grad_())
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())

    return kept(2) - kept(1)
