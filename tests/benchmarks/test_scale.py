"""docs/scale.md shows what benchmarks/scale.py calculates."""

import pytest
from benchmarks.scale import PAGE, ranks_for, rewritten

from whet.plan.parallel import plan_strategy, strategies


@pytest.mark.slow
def test_the_page_is_up_to_date():
    page = PAGE.read_text()
    assert rewritten(page) == page


def test_the_shapes_have_the_parameters_of_their_names():
    assert ranks_for("8B", False, 8).pieces.num_parameters == 8_030_261_248


def test_what_does_not_fit_a_card_fits_more_of_them():
    fits = {
        num: {plan.name for s in strategies(ranks) if (plan := plan_strategy(ranks, s)).fits}
        for num in (8, 64)
        for ranks in [ranks_for("8B", True, num)]
    }
    assert "ddp" not in fits[8] and "fsdp" in fits[64]
