"""Triton kernels, and the torch operators that launch them."""
