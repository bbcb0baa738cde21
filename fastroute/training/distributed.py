"""Several processes, as torchrun starts them: which one this is, and what they do together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Result = TypeVar("Result")


def rank() -> int:
    """Number of this process; 0 where there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, through NCCL on GPUs and Gloo elsewhere; gives the name of this one's device.

    Without torchrun there is one process, on `device`. Processes that have been joined before stay so.

    Raises:
        ValueError: there are fewer GPUs than processes on this machine.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() or size() > 1:
        yield device
        return
    gpu = device.startswith("cuda")
    if gpu:
        number = int(os.environ.get("LOCAL_RANK", "0"))
        if number >= torch.cuda.device_count():
            raise ValueError(f"train: --nproc-per-node must be at most the number of GPUs, {torch.cuda.device_count()}")
        device = f"cuda:{number}"
        torch.cuda.set_device(number)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def process_mean(x: Tensor) -> Tensor:
    """The mean of `x` over all processes.

    Its gradient is that of `x` here: gradients are averaged over the processes, so a loss of means over a batch comes out as
    if one process had seen the whole batch.
    """
    if size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / size() + (x - x.detach())


def gathered(x: Tensor) -> Tensor:  # [n, ...] -> [size · n, ...]
    """The rows of all processes, row i of process r being number i * size + r; without gradients."""
    if size() == 1:
        return x.detach()
    every = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size())]
    dist.all_gather(every, x.detach().contiguous())
    return torch.stack(every, dim=1).flatten(0, 1)


def from_first(make: Callable[[], Result]) -> Result:
    """What `make` returns in the first process, in all of them; a ValueError there is raised in all of them."""
    if size() == 1:
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except ValueError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    result: Result = box[0]
    return result


class Loss(nn.Module):
    """A loss as a module, which is what DistributedDataParallel takes.

    Args:
        loss: uses `parameters`, and other parameters that do not learn.
        parameters: those that learn.
    """

    def __init__(self, loss: Callable[..., Any], parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.loss, self.learning = loss, nn.ParameterList(parameters)

    def forward(self, *args: Any) -> Any:
        """What the loss returns."""
        return self.loss(*args)


def averaging(loss: Callable[..., Any], parameters: list[nn.Parameter]) -> Callable[..., Any]:
    """`loss`, whose backward pass averages the gradients of `parameters` over all processes."""
    if size() == 1:
        return loss
    return nn.parallel.DistributedDataParallel(Loss(loss, parameters))


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """`model`, whose batch norms take the statistics of the batches of all processes.

    Raises:
        ValueError: there are batch norms and no GPUs, for which torch has no such batch norm.
    """
    if size() == 1 or not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    if device.type != "cuda":
        raise ValueError("train: batch norms need the whole batch: train this backbone in one process, or on GPUs")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
