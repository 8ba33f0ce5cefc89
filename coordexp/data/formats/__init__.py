"""Annotation files of other tools, in and out."""
