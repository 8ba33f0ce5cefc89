"""The trained weights on their way to an engine, versioned and checked."""
