"""Kernel families and the hardware that they run on."""
