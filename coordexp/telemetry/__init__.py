"""Watches a run, and never steers it: nothing here changes a loss, a weight or a random state."""
