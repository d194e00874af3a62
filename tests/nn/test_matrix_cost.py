"""What layers ask XLA to compute: what the same functions ask for that are written by hand."""

from __future__ import annotations

import pytest

from benchmarks.layers import CASES, SMALL, Case, figures

SAME = [of for of in CASES if of.same_program]


@pytest.mark.parametrize("of", SAME, ids=[of.name for of in SAME])
def test_a_layer_costs_what_it_costs_by_hand(of: Case) -> None:
    for which, (ours, by_hand) in figures(of, SMALL).items():
        assert ours == by_hand, which
