"""Supervised rows -> loss, without logits [B, T, V]: plain, fused, liger."""
