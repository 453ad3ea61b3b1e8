"""Whether a lossy file is worth its loss."""

import pytest

from compressor.cost import Latency
from exporters.worth import Worth

FLOAT32 = Latency(low_ms=0.9, median_ms=1.0, high_ms=1.4)


def worth(*, size_fraction=0.3, low_ms=0.5):
    latency = Latency(low_ms=low_ms, median_ms=low_ms + 0.2, high_ms=low_ms + 0.5)
    return Worth(
        variant="int8", size_fraction=size_fraction, latency=latency, float32_latency=FLOAT32
    )


@pytest.mark.parametrize(("size_fraction", "is_small"), [(0.26, True), (0.56, True), (0.7, False)])
def test_a_file_must_save_bytes(size_fraction, is_small):
    shown = worth(size_fraction=size_fraction)
    assert shown.is_small == is_small
    assert ("int8 is not worth it here: 70 %" in shown.sentence()) == (not is_small)


@pytest.mark.parametrize(("low_ms", "is_slower"), [(0.5, False), (1.01, False), (1.41, True)])
def test_it_is_slower_only_if_the_ranges_do_not_overlap(low_ms, is_slower):
    shown = worth(low_ms=low_ms)
    assert shown.is_slower == is_slower
    assert ("not worth it for speed on this CPU" in shown.sentence()) == is_slower
