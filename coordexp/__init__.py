"""CoordExp: train vision-language models to write detections with coordinate tokens."""

__version__ = "0.1.0"
