"""Let the model write its own answers."""
