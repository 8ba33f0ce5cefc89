"""One optimizer step as a value."""
