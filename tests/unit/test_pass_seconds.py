"""What a pass costs: all networks in turn, and kept while the machine and the methods stay."""

import pytest
import torch

from compressor.comparison import pass_seconds
from compressor.comparison.folder import ComparisonFolder
from compressor.comparison.measuring import ImageCounts
from compressor.comparison.pass_seconds import PassSeconds, find_pass_seconds
from compressor.comparison.passes import Passes
from compressor.comparison.plan import make_plan
from compressor.comparison.request import read_request
from compressor.comparison.result import PassSecondsRow, write_result
from compressor.comparison.summary import summarise
from compressor.performance import Performance

BASE = """
name = "base"
[data]
source = "digits"
validation_size = 100
[student]
architecture = "tiny"
[[teachers]]
role = "clean"
source = "tiny:a.pt"
[[teachers]]
role = "robust"
source = "tiny:b.pt"
"""
PASSES = Passes(
    student_forwards=1.0, student_backwards=1.0, teacher_forwards=0.0, teacher_backwards=0.0
)
SPEED = PassSeconds(
    student_forward=0.1, student_backward=0.2, teacher_forward={"tiny:a.pt": 1.0, "tiny:b.pt": 3.0}
)
HERE = {"processor": "one", "device": "cpu", "num_threads": 2, "commit": "a"}


@pytest.fixture
def plan_of(tmp_path):
    (tmp_path / "base.toml").write_text(BASE)
    return lambda names: make_plan(read_request(tmp_path / "base.toml", names=names))


def rows_of(plan):
    return {method.label: SPEED.of(method.recipe, num_images=50) for method in plan.methods}


def test_a_method_pays_for_its_own_teachers(plan_of):
    rows = rows_of(plan_of("trades,ard,bmtard"))
    assert [row.teacher_forward for row in rows.values()] == [0.0, 3.0, 2.0]
    assert {row.num_images for row in rows.values()} == {50}


def test_what_an_earlier_call_measured_is_kept_for_the_same_methods_and_machine(plan_of, tmp_path):
    folder, plan = ComparisonFolder(tmp_path), plan_of("trades,ard")

    def found(names, environment):
        return find_pass_seconds(folder, plan_of(names).methods, environment)

    assert found("trades", HERE) is None
    result = summarise(
        plan,
        [],
        passes={method.label: PASSES for method in plan.methods},
        pass_seconds=rows_of(plan),
        images=ImageCounts(clean=10, white_box=0, cascade=0),
        environment=HERE,
    )
    write_result(result, folder.result)
    assert found("trades,ard", HERE) == rows_of(plan)
    assert found("ard", HERE | {"commit": "b"}) == {"ard": rows_of(plan)["ard"]}
    assert found("trades,ard,bmtard", HERE) is None
    for change in ({"processor": "another"}, {"num_threads": 1}, {"device": "NVIDIA H200"}):
        assert found("trades,ard", HERE | change) is None
    old = [row.model_copy(update={"pass_seconds": None}) for row in result.methods]
    write_result(result.model_copy(update={"methods": tuple(old)}), folder.result)
    assert found("trades,ard", HERE) is None


def test_networks_are_timed_in_turn_and_the_first_round_warms_up(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(pass_seconds.time, "perf_counter", lambda: now[0])

    def network(name, seconds):
        def ask():
            asked.append(name)
            # A first round that is too fast must not count; later the machine slows down.
            now[0] += seconds * (0.1 if len(asked) <= 2 else len(asked))

        return ask

    performance = Performance(device=torch.device("cpu"))
    found = pass_seconds._seconds_per_image([network("a", 64), network("b", 128)], performance)
    assert asked == ["a", "b"] * 4
    assert found == pytest.approx([3.0, 8.0])  # of the third and the fourth call


def test_negative_seconds_are_refused():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        PassSecondsRow(
            student_forward=-0.1, student_backward=0.2, teacher_forward=0.0, num_images=1
        )
