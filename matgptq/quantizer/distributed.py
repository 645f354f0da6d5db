"""This process among those that quantise together: rank 0 of 1 where ``torch.distributed`` is not initialised."""

from __future__ import annotations

import torch.distributed as dist


def rank() -> int:
    """This process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all of them."""
    if dist.is_initialized():
        dist.barrier()
