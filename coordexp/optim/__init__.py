"""Optimizers: which parameter is trained how, and Muon and AdamW as one optimizer."""
