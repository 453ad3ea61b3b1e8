"""A report is about the images, the model and the attacks that it names; it overwrites no other."""

import csv
import json
import shutil
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import onnx  # noqa: TID253 (makes files)
import pytest
import torch
from PIL import Image

from compressor.attacks.apgd import APGD
from compressor.attacks.build import selection_attack
from compressor.attacks.search import SearchResult
from compressor.attacks.stages import PAPER_ATTACKS
from compressor.attacks.targeted import Targeted
from compressor.attacks.transfer import Transfer
from compressor.data import evaluation_batches, load_test_split
from compressor.errors import (
    ArtefactMismatchError,
    BudgetSpentError,
    CheckpointError,
    DataError,
    InvalidEvaluationError,
    RecipeError,
    RunError,
    UsageError,
)
from compressor.losses import dlr
from compressor.onnx_model import load_onnx_model
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe
from compressor.recipe_file import parse_recipe
from compressor.reports.report import ValidityRow, read_report
from compressor.run_directory import RunDirectory
from compressor.threat import ThreatModel
from compressor.verification.cascade import Subject
from compressor.verification.claimed_threat import THREAT_KEY
from compressor.verification.doubt import check_verification
from compressor.verification.journal import Journal
from compressor.verification.request import VerificationRequest, prepare
from compressor.verification.samples import Sample
from compressor.verification.verification import Verification, attack_chunks
from compressor.verification_workflow import conclude, verify
from compressor.weights import sha256_of_file
from exporters.int8.to_int8 import calibrate, write_int8
from exporters.request import ExportRequest
from exporters.workflow import export_run
from tests.onnx_files import (
    appended,
    constant,
    in_steps,
    other_off_the_grey_levels,
    without_twin,
)

EPSILON = 48 / 255
SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
SOME = ("fgsm", "pgd_sat", "apgd_ce")


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_on_digits):
    """Knows digits, and is so fragile at its epsilon that the whole cascade is quick."""
    out = tmp_path_factory.mktemp("runs") / "verified"
    run = train_on_digits(out, threat={"epsilon_pixels": "48/255"})
    export_run(ExportRequest(run=run, settings=SETTINGS))
    return run


@pytest.fixture
def copy(run, tmp_path):
    """A run of one's own."""
    return RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))


@pytest.fixture
def far(run, tmp_path):
    """The exported file, far from its run."""
    return Path(shutil.copy(run.onnx("fp32"), tmp_path / "far.onnx"))


@pytest.fixture
def quick(monkeypatch):
    """Neither latencies, nor other radii, nor figures, where they are not the point."""
    monkeypatch.setattr("compressor.verification_workflow.cost_rows", lambda *_: ())
    monkeypatch.setattr("compressor.verification_workflow.accuracy_curve", lambda *_, **__: ())
    monkeypatch.setattr(
        "compressor.verification_workflow.write_html", lambda path, *_, **__: path.touch()
    )


def request_for(target, **changes):
    values = {"target": str(target), "settings": SETTINGS, "num_images": 40, "attacks": SOME}
    return VerificationRequest(**(values | changes))


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# What the report says


def test_report_is_about_what_it_names(run, tmp_path):
    """The one test without shortcuts: everything that is written, of the whole cascade."""
    told = []
    request = request_for(run.path, num_images=None, attacks=("papers", "autoattack"))
    report, files = verify(replace(request, folder=tmp_path), tell=told.append)
    assert read_report(files.json) == report
    assert names_in(tmp_path) == ["report.html", "report.json", "report.md", "samples.csv"]
    assert report.status == "verified"
    assert report.status_reason == "all 497 images went through all attacks, and no check objects"
    assert (report.protocol, report.norm, report.seed) == ("AutoAttack-style", "linf", 0)
    assert report.epsilon_pixels == pytest.approx(48 / 255)
    assert report.target.sha256 == sha256_of_file(run.model)
    assert report.data.num_planned == report.clean.num_total == 497
    assert [row.name for row in report.cost] == ["student tiny", "model.fp32.onnx"]
    assert report.training.selection.attack in files.markdown.read_text()
    assert report.caveat in files.html.read_text()
    assert len(told) == 3
    clean, worst = report.clean, report.worst_case
    assert worst.num_correct < 50 < 400 < clean.num_correct
    assert sum(row.num_broken for row in report.attacks) == clean.num_correct - worst.num_correct
    assert min(row.accuracy.num_correct for row in report.attacks[:4]) >= worst.num_correct
    at_epsilon = report.curve[4]
    assert at_epsilon.epsilon_pixels == report.epsilon_pixels
    stands = [broken_by is None for broken_by in report.samples.broken_by[:200]]
    assert at_epsilon.accuracy.num_correct == sum(stands)


def test_table_of_samples_is_that_of_the_report(run, tmp_path, quick):
    report, files = verify(request_for(run.path, folder=tmp_path))
    with files.samples.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == list(report.samples.index)
    assert [row["broken_by"] or None for row in rows] == list(report.samples.broken_by)
    for attack in report.attacks:
        cells = [row[attack.name] for row in rows]
        assert sum(cell != "" for cell in cells) == attack.num_tried
        if attack.accuracy is not None:
            assert cells.count("stands") == attack.accuracy.num_correct
    passes = sum(int(row["num_forwards"]) for row in rows)
    assert passes == len(rows) + sum(attack.num_forwards for attack in report.attacks)
    broken = [row for row in rows if row["broken_by"] not in ("", "clean")]
    assert report.eight_bit.num_found == len(broken)
    fools = sum(row["fools_in_8_bits"] == "yes" for row in broken)
    assert report.eight_bit.num_still_fooling == fools
    distances = [float(row["distance_pixels"]) for row in broken]
    assert 0 < min(distances) <= max(distances) <= report.epsilon_pixels + 1e-6
    assert all(row["distance_pixels"] == "" for row in rows if row not in broken)


