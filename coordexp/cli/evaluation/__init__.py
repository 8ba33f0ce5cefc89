"""Commands that answer, score, evaluate and report."""
