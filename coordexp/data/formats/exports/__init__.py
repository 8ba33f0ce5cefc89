"""Annotation files for other tools, written from pixels and rows."""