def test_report_names_the_attack_of_selection(run, tmp_path, quick):
    report, files = verify(request_for(run.path, folder=tmp_path))
    assert report.training.selection.attack == "PGD, 1 steps of 0.36"
    assert report.training.selection.attack in files.markdown.read_text()


def test_another_norm_is_attacked_in_that_norm(run, tmp_path, quick):
    report, files = verify(
        request_for(run.path, folder=tmp_path, norm="l2", epsilon_pixels=0.5, attacks=("apgd_ce",))
    )
    assert (report.norm, report.epsilon_pixels) == ("l2", 0.5)
    assert files.json.name == "report-40-l2-0.5-apgd_ce.json"
    lines = [line.split(",") for line in files.samples.read_text().splitlines()[1:]]
    distances = [float(line[5]) for line in lines if line[5]]
    assert 48 / 255 < max(distances) <= 0.5 * (1 + 1e-5)


def test_the_network_is_in_eval_mode_meanwhile_and_stays_as_it_was(run):
    prepared = prepare(request_for(run.path))
    network = prepared.model.network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x_NCHW = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with prepared.subject() as subject:
        assert not network.training
        subject.answer(x_NCHW)
        subject.float32(x_NCHW)
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


# Status


ALARM = ValidityRow(
    name="planted_alarm",
    status="alarm",
    found="9 of 10",
    threshold="alarm above 1 %",
    p_value=0.001,
    advice="attack again",
)


def test_an_alarm_makes_it_invalid(run, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(
        "compressor.verification_workflow.check_verification", lambda *_, **__: (ALARM,)
    )
    report, files = verify(request_for(run.path, folder=tmp_path))
    assert report.status == "invalid"
    assert report.status_reason == "validity checks raised an alarm: planted_alarm"
    assert read_report(files.json).validity == (ALARM,)


def test_a_budget_that_ends_leaves_it_incomplete_and_an_alarm_counts_all_the_same(
    run, tmp_path, quick, monkeypatch
):
    monkeypatch.setattr("compressor.verification.verification.time", Clock(step_seconds=0.01))
    request = request_for(run.path, folder=tmp_path, epsilon_pixels=24 / 255)
    request = replace(request, batch_size=10, max_seconds=4)
    report, _ = verify(request)
    assert report.status == "incomplete"
    done = report.clean.num_total
    assert 0 < done < 40
    assert report.data.num_planned == 40
    assert report.status_reason == (
        f"the budget ended after {done} of 40 images, a random part of them"
    )
    monkeypatch.setattr(
        "compressor.verification_workflow.check_verification", lambda *_, **__: (ALARM,)
    )
    monkeypatch.setattr("compressor.verification.verification.time", Clock(step_seconds=0.01))
    assert verify(replace(request, seed=1))[0].status == "invalid"


def test_a_black_box_attack_alone_verifies_nothing(run, tmp_path, quick):
    request = request_for(run.path, folder=tmp_path, attacks=("square",), num_images=5)
    report, _ = verify(replace(request, epsilon_pixels=0.5))
    assert (report.status, report.worst_case) == ("unverified", None)
    assert report.status_reason == "no white-box attack was run"
    assert report.clean.num_total == 5


def test_checks_that_need_the_strongest_attack_say_so(run, tmp_path, quick):
    report, _ = verify(request_for(run.path, folder=tmp_path))
    reasons = [row.advice for row in report.validity if row.status == "not_run"]
    assert any("do not include apgd_t" in reason for reason in reasons)
    assert {row.status for row in report.validity} == {"passed", "not_run"}


# Budget and journal


class Clock:
    """Every look at it is so much later."""

    def __init__(self, *, step_seconds):
        self.now, self.step_seconds = 0.0, step_seconds

    def monotonic(self):
        self.now += self.step_seconds
        return self.now

    def perf_counter(self):
        return self.now


def without_clock(report):
    table = report.model_dump(mode="json")
    for row in (table, *table["attacks"]):
        row.pop("duration_seconds")
    return table


def test_a_budget_too_small_for_a_chunk_says_what_to_do_and_keeps_what_is_done(
    run, tmp_path, quick, monkeypatch
):
    """Calls that each end before a chunk is done get to the same end."""
    request = request_for(run.path, folder=tmp_path / "a", epsilon_pixels=24 / 255, batch_size=20)
    whole, files = verify(request)
    expected = files.samples.read_bytes()

    folder = tmp_path / "b"
    hurried = replace(request, folder=folder, max_seconds=2.6)
    num_failures = 0
    monkeypatch.setattr("compressor.verification.verification.time", Clock(step_seconds=0.02))
    with pytest.raises(BudgetSpentError, match=r"before the first 20 images were done.*--batch-si"):
        verify(hurried)
    assert [name[:14] for name in names_in(folder)] == [".verification-"]
    report = None
    while report is None or report.status == "incomplete":
        num_failures += 1
        assert num_failures < 20
        monkeypatch.setattr("compressor.verification.verification.time", Clock(step_seconds=0.02))
        try:
            report, files = verify(hurried)
        except BudgetSpentError:
            continue
        if report.status == "incomplete":
            assert any(name.startswith(".verification-") for name in names_in(folder))
    assert num_failures > 1
    assert files.samples.read_bytes() == expected
    assert without_clock(report) == without_clock(whole)
    assert not [name for name in names_in(folder) if name.startswith(".")]


def test_the_journal_stays_until_the_report_is_written(run, tmp_path, quick, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    request = request_for(run.path, folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("compressor.verification_workflow.write_report", fail)
        with pytest.raises(KeyboardInterrupt):
            verify(request)
    (journal,) = tmp_path.glob(".verification-*")
    assert journal.read_text().count("\n") == 1 + 1 + len(SOME)
    verify(request)
    assert not journal.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"attacks": ("fgsm", "apgd_ce")},
        {"epsilon_pixels": 0.1},
        {"norm": "l2", "epsilon_pixels": 0.5},
        {"mode": "compat"},
        {"num_images": 39},
        {"batch_size": 13},
        {"settings": SETTINGS.model_copy(update={"training_dtype": "bfloat16"})},
    ],
    ids=str,
)
def test_another_verification_has_another_journal(run, tmp_path, change):
    """So that it goes on with nothing that was found for another question."""
    request = request_for(run.path, folder=tmp_path)
    for one in (request, replace(request, max_seconds=5), replace(request, **change)):
        prepare(one).journal()
    assert len(names_in(tmp_path)) == 2


