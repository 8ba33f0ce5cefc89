"""How the next token is chosen: sampling, penalties, the end of repeats."""
