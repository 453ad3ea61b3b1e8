"""What counts as robust: every point met on the way, judged in float32, on every planned image.

The checks are plain functions, so that `test_planted_bugs.py` can run them on an evaluation that
was broken on purpose. N images, M points, K classes.
"""

import runpy
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from compressor.attacks.search import by_logits
from compressor.attacks.stages import AUTOATTACK
from compressor.data import evaluation_batches
from compressor.reports.report import TestFacts
from compressor.threat import ThreatModel
from compressor.validity.active_test import penultimate_features
from compressor.validity.claim import Claim
from compressor.validity.validity import check_validity
from compressor.verification import rows as report_rows
from compressor.verification.cascade import Subject
from compressor.verification.journal import Journal
from compressor.verification.samples import to_table
from compressor.verification.verification import VerificationPlan, attack_chunks
from tests.contract.test_conformance_oracles import (
    both_modes,
    evaluate,
    linear_case,
    split_of,
    stages_of,
    standing,
)

GOLDEN = Path(__file__).parents[1] / "golden"
MAKER = SimpleNamespace(**runpy.run_path(str(GOLDEN / "make_autoattack_flags.py")))


class Waves:
    """Three classes; the first loses only in thin layers, which an attack may pass through.

    Cross-entropy is highest elsewhere, where the two others are nearly as high as the first. It
    remembers the points that it was asked about, and whether it was wrong there.
    """

    def __init__(self):
        generator = torch.Generator().manual_seed(8)
        self._direction_D = torch.randn(48, generator=generator).sign()
        self.points, self.wrong = [], []

    def __call__(self, x_NCHW):
        phase_N = 12 * ((x_NCHW - 0.5).flatten(1) @ self._direction_D)
        rivals = [phase_N.sin(), 0.97 * (phase_N + 1).sin()]
        logits_NK = torch.stack([0.98 + 0 * phase_N, *rivals], dim=1)
        self.points.append(x_NCHW.detach().clone())
        self.wrong.append(logits_NK.detach().argmax(dim=1) != 0)
        return logits_NK

    def was_wrong_near(self, x_NCHW, threat):
        """Whether any point within the threat model was wrong, for images that lie far apart."""
        points, wrong = torch.cat(self.points), torch.cat(self.wrong)
        distance_MN = torch.cdist(points.flatten(1), x_NCHW.flatten(1))
        origin_M = distance_MN.argmin(dim=1)
        counts_M = wrong & threat.contains(points, x_NCHW[origin_M])
        return torch.isin(torch.arange(len(x_NCHW)), origin_M[counts_M])


def check_no_success_is_silent(name, mode="fast"):
    """Every image that was answered wrongly somewhere on the way is fooled in the end."""
    model, threat = Waves(), ThreatModel(epsilon_pixels=0.04)
    generator = torch.Generator().manual_seed(9)
    x_NCHW = 0.2 + 0.6 * torch.rand(40, 3, 4, 4, generator=generator)
    x_NCHW = x_NCHW[model(x_NCHW)[:, 1] < 0]
    model.points, model.wrong = [], []
    (stage,) = stages_of([name], threat=threat, mode=mode, num_queries=30)
    draws = stage.draws(x_NCHW, keys_N=torch.arange(len(x_NCHW)), seed=0)
    y_N = torch.zeros(len(x_NCHW), dtype=torch.int64)
    found = stage.search.search(model, x_NCHW, y_N, draws=draws, judge=by_logits)
    met_N = model.was_wrong_near(x_NCHW, threat)
    assert met_N.any()
    returned_N = model(found.x_adv_NCHW).argmax(dim=1) != 0
    lost_N = met_N & ~(found.is_fooled_N & returned_N)
    assert not lost_N.any(), f"{int(lost_N.sum())} of {int(met_N.sum())} successes were lost"


def check_float32_decides():
    """A search on a form of the model that is fooled too soon goes on until the answer is."""
    case = linear_case("linf")
    exact = case.subject

    def timid(x_NCHW):
        logits_NK = exact.float32(x_NCHW)
        top_NK = F.one_hot(logits_NK.argmax(dim=1), logits_NK.shape[1])
        return logits_NK - 0.05 * top_NK

    subject = Subject(answer=exact.answer, float32=exact.float32, search_dtype=timid)
    # Before APGD-T it searches in fewer bits; on its own it would not.
    stages = stages_of(("apgd_dlr", "apgd_t"), threat=case.threat)[:1]
    assert stages[0].runs_on == "search_dtype"
    stands_N = standing(evaluate(subject, case.split, stages))
    missed_N = stands_N & (case.lead_over_most_N < 0.9)  # nearer to 1 the search is off the way
    assert not missed_N.any(), f"{int(missed_N.sum())} of {len(missed_N)} images flatter"


