"""A vLLM engine in a process of its own, and what travels to it."""
