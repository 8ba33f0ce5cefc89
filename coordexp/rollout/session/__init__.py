"""A backend from start to close: built, asked a first question, kept at the right policy version."""
