"""What teaches a latent prefix: terms over rows of an answer, and their weighted sum."""
