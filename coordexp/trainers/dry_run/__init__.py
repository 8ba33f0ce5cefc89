"""One step of each kind that a run will ever run, on its longest samples, and nothing kept: `custom.dry_run`."""
