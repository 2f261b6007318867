"""Mutants of sm100's headers where e4m3 differs from 16 bits are noticed. ``pytest -m survey -s``"""

from __future__ import annotations

import pytest
from fp8_mutants import APART, MUTANTS, missing, try_mutants
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.errors import BuildError
from gnaforge.families.sm100_forward import FAMILY


@pytest.fixture
def _compiler() -> None:
    try:
        find_nvcc(FAMILY.target.nvcc)
    except BuildError as error:
        pytest.skip(str(error))


def test_mutants_can_be_made() -> None:
    """Their text stands once in the headers of today."""
    assert missing() == []


@pytest.mark.usefixtures("_compiler", "session_cache")
def test_a_mutant_is_noticed() -> None:
    """Of the descale of a head in a tile of several."""
    assert try_mutants([mutant for mutant in MUTANTS if mutant.old == "first + member" and mutant.by == APART]) == []


@pytest.mark.survey
@pytest.mark.usefixtures("_compiler", "session_cache")
def test_mutants_are_noticed() -> None:
    """All but one in twenty."""
    left = try_mutants(MUTANTS)
    assert len(left) <= len(MUTANTS) / 20, left
