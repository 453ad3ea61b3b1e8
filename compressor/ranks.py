"""Ranks: the processes of one run, each with its part of every batch.

How many there are is a matter of speed and not of meaning: whatever a step decides by is a number
of the whole batch and the same on every rank, so all ranks hold the same weights and the same state
without telling one another. Only the first one writes and speaks.

With `torchrun`, or `--nproc`, each process learns its place from the environment.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401 (see below)
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from compressor.errors import LostProcessError

# Default arguments of `torch.distributed.nn` hold the process group that there is when it is first
# imported, as `torch.optim` does. That group is never freed, and a thread of it that ends its last
# work while the interpreter ends aborts the process. So it is imported while there is none.

_Value = TypeVar("_Value")
_PATIENCE = timedelta(minutes=30)
"""For a rank that does not come: the first one may be writing to a slow disk."""
UNLIKE_WORK = timedelta(days=7)
"""Where ranks have parts that take hours more or less than another's."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of its run."""

    rank: int = 0
    num_ranks: int = 1
    control: Any = None
    """The process group for what the hosts tell one another; None for that of the devices."""

    def __deepcopy__(self, _: object) -> "Ranks":
        """Layers that know their ranks are copied with their network; a process group cannot be."""
        return self

    def of_this_host(self) -> "Ranks":
        """This process among those of its host; alone if it has met no others."""
        if self.num_ranks == 1:
            return ALONE
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        return Ranks(rank=rank, num_ranks=num_ranks_here_of_environment())

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def part(self, num_items: int) -> slice:
        """Which of so many items in a row are this rank's; the parts differ by at most one."""
        first = num_items * self.rank // self.num_ranks
        return slice(first, num_items * (self.rank + 1) // self.num_ranks)

    def total(self, scalar: Tensor) -> Tensor:
        """Sum of a scalar over the ranks, the same on all of them.

        Backwards each rank keeps the gradient of its own summand, so that the gradients of the
        parameters are parts too, which `sum_gradients` adds up.
        """
        if self.num_ranks == 1:
            return scalar
        total: Tensor = _Total.apply(scalar)
        return total

    def sum_in_place(self, values: Tensor) -> Tensor:
        """Each number becomes its sum over the ranks; for what needs no gradient."""
        if self.num_ranks > 1:
            dist.all_reduce(values)
        return values

    def gather_tensors(self, values_V: Tensor) -> Tensor:
        """The same vector of each rank, in their order, [R, V]; for what needs no gradient."""
        if self.num_ranks == 1:
            return values_V[None]
        found = values_V.new_empty(self.num_ranks * len(values_V))
        dist.all_gather_into_tensor(found, values_V)
        return found.view(self.num_ranks, -1)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients, in place, in one transfer.

        After the backward pass and not within it, as DistributedDataParallel would: an adversarial
        step goes back some ten times to the images and once to the parameters, so there is little
        to hide a transfer behind; and a method may leave a layer without a gradient in one phase.
        """
        if self.num_ranks > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            if not gradients:
                return
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            sizes = [gradient.numel() for gradient in gradients]
            for gradient, part in zip(gradients, torch.split(flat, sizes), strict=True):
                gradient.copy_(part.view_as(gradient))

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers, which thereby agree; the hosts wait."""
        if self.num_ranks == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control)
        return int(found)

    def gather(self, value: _Value) -> list[_Value]:
        """What each rank has to say, in their order; the hosts wait."""
        if self.num_ranks == 1:
            return [value]
        found: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(found, value, group=self.control)
        return found

    def wait(self) -> None:
        """Until all ranks have come so far."""
        self.largest(0)


ALONE = Ranks()


def num_ranks_of_environment() -> int:
    """How many processes there are, before they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_ranks_here_of_environment() -> int:
    """How many of them are on this host, before they have met."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def launch_of_environment() -> str | None:
    """What names the launch of all these processes, and no other; None: nobody launched them.

    `torchrun` starts them again in the same launch. Its own name for it may be that of an earlier
    one, and is "none" by default; on one host the launcher itself tells them apart.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None or os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return name
    launcher = os.getppid()
    try:
        with open(f"/proc/{launcher}/stat", encoding="utf-8") as file:
            began = file.read().rpartition(")")[2].split()[_PLACE_OF_BEGINNING]
    except (OSError, IndexError):
        began = "?"
    return f"{name}, process {launcher} since {began}"


_PLACE_OF_BEGINNING = 19
"""In /proc/PID/stat, from behind the name: when the process began, in ticks since the boot."""


@contextmanager
def joined_ranks(
    device: torch.device, *, purpose: str, patience: timedelta = _PATIENCE
) -> Iterator[Ranks]:
    """The ranks that the environment speaks of, from `torchrun`; one where it speaks of none.

    Args:
        device: of this rank.
        purpose: a name that no other meeting of these processes has.
        patience: how long the hosts wait for one another.

    Raises:
        LostProcessError: if another rank ends while this one waits for it, or does not come.
    """
    if num_ranks_of_environment() == 1:
        yield ALONE
        return
    is_cuda = device.type == "cuda"
    store, rank, num_ranks = next(rendezvous("env://", timeout=_PATIENCE))
    meeting = purpose
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # It is kept over restarts, with the addresses of those who are gone.
        meeting += f", attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=PrefixStore(meeting, store),
        rank=rank,
        world_size=num_ranks,
        timeout=_PATIENCE if is_cuda else patience,
    )
    control = dist.new_group(backend="gloo", timeout=patience) if is_cuda else None
    try:
        yield Ranks(rank=rank, num_ranks=num_ranks, control=control)
    except RuntimeError as error:
        if "timed out" in str(error).lower():
            raise LostProcessError(
                "another process of this run did not come in time; what was saved is kept. See "
                "whether one of them hangs, and run the same command again"
            ) from None
        if _LOST.search(str(error)):
            raise LostProcessError(
                "another process of this run has ended, and says why where it ended; what was "
                "saved is kept"
            ) from None
        raise
    finally:
        dist.destroy_process_group()


_LOST = re.compile("connection (closed|reset|refused)|closed by peer", re.IGNORECASE)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scalar: Tensor) -> Tensor:  # noqa: ANN401 (torch's signature)
        del ctx
        total = scalar.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:  # noqa: ANN401
        del ctx
        return slope
