"""Who writes the answers: transformers, vLLM in this process, a server."""
