"""NCCL between two processes that share nothing but an id."""

from __future__ import annotations

import torch
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.device_communicators.pynccl_wrapper import NCCL_UNIQUE_ID_BYTES, NCCLLibrary

ID_BYTES = NCCL_UNIQUE_ID_BYTES


def unique_id() -> bytes:
    """A new id; the process that makes it is rank 0."""
    return bytes(NCCLLibrary().ncclGetUniqueId().internal)


def communicator(nccl_id: bytes, rank: int, world_size: int, device: torch.device) -> PyNcclCommunicator:
    """The communicator of `world_size` ranks that know the id."""
    return PyNcclCommunicator.from_unique_id_bytes(nccl_id, rank, world_size, device)
