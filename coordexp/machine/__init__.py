"""`coordexp doctor --machine`: what of a run will fail on this machine, before it is started."""
