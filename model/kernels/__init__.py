"""Kernels of our own, each beside its twin in plain torch: what a fused step is made of."""
