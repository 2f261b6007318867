"""Wheels of kernels: building and checking them."""
