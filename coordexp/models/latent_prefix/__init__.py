"""A prompt's text as a few learned vectors in its place: encoder, adapter, where they go, how they are kept."""
