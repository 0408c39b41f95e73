"""Sampling: logits to probabilities, the decode loop, speculation, and the pipeline over a bundle."""
