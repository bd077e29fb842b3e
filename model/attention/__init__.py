"""Causal attention: over a paged cache (serving) and over whole sequences (training)."""
