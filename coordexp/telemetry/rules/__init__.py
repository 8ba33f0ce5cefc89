"""Healthy ranges and red flags as data, and what judges records by them. No torch."""
