"""Samples whose prompt is latent vectors: where the text of the prompt stands, and batches with both forms."""
