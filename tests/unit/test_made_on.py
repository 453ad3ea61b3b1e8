"""In what environments differ: what they both know, and nothing else."""

import pytest
import torch

from compressor import environment
from compressor.comparison.made_on import differences, made_on
from compressor.environment import describe_environment
from compressor.performance import Performance

KNOWN = {
    "robust-compress": "0.1.0",
    "commit": "0123456789abcdef" * 2 + "01234567",
    "torch": "2.15.0",
    "processor": "AMD EPYC, 9R14",
    "device": "cpu",
    "number_format": "bfloat16",
    "is_compiled": False,
}
EARLIER = "cpu, bfloat16, robust-compress 0.1.0, torch 2.15.0"
"""As written before a commit was recorded."""


def test_a_line_of_all_that_is_known():
    said = f"{EARLIER}, commit 0123456789ab, processor AMD EPYC 9R14, not compiled"
    assert made_on(KNOWN) == said
    assert made_on(KNOWN | {"commit": KNOWN["commit"] + "+changes"}) == said.replace(
        "ab,", "ab+changes,"
    )


def test_of_earlier_environments_nothing_is_invented():
    lacks = {key: KNOWN[key] for key in ("device", "number_format", "robust-compress", "torch")}
    assert made_on(lacks) == EARLIER
    assert differences([EARLIER, made_on(KNOWN)]) == []
    assert differences([made_on({"torch": "2.15.0"}), made_on(KNOWN)]) == []
    both = [EARLIER, made_on(KNOWN), made_on(KNOWN | {"commit": "fedc" * 10})]
    assert differences(both) == ["commit 0123456789ab or commit fedcfedcfedc"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "NVIDIA H200"}, "NVIDIA H200 or cpu"),
        ({"number_format": "float32"}, "bfloat16 or float32"),
        ({"torch": "0.1"}, "torch 0.1 or torch 2.15.0"),
        ({"robust-compress": "0.2"}, "robust-compress 0.1.0 or robust-compress 0.2"),
        ({"processor": "Intel Xeon"}, "processor AMD EPYC 9R14 or processor Intel Xeon"),
        ({"is_compiled": True}, "compiled or not compiled"),
        (
            {"commit": KNOWN["commit"] + "+changes"},
            "commit 0123456789ab or commit 0123456789ab+changes",
        ),
    ],
)
def test_every_fact_that_differs_is_named(change, said):
    assert differences([made_on(KNOWN), made_on(KNOWN | change)]) == [said]


def test_an_environment_has_a_commit_only_where_it_is_known(monkeypatch):
    performance = Performance(device=torch.device("cpu"))
    for commit, expected in (("abc", {"commit": "abc"}), (None, {})):
        monkeypatch.setattr(environment, "commit_of_checkout", lambda commit=commit: commit)
        found = describe_environment(performance)
        assert {key: found[key] for key in found if key == "commit"} == expected
