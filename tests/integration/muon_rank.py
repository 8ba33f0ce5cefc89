"""One rank of test_muon_ranks.py, started by torchrun: OUTPUT_FILE. A small model under DDP, ZeRO 1 and ZeRO 2.

Its losses are sums of weights times whole numbers; what two ranks average these to is exact in float32, so that the
ranks can be compared bit for bit with one process.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import deepspeed
import support.gloo_deepspeed  # noqa: F401
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from coordexp.optim.composed import MuonAdamW
from coordexp.optim.groups import GroupRule, Part, parameter_groups
from coordexp.optim.zero import zero_layouts

SHAPES = {"a": (5, 3), "b": (4, 9), "c": (6, 6), "qkv": (9, 4), "d": (2, 3), "table": (7, 3), "bias": (5,)}
STEPS, STOP = 5, 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((getattr(self, name) * gradient).sum() for name, gradient in gradients.items())


def gradients_of(step: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {n: torch.randint(-8, 9, shape, generator=generator).float() for n, shape in SHAPES.items()}


def optimizer_of(net: Net) -> MuonAdamW:
    rules = [GroupRule("[abcd]", "", "muon", 2.0), GroupRule("qkv", "", "muon", 1.0, 0.5), GroupRule("*", "")]
    groups = parameter_groups(list(net.named_parameters()), rules, [Part("", ("",), 0.02)], weight_decay=0.1)
    muon = {"momentum": 0.9, "nesterov": True, "ns_steps": 5, "adjust_lr_fn": "match_rms_adamw"}
    adamw = {"betas": (0.9, 0.95), "eps": 1e-8}
    return MuonAdamW(groups, muon=muon, adamw=adamw, pieces={net.qkv: 3})


def weights_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def alone(world_size: int) -> dict[str, torch.Tensor]:
    net = Net()
    optimizer = optimizer_of(net)
    for step in range(STEPS):
        ranks = [gradients_of(step, rank) for rank in range(world_size)]
        loss = net({name: sum(rank[name] for rank in ranks) / world_size for name in SHAPES})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weights_of(net)


def under_ddp(rank: int) -> dict[str, torch.Tensor]:
    net = Net()
    model, optimizer = DistributedDataParallel(net), optimizer_of(net)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(gradients_of(step, rank)).backward()
        optimizer.step()
    return weights_of(net)


def engine_of(stage: int) -> deepspeed.DeepSpeedEngine:
    net = Net()
    optimizer = optimizer_of(net)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 1 when left out
        "zero_optimization": {"stage": stage},
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    optimizer.use_layouts(zero_layouts(engine.optimizer, optimizer.pieces))
    return engine


def train(engine: deepspeed.DeepSpeedEngine, steps: range, rank: int) -> None:
    for step in steps:
        engine.backward(engine(gradients_of(step, rank)))
        engine.step()


def under_zero(stage: int, rank: int) -> dict[str, torch.Tensor]:
    engine = engine_of(stage)
    train(engine, range(STEPS), rank)
    return weights_of(engine.module)


def resumed_under_zero(rank: int, folder: str) -> dict[str, torch.Tensor]:
    engine = engine_of(2)
    train(engine, range(STOP), rank)
    engine.save_checkpoint(folder)
    again = engine_of(2)
    again.load_checkpoint(folder)
    train(again, range(STOP, STEPS), rank)
    return weights_of(again.module)


def cut_matrices() -> int:
    """Matrices that lie on both ranks."""
    layouts = engine_of(2).optimizer.optimizer._layouts.values()
    return sum(layout.is_cut(matrix) for layout in layouts for matrix in layout.matrices)


def main() -> None:
    deepspeed.init_distributed("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    folder = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    found = {
        "alone": alone(world_size),
        "ddp": under_ddp(rank),
        "zero 1": under_zero(1, rank),
        "zero 2": under_zero(2, rank),
        "zero 2 resumed": resumed_under_zero(rank, str(folder[0])),
        "cut": cut_matrices(),
    }
    if rank == 0:
        torch.save(found, Path(sys.argv[1]))
    dist.barrier()


if __name__ == "__main__":
    main()
