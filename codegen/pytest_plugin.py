"""Fixtures for tests of kernels: each test runs once per schedule of the emulator.

In ``conftest.py``::

    pytest_plugins = ["gnaforge.pytest_plugin"]

In a test::

    def test_my_kernel(emulated_kernel):
        kernel = emulated_kernel("gna_forward-sm90-r1-bf16-d64-q128-kv128")
        out, lse = kernel(q, k, v, kernel_size=100)

pytest options: ``--emulator-seeds N`` runs N random schedules instead of one, ``--emulator-trace`` shows the last
events of each warp where a kernel fails. A marker chooses schedules for one test or class::

    @pytest.mark.emulator(timing=["lazy"], order=["random"], seeds=5)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .runtime.config import KernelConfig
    from .verification.emulated_kernel import EmulatedKernel
    from .verification.schedules import Schedule

EmulatedKernels = Callable[["KernelConfig | str | Path"], "EmulatedKernel"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    group = parser.getgroup("gnaforge", "kernels in the emulator")
    group.addoption("--emulator-seeds", type=int, default=1, metavar="N", help="random schedules per test (1)")
    group.addoption("--emulator-trace", action="store_true", help="errors show the last events of each warp")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker."""
    config.addinivalue_line(
        "markers", "emulator(timing, order, seeds): schedules of emulated kernels, every timing with every order"
    )


def _schedules(metafunc: pytest.Metafunc) -> list[Schedule]:
    from .verification.schedules import Schedule, schedules

    seeds = int(metafunc.config.getoption("--emulator-seeds"))
    marker = metafunc.definition.get_closest_marker("emulator")
    if marker is None:
        random = [Schedule("random", "random", seed) for seed in range(seeds)]
        return [Schedule("eager", "round-robin"), Schedule("lazy", "depth-first"), *random]
    chosen = {"timing": ["random"], "order": ["random"], "seeds": seeds, **marker.kwargs}
    return schedules(chosen["timing"], chosen["order"], chosen["seeds"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per schedule."""
    if "emulator_schedule" in metafunc.fixturenames:
        found = _schedules(metafunc)
        metafunc.parametrize(
            "emulator_schedule", found, ids=[f"{s.timing}-{s.order}-{s.seed}" for s in found], scope="function"
        )


@pytest.fixture(scope="session")
def _emulated_kernels() -> Iterator[dict[str, EmulatedKernel]]:
    """Processes that hold kernels, one per library and key, shared by the tests of a session."""
    held: dict[str, EmulatedKernel] = {}
    yield held
    for kernel in held.values():
        kernel.close()


@pytest.fixture
def emulated_kernel(
    emulator_schedule: Schedule, _emulated_kernels: dict[str, Any], request: pytest.FixtureRequest
) -> EmulatedKernels:
    """``emulated_kernel(config)`` compiles a kernel for the emulator, if the cache has none, and returns a callable.

    It runs under this test's schedule: see `EmulatedKernel`. Takes a config, a key, or the path of an emulated library
    that holds one kernel. Skips the test where there is no CUDA compiler.
    """
    from .errors import BuildError
    from .verification.emulated_kernel import EmulatedKernel

    trace = bool(request.config.getoption("--emulator-trace"))

    def make(config: KernelConfig | str | Path) -> EmulatedKernel:
        name = str(config)
        if name not in _emulated_kernels:
            try:
                _emulated_kernels[name] = EmulatedKernel(config)
            except BuildError as error:
                if "no CUDA compiler" in str(error):
                    pytest.skip(str(error))
                raise
        kernel: EmulatedKernel = _emulated_kernels[name]
        kernel.schedule, kernel.trace = emulator_schedule, trace
        return kernel

    return make
