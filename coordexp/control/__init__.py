"""Pure decisions about a run: what a step does follows from its number. No torch."""

from coordexp.control.schedule import channel_share

__all__ = ["channel_share"]
