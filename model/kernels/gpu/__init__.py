"""The forward pass on a GPU: the decoder's weights, and our Triton kernels between its products."""
