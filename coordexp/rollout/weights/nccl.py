"""NCCL between two processes that share nothing but a store."""

from __future__ import annotations

import torch
from torch.distributed import Store
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary


def communicator(store: Store, rank: int, world_size: int, device: torch.device) -> PyNcclCommunicator:
    """The communicator of `world_size` ranks; rank 0 gives its id to the others by way of `store`."""
    if rank == 0:
        store.set("nccl", bytes(NCCLLibrary().ncclGetUniqueId().internal))
    return PyNcclCommunicator.from_unique_id_bytes(store.get("nccl"), rank, world_size, device)
