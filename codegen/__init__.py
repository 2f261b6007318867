"""Generates, compiles and runs attention kernels with Generalized Neighborhood Attention masking."""
