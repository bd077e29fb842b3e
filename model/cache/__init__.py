"""Paged memory for keys and values: the tensors, who holds which block, and which blocks can be shared."""
