"""Pure decisions about a run: what a step does follows from its number. No torch."""