def test_ranks_with_a_gpu_each_have_one_journal(run, tmp_path):
    """Or what the second had finished would not be found when one goes on alone."""
    prepared = prepare(request_for(run.path, folder=tmp_path))
    for number in range(2):
        device = torch.device("cuda", number)
        replace(prepared, performance=replace(prepared.performance, device=device)).journal()
    assert len(names_in(tmp_path)) == 1


def test_another_model_has_another_journal(run, far, copy, tmp_path):
    weights = shutil.copy(run.model, tmp_path / "weights.safetensors")
    out = tmp_path / "out"
    for target, source in (
        (run.path, None),
        (weights, None),
        (run.onnx("fp32"), run.path),
        (far, None),
    ):
        source = None if source is None else str(source)
        prepare(request_for(target, source=source, data_source="digits", folder=out)).journal()
    assert len(names_in(out)) == 4


# Names of files

LABELS = {
    "": {},
    "497": {"num_images": 497},
    "linf-16_255": {"epsilon_pixels": 16 / 255},
    "linf-0.05": {"epsilon_pixels": 0.05},
    "l2-0.5": {"norm": "l2", "epsilon_pixels": 0.5},
    "compat": {"mode": "compat"},
    "papers": {"attacks": ("papers",)},
    "apgd_ce-apgd_t-fab_t-square": {"attacks": ("autoattack",)},
    "fgsm-square": {"attacks": ("square", "fgsm")},
    "seed3": {"seed": 3},
    "20-linf-16_255-compat-papers-seed3": {
        "num_images": 20,
        "epsilon_pixels": 16 / 255,
        "mode": "compat",
        "attacks": ("papers",),
        "seed": 3,
    },
}


@pytest.mark.parametrize(("label", "changes"), LABELS.items())
@pytest.mark.parametrize("kind", ["run", "weights", "file"])
def test_every_verification_has_files_of_its_own(run, tmp_path, label, changes, kind):
    """`report.json` is only the one that a release is decided on."""
    values = {"num_images": None, "attacks": ("papers", "autoattack"), **changes}
    if kind == "run":
        target, source = run.path, None
    elif kind == "file":
        target, source = run.onnx("fp32"), str(run.path)
    else:
        target, source = shutil.copy(run.model, tmp_path / "weights.safetensors"), None
        if not changes:
            values["epsilon_pixels"] = 8 / 255  # the radius where no recipe says another
    prepared = prepare(request_for(target, source=source, data_source="digits", **values))
    assert prepared.files.label == label
    stem = f"report-{label}" if label else "report"
    assert prepared.files.json.name == f"{stem}.json"


def test_the_threat_of_the_recipe_is_the_one_without_a_name(run):
    default = {"num_images": None, "attacks": ("papers", "autoattack")}
    same = {"norm": "linf", "epsilon_pixels": 48 / 255, "batch_size": 7, "max_seconds": 9}
    assert prepare(request_for(run.path, **default, **same)).files.label == ""
    other = {"epsilon_pixels": 8 / 255}
    assert prepare(request_for(run.path, **default, **other)).files.label == "linf-8_255"


def test_no_verification_overwrites_another(copy, quick):
    """Files of one are the same to the byte after all others."""
    written = {}
    for changes in (
        {},
        {"num_images": 20},
        {"seed": 1},
        {"epsilon_pixels": 16 / 255},
        {"attacks": ("fgsm",)},
        {"mode": "compat", "attacks": ("apgd_ce",)},
    ):
        _, files = verify(request_for(copy.path, **changes))
        assert not {path.name for path in paths_of(files)} & written.keys()
        written |= {path.name: path.read_bytes() for path in paths_of(files)}
    for name, content in written.items():
        assert (copy.path / name).read_bytes() == content
    assert not copy.report().json.exists()


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kept(before, folder):
    """Whether all of these files are there, the same to the byte."""
    after = contents_of(folder)
    return all(after.get(name) == content for name, content in before.items())


def test_reports_of_another_model_are_moved_aside(run, tmp_path, quick):
    """In a folder that they share, the name belongs to what was verified last."""
    folder = tmp_path / "out"
    of_run, first = verify(request_for(run.path, folder=folder))
    before = [path.read_bytes() for path in paths_of(first)]
    of_file, second = verify(request_for(run.onnx("fp32"), source=str(run.path), folder=folder))
    assert second == first
    assert read_report(first.json) == of_file
    words = (of_run.target.sha256[:8], of_run.data.content_sha256[:8])
    assert [path.read_bytes() for path in paths_of(first.labelled(*words))] == before
    assert read_report(verify(request_for(run.path, folder=folder))[1].json).target.kind == "run"
    words = (of_file.target.sha256[:8], of_file.data.content_sha256[:8])
    assert read_report(first.labelled(*words).json) == of_file


