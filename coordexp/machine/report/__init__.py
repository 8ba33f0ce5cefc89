"""What `coordexp doctor --machine` prints: facts gathered, judged, in one report."""
