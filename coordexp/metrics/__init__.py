"""What is logged: the catalogue of keys, their payload, the store that sums them, and the files.

`catalog` and `payload` need no torch, so this package imports nothing on its own.
"""
