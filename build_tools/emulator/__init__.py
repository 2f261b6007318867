"""Runs compiled GPU kernels without a GPU: a functional emulator of PTX that looks for synchronisation errors."""

from __future__ import annotations

from .module import Counters, EmulationError, Module, Options, TensorMap, load
from .mutation import Mutant, mutants
from .standin import StandIn, stand_in

__all__ = [
    "Counters",
    "EmulationError",
    "Module",
    "Mutant",
    "Options",
    "StandIn",
    "TensorMap",
    "load",
    "mutants",
    "stand_in",
]
