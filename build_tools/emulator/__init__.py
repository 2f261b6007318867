"""Runs compiled GPU kernels without a GPU: a functional emulator of PTX that looks for synchronisation errors."""

from __future__ import annotations

from .module import Counters, EmulationError, Module, Options, TensorMap, load
from .standin import StandIn, stand_in

__all__ = ["Counters", "EmulationError", "Module", "Options", "StandIn", "TensorMap", "load", "stand_in"]
