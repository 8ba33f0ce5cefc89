"""What is measured of the model in training beside its steps."""
