"""A run file and its flags -> one checked configuration."""
