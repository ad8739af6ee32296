"""What is known of a metric by its name alone."""

import pytest

from varitok.codecs.modalities.registry import lower_is_better


@pytest.mark.parametrize(("name", "lower"), [("psnr", False), ("rfid", True), ("usage", False), ("bits", True)])
def test_the_better_values_of_a_metric_are_the_lower_or_the_higher(name: str, lower: bool) -> None:
    assert lower_is_better(name) is lower
