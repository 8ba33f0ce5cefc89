"""The `coordexp` command: one module per subcommand."""
