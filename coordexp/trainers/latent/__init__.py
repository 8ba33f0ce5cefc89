"""Trainer variant `latent_prefix`: its trainer, the forwards of a step, what is trained and kept."""
