"""Annotation files of other tools, read into pixels and rows."""
