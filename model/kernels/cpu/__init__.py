"""The native CPU step: int8 and bf16 kernels in C++, called once per step."""
