"""Which samples share a sequence, how they lie in it, and proof that they do not mix."""
