"""From finished runs to a result: what is said of those that are not in it."""

import pytest

from compressor.comparison.measuring import ImageCounts
from compressor.comparison.passes import Passes
from compressor.comparison.plan import make_plan
from compressor.comparison.request import Wishes, read_request, with_wishes
from compressor.comparison.result import PassSecondsRow
from compressor.comparison.summary import summarise

BASE = """
name = "base"
[data]
source = "digits"
validation_size = 100
[student]
architecture = "tiny"
"""
PASSES = Passes(
    student_forwards=1.0, student_backwards=1.0, teacher_forwards=0.0, teacher_backwards=0.0
)

SECONDS = PassSecondsRow(
    student_forward=0.1, student_backward=0.2, teacher_forward=0.0, num_images=100
)


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "base.toml").write_text(BASE)
    request = read_request(tmp_path / "base.toml", names="trades,pgd_at")
    return make_plan(with_wishes(request, Wishes(seeds=2)))


def notes_of(plan, *measured):
    result = summarise(
        plan,
        [],
        passes={method.label: PASSES for method in plan.methods},
        pass_seconds={method.label: SECONDS for method in plan.methods},
        images=ImageCounts(clean=10, white_box=10, cascade=0),
        environment={},
        also_measured=measured,
    )
    return [note for note in result.notes if "not shown" in note]


def test_what_else_was_measured_in_the_folder_is_named(plan):
    shown = [run.name for run in plan.runs]
    assert notes_of(plan) == notes_of(plan, *shown) == []
    (note,) = notes_of(plan, *shown, "other-seed-seed0", "trades-seed2", "trades-seed3")
    assert note == (
        "Measured in this folder and not shown: other-seed seed 0, trades seed 2 and 3 (runs: 3, "
        "methods of which none is shown: 1). Holm's correction does not count them."
    )