def check_not_a_number_is_no_answer():
    """Neither without an attack nor within reach of one."""

    def undefined(x_NCHW):
        return x_NCHW.flatten(1)[:, :10] * torch.nan

    def undefined_beside(x_NCHW):
        logits_NK = torch.eye(10)[0] + 0 * x_NCHW.flatten(1)[:, :10]
        is_beside_N = (x_NCHW * 255 % 1).flatten(1).amax(dim=1) > 0.01
        return torch.where(is_beside_N[:, None] & (logits_NK.detach() < 1), torch.nan, logits_NK)

    levels_NCHW = torch.full((4, 3, 8, 8), 128, dtype=torch.uint8)
    split = split_of(levels_NCHW, torch.zeros(4, dtype=torch.int64))
    stages = stages_of(("apgd_ce",), threat=ThreatModel(epsilon_pixels=8.5 / 255))
    for model, broken_by in ((undefined, "clean"), (undefined_beside, "apgd_ce")):
        subject = Subject(answer=model, float32=model, search_dtype=model)
        samples = evaluate(subject, split, stages).samples
        assert {s.broken_by for s in samples} == {broken_by}, "not-a-number was a right answer"


def check_worst_case_is_per_image():
    """An image stands iff no attack fooled it; these try all, and the first is what broke it."""
    case = linear_case("linf")
    stages = stages_of(("fgsm", "pgd_sat", "cw_inf"), threat=case.threat)[::-1]
    for sample in evaluate(case.subject, case.split, stages).samples:
        assert list(sample.fooled_by) == ["clean", *(stage.name for stage in stages)]
        broken_by = next((name for name, fooled in sample.fooled_by.items() if fooled), None)
        assert sample.broken_by == broken_by, f"worst of {sample.fooled_by}"


def check_believed(make_network=MAKER.load_network):
    """No validity check raises an alarm about an evaluation of a network of known robustness."""
    network, split, threat = make_network(), MAKER.load_split(), MAKER.THREATS["linf"]
    stages = stages_of(("apgd_ce", "apgd_t"), threat=threat)
    subject = Subject(answer=network, float32=network, search_dtype=network)
    stands_N = standing(evaluate(subject, split, stages))
    (batch,) = evaluation_batches(split, batch_size=split.num_images)
    claim = Claim(
        model=network,
        x_NCHW=batch.x_NCHW,
        y_N=batch.y_N,
        keys_N=batch.keys_N,
        threat=stages[1].search.threat,
        attack=stages[1].search,
        num_steps=stages[1].search.attack.num_steps,
        broken_by_white_box_N=~stands_N,
        features=penultimate_features(network, batch.x_NCHW),
    )
    alarms = [row.name for row in check_validity(claim) if row.status == "alarm"]
    assert not alarms, f"alarms: {', '.join(alarms)}"


def check_report(make_report, *, num_chunks=2):
    """A report of a real evaluation agrees with itself, or is refused with a ValidationError."""
    case = linear_case("linf")
    y_N = torch.where(torch.arange(50) % 10 == 0, (case.y_N + 1) % 10, case.y_N)  # 5 of 50 wrong
    stages = stages_of(("apgd_ce", "apgd_t"), threat=case.threat)
    plan = VerificationPlan(stages=stages, batch_size=25)
    split = split_of(case.levels_NCHW, y_N)
    chunks = attack_chunks(case.subject, split, plan, journal=Journal.in_memory())
    *_, found = islice(chunks, num_chunks)
    names = [stage.name for stage in stages]
    report = make_report(
        status="verified" if found.is_complete else "incomplete",
        data=TestFacts(
            source="test",
            class_names=split.class_names,
            content_sha256="e" * 64,
            index_sha256="f" * 64,
            num_available=found.num_planned,
            num_planned=found.num_planned,
        ),
        clean=report_rows.count_standing(found.samples, after=()),
        attacks=report_rows.attack_rows(found, stages),
        worst_case=report_rows.count_standing(found.samples, after=names),
        eight_bit=report_rows.eight_bit_facts(found.samples),
        curve=(),
        samples=to_table(found.samples),
    )
    num_counted, num_attacked = report.worst_case.num_total, 25 * num_chunks
    assert num_counted == num_attacked, f"{num_attacked} attacked, {num_counted} counted"
    return report


@both_modes
@pytest.mark.parametrize("name", ["apgd_ce", "apgd_dlr", "apgd_t", "fab_t", "square"])
def test_point_that_fools_on_the_way_is_not_lost(name, mode):
    check_no_success_is_silent(name, mode)


def test_float32_answer_decides():
    check_float32_decides()


def test_not_a_number_is_no_right_answer():
    check_not_a_number_is_no_answer()


def test_worst_case_is_per_image():
    check_worst_case_is_per_image()


def test_validity_checks_believe_a_healthy_evaluation():
    check_believed()


def test_report_of_a_whole_evaluation_is_verified(make_report):
    assert check_report(make_report).status == "verified"


def test_report_of_a_part_is_incomplete_and_counts_what_is_done(make_report):
    assert check_report(make_report, num_chunks=1).status == "incomplete"


def test_standard_cascade_is_what_it_is_called():
    assert AUTOATTACK == ("apgd_ce", "apgd_t", "fab_t", "square")
