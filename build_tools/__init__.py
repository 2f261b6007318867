"""Toolchain discovery, the compile cache and builds."""