def digits_folder(folder, *, num_of_each, num_copies=1):
    """Digits as an image folder, some of each class, each as often as wanted."""
    split = load_test_split(
        DataRecipe(source="digits", validation_size=100), settings=SETTINGS, device="cpu"
    )
    (batch,) = evaluation_batches(split, batch_size=split.num_images)
    for part in ("train", "test"):
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
            places = (batch.y_N == label).nonzero()[: num_of_each(label), 0].tolist()
            for place, copy_number in product(places, range(num_copies)):
                levels = (batch.x_NCHW[place, 0] * 255).round().byte().numpy()
                file = folder / part / str(label) / f"{place}-{copy_number}.png"
                Image.fromarray(levels).save(file)
    return f"imagefolder:{folder}"


def test_reports_on_other_images_are_moved_aside(run, tmp_path, quick):
    """Or a gate would go on judging an easier set that happened to be verified first."""
    easy = digits_folder(tmp_path / "easy", num_of_each=lambda _: 4)
    on_easy, first = verify(request_for(run.path, folder=tmp_path / "out", data_source=easy))
    on_own, second = verify(request_for(run.path, folder=tmp_path / "out"))
    assert first == second
    assert read_report(second.json).data == on_own.data != on_easy.data


def test_copies_of_images_are_no_evidence(run, tmp_path, quick):
    copies = digits_folder(tmp_path / "copies", num_of_each=lambda _: 2, num_copies=2)
    request = request_for(run.path, folder=tmp_path / "out", data_source=copies)
    report, _ = verify(request)
    assert report.status == "invalid"
    (row,) = (row for row in report.validity if row.status == "alarm")
    assert (row.name, row.found) == ("repeated_images", "20 of 40 images are copies of others")


def test_a_part_of_the_images_has_the_classes_in_proportion(run, tmp_path, quick):
    """A balanced part of an unbalanced set would estimate another accuracy than that of the set."""
    source = digits_folder(tmp_path / "d", num_of_each=lambda label: 40 if label == 0 else 4)
    request = request_for(run.path, folder=tmp_path / "out", data_source=source, num_images=19)
    report, _ = verify(request)
    counts = [report.samples.label.count(label) for label in range(10)]
    assert counts == [10] + 9 * [1]
    assert (report.data.num_planned, report.data.num_available) == (19, 76)


def test_images_that_a_transferred_one_broke_are_no_claim_of_the_white_box(run, tmp_path, quick):
    """APGD-T does not try them, so that they stood against it would be a false alarm's reason."""
    request = request_for(run.path, folder=tmp_path / "out", num_images=None)
    prepared = prepare(replace(request, attacks=("apgd_t",)))
    network = prepared.model.network
    (apgd_t,) = prepared.stages
    transfer = replace(
        apgd_t,
        name="transfer",
        kind="transfer",
        search=Transfer(attack=APGD(threat=prepared.threat, objective=dlr), sources=[network]),
        runs_on="answer",
    )
    stages = (transfer, apgd_t)
    prepared = replace(prepared, stages=stages, plan=replace(prepared.plan, stages=stages))
    with prepared.subject() as subject:
        *_, found = attack_chunks(
            subject, prepared.split, prepared.plan, journal=Journal.in_memory()
        )
        rows = check_verification(prepared, subject, found)
    broken_by = [sample.broken_by for sample in found.samples]
    assert broken_by.count("transfer") > 200 > broken_by.count("apgd_t")
    assert not [row for row in rows if row.status == "alarm"]


def test_batches_of_one_do_not_hide_that_answers_depend_on_the_batch(run, tmp_path, quick):
    prepared = prepare(request_for(run.path, folder=tmp_path, num_images=12, batch_size=1))

    def dependent(model):
        return lambda x_NCHW: model(x_NCHW) + x_NCHW.mean()

    with prepared.subject() as subject:
        *_, found = attack_chunks(
            subject, prepared.split, prepared.plan, journal=Journal.in_memory()
        )
        broken = Subject(**{name: dependent(model) for name, model in vars(subject).items()})
        report, _ = conclude(prepared, broken, found)
    assert [row.name for row in report.validity if row.status == "alarm"] == ["batch_dependence"]


def test_nothing_is_claimed_where_transferred_images_broke_all(run, tmp_path):
    prepared = prepare(request_for(run.path, folder=tmp_path, attacks=("apgd_t",), num_images=9))
    transfer = replace(prepared.stages[0], name="transfer", kind="transfer")
    prepared = replace(prepared, stages=(transfer, *prepared.stages))
    samples = [
        Sample(index=n, label=0, broken_by="transfer", fooled_by={"transfer": True})
        for n in range(9)
    ]
    found = Verification(samples=samples, gallery=(), outcomes=(), num_planned=9)
    with prepared.subject() as subject:
        rows = {row.name: row for row in check_verification(prepared, subject, found)}
    assert rows["more_search"].advice == "transferred images broke all of them"
    assert rows["finite_outputs"].status == "passed"


