"""The ranks of a run: their networks, wrapped for DDP, and what they add up together."""

import copy
import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from pipeline.gan import step as gan_step
from pipeline.gan.networks.build import build
from pipeline.gan.step import Networks
from pipeline.train.spec import RunSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """This rank's place among the others."""

    rank: int
    size: int
    device: torch.device
    wrap: Callable[[nn.Module], nn.Module]
    """Moves a network to the device and, with more than one rank, wraps it in DDP."""


def networks(spec: RunSpec, world: World) -> Networks:
    """Networks with their initial weights, wrapped, and their optimisers."""
    G, D = build(spec.network, spec.shape, spec.train.seed)
    G_ema = copy.deepcopy(G).to(world.device).eval().requires_grad_(False)
    D_judge = gan_step.compile_networks(G, D, spec.step)
    G_trained, D_trained = world.wrap(G), world.wrap(D)
    G_opt, D_opt = gan_step.optimisers(G, D, spec.step)
    nets = Networks(
        G=G,
        D=D,
        G_ema=G_ema,
        G_trained=G_trained,
        D_trained=D_trained,
        D_judge=D_judge,
        G_opt=G_opt,
        D_opt=D_opt,
    )
    if world.size > 1:
        _warm_up(nets, spec, world.device)
    return nets


def _warm_up(nets: Networks, spec: RunSpec, device: torch.device) -> None:
    """One discarded backward pass a network. DDP rebuilds its buckets after its first one, which changes the order of
    its sums at three ranks or more: after this a resumed run adds in the same order as an undisturbed one.
    """
    before = [copy.deepcopy(network.state_dict()) for network in (nets.G, nets.D)]
    label = torch.zeros(2, dtype=torch.int64, device=device)
    images = nets.G_trained(torch.zeros(2, spec.network.z_dim, device=device), label)
    images.sum().backward()
    nets.D_trained(images.detach(), label).sum().backward()
    for network, state in zip((nets.G, nets.D), before, strict=True):
        network.zero_grad(set_to_none=True)
        network.load_state_dict(state)


def has_batch_statistics(*networks: nn.Module) -> bool:
    """Whether results depend on how a batch is divided among ranks."""
    return any(isinstance(module, nn.BatchNorm2d) for network in networks for module in network.modules())


def average_buffers(network: nn.Module, world: World) -> None:
    """Running statistics of batch norm are local to a rank; their mean over ranks is what is averaged and saved."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    buffers = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
    if world.size == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= world.size
    for buffer, mean in zip(buffers, torch.split(flat, [buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.view_as(buffer))


def sum_over_ranks(sums: Mapping[str, torch.Tensor], world: World) -> dict[str, float]:
    """Scalars of this rank → their sums over all ranks."""
    flat = torch.stack([value.to(world.device, torch.float64) for value in sums.values()])
    if world.size > 1:
        dist.all_reduce(flat)
    return dict(zip(sums, flat.tolist(), strict=True))
