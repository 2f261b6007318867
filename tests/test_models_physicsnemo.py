"""PhysicsNeMo's ShardTensors: divided calls and their gradients against the same calls of plain tensors.

All but the binding of arguments runs where nvidia-physicsnemo is installed, which is no part of the tests' environment:
it brings half a gigabyte.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gnaforge.models.physicsnemo import attend

runs_where_installed = pytest.mark.skipif(
    find_spec("physicsnemo") is None, reason="nvidia-physicsnemo is not installed"
)


@pytest.fixture(scope="module")
def results(kernel_set: None, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    path = tmp_path_factory.mktemp("physicsnemo") / "results.json"
    script = Path(__file__).with_name("physicsnemo_ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(path.read_text())


@runs_where_installed
def test_divided_calls_are_those_of_the_whole(results: list[Any]) -> None:
    """On 2, 3 and 4 processes, of one to three axes; even windows, strides and dilation among them."""
    calls = [found for found in results if "error" in found]
    assert len(calls) == 28 and max(found["error"] for found in calls) < 1e-5
    assert any(w % 2 == 0 for found in calls for w in found["window"])
    for name in ("stride", "dilation"):
        assert sum(max(found[name]) > 1 for found in calls) > 5


@runs_where_installed
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("plain key", "TypeError: na1d: query, key and value must be ShardTensors, all of them"),
        ("two dims", "ValueError: na2d takes"),
        ("channels", "ValueError: mesh dimension 'a' divides channels"),
        ("partial", "ValueError: mesh dimension 'a' has the placement Partial(sum)"),
        ("apart", "ValueError: query, key and value must be placed alike"),
        ("unknown", "TypeError: na1d of ShardTensors: got an unexpected keyword argument 'rpb'"),
        ("window", "ValueError: kernel_size"),
        ("option", "TypeError: 'grid' is no option"),
    ],
)
def test_what_is_refused(results: list[Any], case: str, message: str) -> None:
    refusals = next(found for found in results if "plain key" in found)
    assert refusals[case].startswith(message), refusals[case]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1, 2, 3, 5), {"kernel_size": 7}, "multiple values for argument 'kernel_size'"),
        ((1, 2, 3), {"key": 2}, "multiple values for argument 'key'"),
        (tuple(range(11)), {}, "too many positional arguments"),
        ((1, 2), {"kernel_size": 7}, "missing a required argument: 'value'"),
        ((1, 2, 3, 5), {"rpb": None}, "got an unexpected keyword argument 'rpb'"),
    ],
)
def test_arguments_are_bound_as_pythons(args: tuple[int, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"na1d of ShardTensors: {message}"):
        attend("na1d", args, kwargs, {})