def test_checks_and_curve_take_no_more_images_at_once_than_a_chunk(run, tmp_path, monkeypatch):
    """Or they would run out of memory where images are large, after hours of attacks."""
    request = request_for(run.path, folder=tmp_path, num_images=30, batch_size=8)
    prepared = prepare(replace(request, attacks=("apgd_t",), epsilon_pixels=8 / 255))
    monkeypatch.setattr("compressor.verification_workflow.cost_rows", lambda *_: ())
    largest = []

    def watched(model):
        def answer(x_NCHW):
            largest.append(len(x_NCHW))
            return model(x_NCHW)

        return answer

    with prepared.subject() as subject:
        *_, found = attack_chunks(
            subject, prepared.split, prepared.plan, journal=Journal.in_memory()
        )
        teacher = SimpleNamespace(role="robust", name="t", network=watched(prepared.model.network))
        prepared = replace(prepared, teachers=[teacher])
        conclude(prepared, Subject(**{k: watched(v) for k, v in vars(subject).items()}), found)
    assert max(largest) == 8


@pytest.mark.parametrize("text", ['{"a": 1' + 5000 * "0" + "}", 100_000 * "[", '{"schema": 1}'])
def test_a_report_that_cannot_be_read_is_moved_aside(run, tmp_path, quick, text):
    """It may be of an older version, of another model, or damaged."""
    files = prepare(request_for(run.path, folder=tmp_path)).files
    files.json.write_text(text)
    report, files = verify(request_for(run.path, folder=tmp_path))
    assert read_report(files.json) == report
    assert files.labelled("unreadable").json.read_text() == text


@pytest.mark.parametrize("has_twin", [True, False])
def test_a_file_without_its_source_does_not_replace_a_verified_report(
    run, far, tmp_path, quick, has_twin
):
    """It may be moved aside: what was not made on a source is another verification."""
    file = far if has_twin else without_twin(far, tmp_path / "opaque.onnx")
    folder = tmp_path / "reports"
    attacks = (*SOME, "square")
    request = request_for(file, folder=folder, source=str(run.path), attacks=attacks)
    assert verify(request)[0].status == "verified"
    before = contents_of(folder)
    alone, _ = verify(request_for(file, folder=folder, data_source="digits", attacks=attacks))
    assert alone.status == ("verified" if has_twin else "unverified")
    assert {*before.values()} <= {*contents_of(folder).values()}
    assert has_twin or kept(before, folder)


def test_a_verification_that_ended_early_does_not_replace_a_complete_one(
    run, tmp_path, quick, monkeypatch
):
    request = request_for(run.path, folder=tmp_path, epsilon_pixels=24 / 255, batch_size=10)
    hurried = replace(request, max_seconds=4)
    clock = "compressor.verification.verification.time"
    monkeypatch.setattr(clock, Clock(step_seconds=0.01))
    assert verify(hurried)[0].status == "incomplete"
    report, files = verify(request)  # which an incomplete one does not keep from its name
    assert report.status == "verified"
    before = contents_of(tmp_path)
    monkeypatch.setattr(clock, Clock(step_seconds=0.01))
    report, apart = verify(hurried)
    assert report.status == "incomplete"
    assert kept(before, tmp_path)
    assert apart.label == f"{files.label}-incomplete"


def paths_of(files):
    return (files.json, files.markdown, files.html, files.samples)


# Files of ONNX


def shifted_file(run, path, *, answer=3, op="Add"):
    """The exported file, but for a bias that makes it answer this whatever it is shown."""
    bias = torch.zeros(10)
    bias[answer] = 1000
    shift = constant("shift", bias.numpy())
    onnx.save(appended(onnx.load(run.onnx("fp32")), op, constants=[shift]), path)
    return path


@pytest.mark.parametrize("mode", ["fast", "compat"])
def test_the_file_judges_what_was_found_on_its_source(run, tmp_path, quick, mode, monkeypatch):
    """A file that answers 3 to everything is right on every 3, whatever the source thinks."""
    monkeypatch.setattr("compressor.verification.target.MIN_AGREEMENT", 0.0)
    file = shifted_file(run, tmp_path / "shifted.onnx", op="Sum")  # which has no twin
    request = request_for(file, source=str(run.path), folder=tmp_path / "out", mode=mode)
    report, files = verify(request)
    threes = [label == 3 for label in report.samples.label]
    assert [broken_by is None for broken_by in report.samples.broken_by] == threes
    assert report.clean.num_correct == sum(threes) > 0
    assert {row.num_tried for row in report.attacks} == {sum(threes)}
    assert {row.num_broken for row in report.attacks} == {0}
    assert report.target.kind == "onnx"
    assert report.target.sha256 == sha256_of_file(file)
    assert report.target.source_sha256 == sha256_of_file(run.model)
    assert report.target.source_sha256 in files.markdown.read_text()


