"""What runs in the processes of the test of Prismatic under DistributedDataParallel."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modernizer.components import Prismatic, SelfAttention, prismatic_loss
from modernizer.components.prismatic import after_backward


def model(noise: float) -> nn.Module:
    torch.manual_seed(0)
    parts = [Prismatic(SelfAttention(16, 4), 4, ["alibi", "rope"], noise=noise) for _ in range(2)]
    return nn.Sequential(*parts).double()


def rows() -> Tensor:
    return torch.randn(4, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def plain_steps(one: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(one.parameters(), 0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        one(x).square().mean().backward()
        optimizer.step()


def routed_steps(one: nn.Module, x: Tensor, steps: int = 3) -> None:
    """With noise, which differs between processes, the balance loss and gradient phases."""
    optimizer = torch.optim.AdamW(one.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        (one(x).square().mean() + 0.03 * prismatic_loss(one)).backward()
        after_backward(one, gradient_phases=True, report=True)
        optimizer.step()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)
    found = {}
    for name, noise, steps in (("plain", 0.0, plain_steps), ("routed", 1.0, routed_steps)):
        one = DistributedDataParallel(model(noise))
        torch.manual_seed(rank)
        steps(one, rows().chunk(2)[rank])
        found[name] = one.module.state_dict()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
