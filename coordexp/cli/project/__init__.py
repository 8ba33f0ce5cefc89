"""Commands of a project away from the repository."""