def test_a_file_that_answers_otherwise_is_refused(run, tmp_path):
    """It would look robust: what fools its source says nothing about it."""
    file = shifted_file(run, tmp_path / "shifted.onnx")
    with pytest.raises(ArtefactMismatchError, match="says nothing about the file"):
        verify(request_for(file, source=str(run.path), folder=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_is_compared_on_images_of_all_classes(run, tmp_path, monkeypatch):
    """The first images of a folder are all of the first class, where this one is right."""
    monkeypatch.setattr("compressor.verification.artefact.NUM_COMPARED_IMAGES", 20)
    source = digits_folder(tmp_path / "digits", num_of_each=lambda _: 30)
    file = shifted_file(run, tmp_path / "shifted.onnx", answer=0)
    request = request_for(file, source=str(run.path), data_source=source, num_images=None)
    with pytest.raises(ArtefactMismatchError, match=r"2 of 20"):
        prepare(request)


@pytest.mark.parametrize("mode", ["fast", "compat"])
def test_a_true_file_is_as_fragile_as_its_source(run, tmp_path, quick, mode):
    of_run, _ = verify(request_for(run.path, folder=tmp_path, mode=mode))
    request = request_for(run.onnx("fp32"), source=str(run.path), folder=tmp_path / "x", mode=mode)
    of_file, files = verify(request)
    assert (of_file.status, of_file.name) == ("verified", "model.fp32")
    assert of_file.clean == of_run.clean
    assert of_file.worst_case == of_run.worst_case
    assert of_file.samples == of_run.samples
    assert files.folder == tmp_path / "x"


def test_a_file_alone_is_as_fragile_as_its_run(run, far, tmp_path, quick):
    """Its twin has the gradients of the network that it was exported from."""
    of_run, _ = verify(request_for(run.path, folder=tmp_path / "run"))
    request = request_for(far, folder=tmp_path, data_source="digits", epsilon_pixels=EPSILON)
    of_file, files = verify(request)
    assert of_file.status == "verified"
    assert (of_file.clean, of_file.worst_case) == (of_run.clean, of_run.worst_case)
    assert of_file.samples == of_run.samples
    assert of_file.artefact.attacked_through == "twin"
    assert of_file.artefact.twin.startswith(
        "its differentiable twin gives its label on 100.00 % (40 of 40) test images"
    )
    assert of_file.artefact.twin[1:] in files.markdown.read_text()
    assert "transfer" not in {row.name for row in of_file.attacks}
    assert of_run.artefact is None


def carded(file, path, *, threat):
    """The file with another threat in its model card, or with none."""
    model = onnx.load(file)
    kept = [entry for entry in model.metadata_props if entry.key != "robust_compress.threat"]
    card = {entry.key: entry.value for entry in kept}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, card if threat is None else card | {THREAT_KEY: threat})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("threat", "expected"),
    [
        ("linf 48/255", ThreatModel(epsilon_pixels=48 / 255)),
        ("linf 64/255", ThreatModel(epsilon_pixels=64 / 255)),
        ("l2 0.5", ThreatModel(norm="l2", epsilon_pixels=0.5)),
    ],
)
def test_a_file_alone_is_attacked_as_its_card_says(far, tmp_path, threat, expected):
    """Not within 8/255, where it would look as robust as it never claimed to be."""
    file = carded(far, tmp_path / "carded.onnx", threat=threat)
    prepared = prepare(request_for(file, data_source="digits", attacks=PAPER_ATTACKS))
    assert prepared.threat == expected
    assert prepared.files.label == "40-papers"
    assert f"with noise of {expected} on them" in prepared.model.twin.reason


@pytest.mark.parametrize(
    ("threat", "has_source", "message"),
    [
        (None, False, r"carded\.onnx does not say within which radius it is to stand; give the"),
        ("8 of 255", False, "names the threat '8 of 255', which cannot be read; give the radius"),
        ("8 of 255", True, "names the threat '8 of 255', which cannot be read; give the radius"),
        ("linf 4/255", True, "names the threat 'linf 4/255', and its source 'linf 48/255'; give"),
    ],
)
def test_a_radius_that_nobody_knows_is_asked_for(run, far, tmp_path, threat, has_source, message):
    file = carded(far, tmp_path / "carded.onnx", threat=threat)
    request = request_for(file, data_source="digits", source=str(run.path) if has_source else None)
    with pytest.raises(UsageError, match=f"{message}.*--epsilon, such as 8/255"):
        prepare(request)
    assert prepare(replace(request, epsilon_pixels=0.1)).threat.epsilon_pixels == 0.1


def test_a_file_without_a_card_has_the_radius_of_its_source(run, far, tmp_path):
    file = carded(far, tmp_path / "carded.onnx", threat=None)
    prepared = prepare(request_for(file, source=str(run.path)))
    assert prepared.threat == ThreatModel(epsilon_pixels=EPSILON)


def test_a_file_without_a_twin_is_attacked_through_its_source(run, far, tmp_path, quick):
    file, attacks = without_twin(far, tmp_path / "opaque.onnx"), (*SOME, "square")
    request = request_for(file, source=str(run.path), folder=tmp_path, attacks=attacks)
    report, _ = verify(request)
    of_run, _ = verify(request_for(run.path, folder=tmp_path / "run", attacks=attacks))
    assert (report.status, report.artefact.attacked_through) == ("verified", "source")
    assert report.samples == of_run.samples
    rows = {row.name: row for row in report.validity}
    assert rows["twin_under_attack"].status == "not_run"
    assert rows["twin_under_attack"].advice.startswith("the file has no twin")


def test_images_of_its_source_alone_verify_no_file(run, far, tmp_path, quick):
    """Nobody has asked the file itself."""
    file = without_twin(far, tmp_path / "opaque.onnx")
    report, files = verify(request_for(file, source=str(run.path), folder=tmp_path))
    assert (report.status, report.worst_case) == ("unverified", None)
    assert report.status_reason.startswith("the protocol is incomplete: it has no differentiable")
    assert "add square" in report.status_reason
    assert read_report(files.json) == report
    assert "worst case" not in files.markdown.read_text().lower()


def test_square_does_not_make_up_for_a_twin_of_a_file_that_rounds(run, tmp_path, quick):
    """Alone it left ten points more of an int8 ResNet-18 standing than of the network."""
    rounded = rounded_file(run, tmp_path / "rounded.onnx")
    file = without_twin(rounded, tmp_path / "opaque.onnx")
    request = request_for(file, source=str(run.path), folder=tmp_path, attacks=(*SOME, "square"))
    report, _ = verify(request)
    assert (report.status, report.worst_case) == ("unverified", None)
    assert "square finds too little on a file that rounds" in report.status_reason


