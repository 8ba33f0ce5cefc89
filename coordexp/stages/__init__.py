"""Training runs one after another: gates between them, verdicts, best checkpoints that are proven."""
