"""What facts of a machine mean for a run: pure functions, facts -> findings."""