def test_without_square_the_protocol_of_a_file_is_incomplete(run, far, tmp_path, quick):
    reasons = []
    for attacks in (SOME, (*SOME, "square")):
        request = request_for(far, data_source="digits", folder=tmp_path, attacks=attacks)
        report, _ = verify(replace(request, num_images=10))
        assert report.status == "verified"
        reasons.append(report.status_reason.partition("; ")[2])
    assert reasons[0].startswith("but the protocol is incomplete and the bound a loose one")
    assert reasons[1] == "the whole cascade was not among them, so the bound is a loose one"
    of_run, _ = verify(request_for(run.path, folder=tmp_path / "run", num_images=10))
    assert of_run.status_reason.endswith(reasons[1])


def test_a_file_that_is_another_one_off_the_grey_levels_has_no_twin(far, tmp_path, quick):
    """On the images themselves it answers as the twin, so that attacks would find nothing."""
    onnx.save(other_off_the_grey_levels(onnx.load(far)), file := tmp_path / "two.onnx")
    report, _ = verify(request_for(file, data_source="digits", folder=tmp_path))
    assert (report.status, report.worst_case) == ("unverified", None)
    assert "gives its label on 100.00 % (40 of 40) test images" in report.status_reason
    assert "with noise of linf 48/255 on them, on " in report.status_reason
    assert "too far to attack through it" in report.status_reason


def test_a_file_that_does_not_follow_its_twin_under_attack_is_invalid(far, tmp_path, quick):
    """It agrees on the images and with noise; less than half of one of 16 steps does nothing."""
    onnx.save(in_steps(onnx.load(far), 16), file := tmp_path / "steps.onnx")
    request = request_for(file, data_source="digits", folder=tmp_path, epsilon_pixels=0.02)
    report, _ = verify(request)
    assert report.artefact.attacked_through == "twin"
    assert report.status == "invalid"
    assert report.status_reason.endswith("alarm: twin_under_attack")
    true, _ = verify(replace(request, target=str(far)))
    assert true.status == "verified"


def test_a_file_that_rounds_is_also_attacked_from_its_source(run, tmp_path, quick):
    """After its own gradients, and before what needs none."""
    file = rounded_file(run, tmp_path / "rounded.onnx")
    attacks = ("square", "pgd_sat", "apgd_ce")
    request = request_for(file, source=str(run.path), folder=tmp_path, attacks=attacks)
    report, files = verify(request)
    assert [row.name for row in report.attacks] == ["pgd_sat", "apgd_ce", "transfer", "square"]
    facts = report.artefact
    assert facts.attacked_through == "twin"
    assert facts.transfer.num_total == facts.source.num_total == 40
    assert facts.transfer.num_correct >= report.worst_case.num_correct
    assert (facts.gradients_are_masked, facts.transfer_flatters) == (False, False)
    assert facts.masking.startswith("whether gradients are masked was not asked; ")
    assert facts.masking[1:] in files.markdown.read_text()
    (row,) = [row for row in report.validity if row.name == "twin_under_attack"]
    assert row.status == "passed"
    assert " fool the twin, " in row.found


def test_transfer_that_flatters_is_said_to(run, tmp_path, quick, monkeypatch):
    """Images of its source do nothing to it; its own twin breaks it. That alone is no masking."""
    monkeypatch.setattr("compressor.verification.artefact._FLATTERS_P_VALUE", 0.5)
    moved = Transfer.search

    def useless(attack, model, x_NCHW, y_N, **options):
        found = moved(attack, model, x_NCHW, y_N, **options)
        return replace(found, x_adv_NCHW=x_NCHW.clone())

    monkeypatch.setattr(Transfer, "search", useless)
    file = rounded_file(run, tmp_path / "rounded.onnx")
    request = request_for(file, source=str(run.path), folder=tmp_path, attacks=("transfer",))
    report, _ = verify(replace(request, attacks=("fgsm", "transfer")))
    facts = report.artefact
    assert (facts.transfer_flatters, facts.gradients_are_masked) == (True, False)
    assert facts.transfer.num_correct > facts.source.num_correct
    assert "its gradients are masked, or it is another function by now: transfer" in facts.masking
    assert report.status == "verified"


def test_a_file_that_masks_its_gradients_is_invalid(run, tmp_path, quick, monkeypatch):
    """Images of its source break what its own twin could not."""

    def useless(attack, model, x_NCHW, y_N, **options):
        none_N = torch.zeros_like(y_N)
        return SearchResult(
            x_adv_NCHW=x_NCHW.clone(),
            is_fooled_N=none_N.bool(),
            num_forwards_N=none_N + 1,
            num_backwards_N=none_N,
        )

    monkeypatch.setattr(Targeted, "search", useless)
    file = rounded_file(run, tmp_path / "rounded.onnx")
    request = request_for(file, source=str(run.path), folder=tmp_path, attacks=("apgd_t",))
    report, files = verify(request)
    assert [row.name for row in report.attacks] == ["apgd_t", "transfer"]
    assert report.artefact.gradients_are_masked
    said = "Gradients are masked: transferred images alone broke "
    assert report.artefact.masking.startswith(said.lower())
    assert said in files.markdown.read_text()
    assert report.status == "invalid"
    assert "transfer" in report.status_reason


def rounded_file(run, path):
    """The exported file in 8 bits."""
    model = load_onnx_model(run.onnx("fp32"))
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(16, 1, 8, 8, generator=generator).numpy() for _ in range(2))
    ranges = calibrate(run.onnx("fp32"), images, method="minmax")
    write_int8(run.onnx("fp32"), path, ranges, metadata=model.metadata)
    return path


