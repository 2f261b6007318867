"""Every mutant of the headers of bands is noticed by the checks that test_bands.py makes. ``pytest -m survey -s``"""

from __future__ import annotations

import pytest
from band_mutants import CHOSEN, EQUAL, by_rule, try_mutants
from gnaforge.build.identity import include_dir


def test_some_mutants() -> None:
    """One in nine of those made by hand, other ones than the mutants by rule."""
    assert try_mutants(CHOSEN[::9]) == []


def test_mutants_can_be_made() -> None:
    """Their text stands once in the headers of today, and so do the reasons for those that change nothing."""
    texts = {mutant.header: (include_dir() / "gnaforge" / mutant.header).read_text() for mutant in CHOSEN}
    assert [mutant for mutant in CHOSEN if texts[mutant.header].count(mutant.old) != 1] == []
    assert set(EQUAL) <= {str(mutant) for mutant in by_rule()}


@pytest.mark.survey
def test_all_mutants() -> None:
    """300 and more, in about 15 minutes."""
    assert try_mutants([mutant for mutant in [*CHOSEN, *by_rule()] if str(mutant) not in EQUAL]) == []
