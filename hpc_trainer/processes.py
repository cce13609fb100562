"""The process group: started by torchrun, by Slurm's srun, or alone; gloo on CPU, NCCL on GPU."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from fl_core.contracts.errors import EnvironmentFault


@dataclass(frozen=True)
class Processes:
    """rank in 0..world-1; ``device`` is this process's own."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """For optimisers that spread their work; None in a group of one."""
        return dist.group.WORLD if self.world > 1 else None

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce in place; the tensor itself in a group of one."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process."""
        found: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def under_launcher() -> bool:
    """Started by torchrun (WORLD_SIZE) or as one of several Slurm tasks."""
    return "WORLD_SIZE" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def on_this_node() -> tuple[int, int]:
    """(rank, size) among the processes of this node, as torchrun and Slurm tell."""
    for rank, size in (("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")):
        if rank in os.environ and os.environ.get(size, "").isdigit():
            return int(os.environ[rank]), int(os.environ[size])
    return 0, 1


def join() -> Processes:
    """Join the group named by torchrun's or Slurm's environment. Raises EnvironmentFault naming the missing variable, and for
    more processes than GPUs on this node.

    After an elastic restart gloo needs a fresh key prefix: the old attempt's keys would be met again.
    """
    if not under_launcher():
        return Processes(0, 1, _device(0))
    rank, world, local = _launched()
    if torch.cuda.is_available():
        _refuse_a_shared_gpu(on_this_node()[1], torch.cuda.device_count())
        torch.cuda.set_device(local % torch.cuda.device_count())
    timeout = datetime.timedelta(seconds=300)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's own store already listens on the port in most launches; only a bare srun needs rank 0 to open it.
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(host, port, world, serves, timeout=timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"attempt{attempt}", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    return Processes(rank, world, _device(local))


def _refuse_a_shared_gpu(processes: int, gpus: int) -> None:
    """NCCL's communicators take a device once."""
    if processes > gpus:
        raise EnvironmentFault(
            f"{processes} processes on this node have {gpus} GPU{'s' * (gpus != 1)} between them, and NCCL needs one for each",
            remedy="start as many processes as there are GPUs, or train on the processor with CUDA_VISIBLE_DEVICES=''",
        )


def _launched() -> tuple[int, int, int]:
    names = (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if "WORLD_SIZE" in os.environ
        else ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
    )
    for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise EnvironmentFault(
                f"environment variable {name} is missing",
                remedy="start with torchrun, or export it in the Slurm script",
            )
    rank, world, local = (int(os.environ[n]) for n in names)
    return rank, world, local


def _device(local: int) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", local % torch.cuda.device_count())
    return torch.device("cpu")
