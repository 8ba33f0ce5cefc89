"""The lines that the console and run.log show of a run, from its payloads, at four levels. Pure functions."""
