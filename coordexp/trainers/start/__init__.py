"""What a run settles and says before its first step."""
