"""What the model's own answers are worth: judged, measured, shown."""
