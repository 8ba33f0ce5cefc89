"""Callbacks of ours in place of those of ms-swift."""