def test_a_file_alone_without_a_twin_is_unverified_and_has_no_worst_case(run, far, tmp_path):
    file = without_twin(far, tmp_path / "opaque.onnx")
    report, files = verify(request_for(file, data_source="digits", folder=tmp_path))
    assert report.status == "unverified"
    assert report.status_reason.startswith(
        "no white-box attack was possible, because it has no differentiable twin"
    )
    assert report.status_reason.endswith("with --source")
    assert (report.worst_case, report.attacks, report.curve) == (None, (), ())
    assert (report.eight_bit, report.validity, report.cost) == (None, (), ())
    assert report.protocol == "no attack"
    assert json.loads(files.json.read_text())["worst_case"] is None
    for text in (files.markdown.read_text(), files.html.read_text()):
        assert "worst case" not in text.lower()
    assert files.samples.read_text().splitlines()[0].endswith("num_backwards")


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ("nonsense",)}, "there is no attack nonsense"),
        ({"attacks": ()}, "there is no attack"),
        ({"norm": "l2"}, "--norm l2 needs a radius of its own"),
        ({"epsilon_pixels": 8.0}, r"--epsilon 8 is outside \(0, 1\].*8/255"),
        ({"epsilon_pixels": 0.0}, "--epsilon 0 is outside"),
        ({"epsilon_pixels": -0.1}, "--epsilon -0.1 is outside"),
        ({"epsilon_pixels": float("nan")}, "--epsilon nan is outside"),
        ({"norm": "l2", "epsilon_pixels": 8.01}, r"outside \(0, 8\]"),
    ],
    ids=str,
)
def test_requests_that_contradict_themselves_are_refused(run, changes, message):
    with pytest.raises(UsageError, match=message):
        prepare(request_for(run.path, **changes))


def test_what_the_report_needs_is_missed_before_the_attacks(copy):
    """And not after hours."""
    (copy.checkpoint(copy.checkpoint_steps()[-1]) / "train_state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"train_state\.json"):
        prepare(request_for(copy.path))


def test_checkpoints_may_go_after_training(copy):
    """They are most of the disk that a run takes; the report says what it lacks."""
    shutil.rmtree(copy.checkpoints)
    report, files = verify(request_for(copy.path, attacks=("fgsm",), num_images=4))
    assert report.training.selection is None
    assert "the checkpoints, which say more, are gone" in files.markdown.read_text()


def test_environment_is_missed_before_the_attacks_too(copy):
    copy.environment.unlink()
    with pytest.raises(RunError, match=r"environment\.json is missing"):
        prepare(request_for(copy.path))


@dataclass(frozen=True)
class Cheat:
    """Leaves its threat model by a little."""

    threat: ThreatModel

    def search(self, model, x_NCHW, y_N, *, draws, judge):
        del model, draws, judge
        x_adv = (x_NCHW + 1.01 * self.threat.epsilon_pixels).clamp(max=1)
        zero_N = torch.zeros_like(y_N)
        return SearchResult(
            x_adv_NCHW=x_adv,
            is_fooled_N=zero_N.bool(),
            num_forwards_N=zero_N,
            num_backwards_N=zero_N,
        )


def test_an_attack_that_leaves_its_threat_model_leaves_no_number(run, tmp_path, monkeypatch):
    from compressor.verification.request import build_stages

    def build(names, *, threat, **options):
        first, second, *_ = build_stages(names, threat=threat, **options)
        return first, replace(second, search=Cheat(threat))

    monkeypatch.setattr("compressor.verification.request.build_stages", build)
    with pytest.raises(InvalidEvaluationError, match="pgd_sat left its threat model"):
        verify(request_for(run.path, folder=tmp_path))
    assert [name[:14] for name in names_in(tmp_path)] == [".verification-"]


@pytest.mark.parametrize(("fact", "value"), [("image_shape", [1, 16, 16]), ("class_names", ["a"])])
def test_images_of_another_kind_are_refused(copy, fact, value):
    copy.facts.write_text(json.dumps(json.loads(copy.facts.read_text()) | {fact: value}))
    with pytest.raises(DataError, match="give the data of the run with --data"):
        verify(request_for(copy.path))


def test_test_images_of_another_size_are_refused_before_training(tmp_path, train_on_digits):
    for part, side in (("train", 8), ("test", 16)):
        for name in ("a", "b"):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(10):
                Image.new("L", (side, side), number * 20).save(folder / f"{number}.png")
    data = {"source": f"imagefolder:{tmp_path / 'data'}", "validation_size": 4}
    with pytest.raises(DataError, match="the test images have 2 classes and shape"):
        train_on_digits(tmp_path / "run", data=data, training={"batch_size": 8})
    assert not (tmp_path / "run").exists()


# Selection


@pytest.mark.parametrize("num_steps", [1, 5, 10, 20, 40])
def test_selection_reaches_as_far_with_any_number_of_steps(num_steps):
    attack = selection_attack(ThreatModel(epsilon_pixels=8 / 255), num_steps=num_steps)
    assert attack.num_steps * attack.step_size_pixels == pytest.approx(20 * 0.003)
    assert attack.num_steps * attack.step_size_pixels > attack.threat.epsilon_pixels


def test_inner_attack_of_default_steps_must_reach_the_border_too(digits_table):
    table = digits_table("weak", method={"name": "pgd_at", "attack": {"num_steps": 1}})
    with pytest.raises(RecipeError, match="weaker attacker than the threat says"):
        parse_recipe(table, origin="test")
