"""The stable name of the channel schedule; the code is `coordexp.control.schedule`."""

from coordexp.control.schedule import channel_at, rollout_seed_base

__all__ = ["channel_at", "rollout_seed_base"]
