"""Runs kernels under the emulator's schedules and compares them with exact attention: `gnaforge verify`."""
