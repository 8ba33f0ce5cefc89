"""Predictions on disk: what was answered, how sure the model was."""
