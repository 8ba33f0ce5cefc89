"""Models the package can make or change on disk: the tiny Qwen3-VL and the coordinate-vocabulary expansion.

Importing this package imports no torch; its modules do.
"""
