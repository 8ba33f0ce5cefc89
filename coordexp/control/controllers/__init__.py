"""Controllers: from the numbers of a log window to the knobs of the next one. Pure, no torch, the same on all ranks."""
