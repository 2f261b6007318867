"""Kernel-spec presets, usable by name."""
