"""What the training run of an evaluated checkpoint says of it."""
