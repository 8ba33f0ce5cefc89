"""Detections on files and folders of pictures: what `coordexp detect` does."""
