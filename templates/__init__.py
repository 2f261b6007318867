"""Kernel templates, and the C++ headers that kernels include."""
