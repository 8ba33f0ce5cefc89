"""Samples of an evaluation that a rank gets a second time.

Ranks make the same number of forwards with batches of the same size. Where the last round has too few samples,
accelerate fills it with those from the start of the set, which come last in the batches of the last ranks. They are
computed, but no number may count them twice.
"""

from __future__ import annotations

from accelerate import Accelerator


def num_counted(accelerator: Accelerator, num_entries: int) -> int:
    """Entries of the data loader's batch that runs, from the first one on, that no rank has had before.

    num_entries: that the batch was made of, on every rank as many.
    """
    state = accelerator.gradient_state
    if accelerator.num_processes == 1 or not accelerator.even_batches or not state.end_of_dataloader:
        return num_entries
    if state.remainder <= 0:  # the last round is full
        return num_entries
    return counted_of_last_round(state.remainder, accelerator.process_index, num_entries)


def counted_of_last_round(remainder: int, rank: int, num_entries: int) -> int:
    """Entries of a rank's batch that are among the `remainder` ones of the last round; ranks take them in order."""
    return min(max(remainder - rank * num_entries, 0), num_entries)
