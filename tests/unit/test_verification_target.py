"""What may be verified, under which name, with which images, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressor.data import load_test_split
from compressor.errors import (
    ArtefactMismatchError,
    DataError,
    RunError,
    TeacherError,
    UsageError,
    WeightsError,
)
from compressor.networks import NetworkSpec, build_classifier
from compressor.onnx_model import load_onnx_model
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe
from compressor.run_directory import RunDirectory
from compressor.verification.artefact import compared_images
from compressor.verification.rows import cost_rows
from compressor.verification.target import load_target, open_target, refuse_other_source
from compressor.weights import sha256_of_file
from exporters.int8.to_int8 import calibrate, write_int8
from exporters.request import ExportRequest
from exporters.workflow import export_run
from tests.onnx_files import linear_model, value, without_twin

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)
STUDENT = {"architecture": "tiny", "width": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory, train_on_digits):
    out = tmp_path_factory.mktemp("target") / "the-run"
    run = train_on_digits(out, name="mine", epochs=1, student=STUDENT)
    export_run(ExportRequest(run=run, settings=SETTINGS))
    return run


@pytest.fixture(scope="module")
def split():
    recipe = DataRecipe(source="digits", validation_size=50)
    return load_test_split(recipe, settings=SETTINGS, device=torch.device("cpu"), num_images=20)


@pytest.fixture
def weights(run, tmp_path):
    """The weights, far from their run."""
    return shutil.copy(run.model, tmp_path / "weights.safetensors")


@pytest.fixture
def copy(run, tmp_path):
    """A run of one's own, to be spoilt."""
    return RunDirectory(shutil.copytree(run.path, tmp_path / "copy"))


def linear_file(path, *, num_classes=10, side=8):
    """A map from grey images to logits that are all 0."""
    weight = torch.zeros(side * side, num_classes).numpy()
    shapes = {
        "inputs": [value("images", ["N", 1, side, side])],
        "outputs": [value("logits", ["N", num_classes])],
    }
    path.write_bytes(linear_model(weight=weight, **shapes).SerializeToString())
    return str(path)


def answers(network, split):
    x_NCHW = torch.rand(5, *split.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(x_NCHW)


# What it is


def test_a_run_knows_its_name_its_images_and_its_folder(run, split):
    target = open_target(str(run.path), source=None)
    assert (target.name, target.folder(sha256="0123")) == ("mine", run.path)
    assert target.data_recipe(None).source == "digits"
    assert target.data_recipe("imagefolder:x").source == "imagefolder:x"
    model = load_target(target, split)
    assert model.facts.kind == "run"
    assert model.facts.architecture == "tiny, width 0.5"
    assert model.facts.sha256 == sha256_of_file(run.model) == target.facts["model_sha256"]
    assert model.facts.source_sha256 is None
    assert (model.file, model.num_bytes) == (None, run.model.stat().st_size)


@pytest.mark.parametrize("prefix", ["", "tiny:"])
def test_weights_are_the_same_model_without_a_run(run, weights, split, prefix):
    """Where the file describes itself, its width need not be said."""
    target = open_target(f"{prefix}{weights}", source=None)
    assert (target.run, target.recipe, target.facts) == (None, None, None)
    assert target.name == "weights"
    assert target.folder(sha256="48acb3d8f") == Path("runs/verify-weights-48acb3d8")
    model = load_target(target, split)
    assert model.facts.kind == "weights"
    assert model.facts.sha256 == sha256_of_file(weights)
    of_run = load_target(open_target(str(run.path), source=None), split)
    torch.testing.assert_close(
        answers(model.network.eval(), split), answers(of_run.network.eval(), split)
    )


def test_weights_with_their_architecture(tmp_path, split, monkeypatch):
    spec = NetworkSpec(architecture="tiny", num_classes=10, image_shape=split.image_shape)
    network = build_classifier(spec, seed=1)
    torch.save(network.backbone.state_dict(), tmp_path / "bare.pt")
    monkeypatch.chdir(tmp_path)
    target = open_target("tiny:bare.pt", source=None)
    assert target.name == "bare"
    assert target.folder(sha256="0123456789") == Path("runs/verify-bare-01234567")
    model = load_target(target, split)
    assert model.facts.kind == "weights"
    assert model.facts.architecture == "tiny, width 1"
    torch.testing.assert_close(answers(model.network.eval(), split), answers(network.eval(), split))


def test_a_file_with_its_source_has_both_hashes(run, weights, split):
    file = str(run.onnx("fp32"))
    for source in (str(run.path), str(weights)):
        target = open_target(file, source=source)
        assert target.name == "model.fp32"
        assert target.folder(sha256="0123456789") == Path("runs/verify-model.fp32-01234567")
        model = load_target(target, split)
        assert model.facts.kind == "onnx"
        assert model.facts.sha256 == sha256_of_file(run.onnx("fp32"))
        assert model.facts.source_sha256 == sha256_of_file(run.model)
        assert model.num_bytes == run.onnx("fp32").stat().st_size
        torch.testing.assert_close(
            answers(model.file, split),
            answers(model.network.eval(), split),
            rtol=1e-3,
            atol=1e-4,
        )


def test_a_file_with_the_run_it_came_from_needs_no_data(run):
    target = open_target(str(run.onnx("fp32")), source=str(run.path))
    assert target.data_recipe(None).source == "digits"
    assert target.run.path == run.path


@pytest.fixture
def far(run, tmp_path):
    """The exported file, far from its run."""
    return shutil.copy(run.onnx("fp32"), tmp_path / "far.onnx")


def test_a_file_alone_is_differentiated_by_its_twin(run, far, split):
    model = load_target(open_target(str(far), source=None), split)
    assert (model.network, model.spec, model.facts.source_sha256) == (None, None, None)
    assert (model.facts.kind, model.rounds) == ("onnx", False)
    assert model.differentiable is model.twin.module is not None
    assert (model.twin.agreement.num_correct, model.twin.agreement.num_total) == (20, 20)
    torch.testing.assert_close(answers(model.differentiable, split), answers(model.file, split))


def test_a_file_alone_without_a_twin_has_nothing_to_differentiate(far, split, tmp_path):
    file = without_twin(far, tmp_path / "opaque.onnx")
    model = load_target(open_target(str(file), source=None), split)
    assert (model.network, model.twin.module, model.differentiable) == (None, None, None)
    assert model.twin.reason == (
        "it has no differentiable twin (it has operators without a derivative here: Sum)"
    )


def test_a_file_without_a_twin_is_differentiated_by_its_source(run, far, split, tmp_path):
    file = without_twin(far, tmp_path / "opaque.onnx")
    model = load_target(open_target(str(file), source=str(run.path)), split)
    assert model.twin.module is None
    assert model.differentiable is model.network is not None


def test_a_file_in_the_exports_of_its_run_finds_it(run, split):
    """Whatever it is called there; so its gradients and its images need not be pointed at."""
    for path in (run.onnx("fp32"), Path(shutil.copy(run.onnx("fp32"), run.exports / "mine.onnx"))):
        target = open_target(str(path), source=None)
        assert (target.run.path, target.data_recipe(None).source) == (run.path, "digits")
        assert load_target(target, split).facts.source_sha256 == sha256_of_file(run.model)
    path.unlink()


@pytest.mark.parametrize("change", ["other weights", "no name", "no run", "elsewhere"])
def test_a_file_finds_no_run_that_it_is_not_from(copy, change, tmp_path):
    """It would be believed to be as robust as a stranger."""
    path = copy.onnx("fp32")
    if change == "other weights":
        facts = json.loads(copy.facts.read_text())
        copy.facts.write_text(json.dumps(facts | {"model_sha256": "0" * 64}))
    elif change == "no name":
        path.write_bytes(linear_model().SerializeToString())
    elif change == "no run":
        copy.facts.unlink()
    else:
        (copy.path / "others").mkdir()
        path = path.rename(copy.path / "others/model.fp32.onnx")
    target = open_target(str(path), source=None)
    assert (target.run, target.source) == (None, None)


def test_a_file_that_rounds_is_told_from_one_that_does_not(run, split, tmp_path):
    """What is found on the source is then tried on it as well."""
    source = {"source": str(run.path)}
    exact = load_target(open_target(str(run.onnx("fp32")), **source), split)
    coarse = tmp_path / "coarse.onnx"
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(8, *split.image_shape, generator=generator).numpy() for _ in range(2))
    ranges = calibrate(run.onnx("fp32"), images, method="minmax")
    write_int8(run.onnx("fp32"), coarse, ranges, metadata=exact.file.metadata)
    rounded = load_target(open_target(str(coarse), **source), split)
    assert (exact.rounds, rounded.rounds) == (False, True)
    assert rounded.twin.module is not None


# What is refused


@pytest.mark.parametrize("kind", ["weights", "file"])
def test_what_is_no_run_needs_data(weights, far, kind):
    path = {"weights": weights, "file": far}[kind]
    target = open_target(str(path), source=None)
    with pytest.raises(UsageError, match="give them with --data, for example --data imagefolder"):
        target.data_recipe(None)
    assert target.data_recipe("digits").source == "digits"


@pytest.mark.parametrize("kind", ["run", "weights"])
def test_a_source_is_for_files_only(run, weights, kind):
    path = {"run": run.path, "weights": weights}[kind]
    with pytest.raises(UsageError, match=f"--source is for exported files; {path} is not one"):
        open_target(str(path), source=str(run.path))


def test_another_source_is_refused(run, split, tmp_path, train_on_digits):
    """A robust stranger as the source would lend its robustness to a fragile file."""
    stranger = train_on_digits(tmp_path / "other", epochs=1, student=STUDENT, seed=1)
    target = open_target(str(run.onnx("fp32")), source=str(stranger.path))
    with pytest.raises(ArtefactMismatchError, match="was exported from weights with SHA-256"):
        load_target(target, split)


class OtherSource(torch.nn.Module):
    """Answers the first images with class 1, all others with 0."""

    def __init__(self, *, num_others):
        super().__init__()
        self.sizes, self.num_others = [], num_others

    def forward(self, x_NCHW):
        rows_N = torch.arange(len(x_NCHW)) + sum(self.sizes)
        self.sizes.append(len(x_NCHW))
        is_other_N = rows_N < self.num_others
        return torch.stack([~is_other_N, is_other_N], dim=1).float()


@pytest.mark.parametrize(
    ("num_images", "sizes"),
    [(20, [20]), (50, [50]), (70, [50, 20]), (260, [50] * 5)],
)
def test_a_file_is_compared_with_its_source_a_few_images_at_a_time(tmp_path, num_images, sizes):
    recipe = DataRecipe(source="digits", validation_size=50)
    split = load_test_split(
        recipe, settings=SETTINGS, device=torch.device("cpu"), num_images=num_images
    )
    file, num_compared = load_onnx_model(Path(linear_file(tmp_path / "x.onnx"))), sum(sizes)
    images = compared_images(split)
    source = OtherSource(num_others=num_compared // 10)
    refuse_other_source(file, source, images, source_sha256="0")
    assert source.sizes == sizes
    source = OtherSource(num_others=num_compared // 10 + 1)
    same = f"{num_compared - source.num_others} of {num_compared}"
    with pytest.raises(ArtefactMismatchError, match=f"{same}.* test images, fewer than 90 %"):
        refuse_other_source(file, source, images, source_sha256="0")


def test_a_file_answers_with_as_many_threads_as_the_process(run):
    """As its latency is said to be."""
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        try:
            file = open_target(str(run.onnx("fp32")), source=None).file
        finally:
            torch.set_num_threads(1)
        assert file.session.get_session_options().intra_op_num_threads == num_threads


def test_a_source_without_a_gradient_is_none(run, split, tmp_path):
    other = linear_file(tmp_path / "other.onnx")
    target = open_target(str(run.onnx("fp32")), source=other)
    with pytest.raises(UsageError, match="has no gradient either; give the run it came from"):
        load_target(target, split)


@pytest.mark.parametrize("name", ["nowhere", "folder", "folder.onnx", "nowhere.safetensors"])
def test_what_is_no_run_is_refused(tmp_path, name):
    if name.startswith("folder"):
        (tmp_path / name).mkdir()
    with pytest.raises(RunError, match=f"{name} is not a run"):
        open_target(str(tmp_path / name), source=None)


def test_a_source_that_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(RunError, match="is not a run"):
        open_target(str(run.onnx("fp32")), source=str(tmp_path))


def test_a_source_that_is_not_there_is_refused(run, split):
    target = open_target(str(run.onnx("fp32")), source="nowhere.safetensors")
    with pytest.raises(WeightsError, match=r"nowhere\.safetensors does not exist"):
        load_target(target, split)


@pytest.mark.parametrize(
    ("num_bytes", "message"), [(None, "does not exist"), (0, "is empty"), (500, "is damaged")]
)
def test_a_file_that_is_not_whole_is_refused(run, tmp_path, num_bytes, message):
    path = tmp_path / "part.onnx"
    if num_bytes is not None:
        path.write_bytes(run.onnx("fp32").read_bytes()[:num_bytes])
    with pytest.raises(WeightsError, match=message):
        open_target(str(path), source=str(run.path))


def test_a_file_of_other_classes_is_refused(run, split, tmp_path):
    target = open_target(linear_file(tmp_path / "x.onnx", num_classes=7), source=str(run.path))
    with pytest.raises(DataError, match="has 7 classes, the test images have 10"):
        load_target(target, split)


def test_a_file_for_other_images_is_refused(run, split, tmp_path):
    target = open_target(linear_file(tmp_path / "x.onnx", side=16), source=str(run.path))
    with pytest.raises(WeightsError, match="takes images of 1x16x16"):
        load_target(target, split)


def test_weights_for_other_classes_are_refused(weights, split):
    fewer = replace(split, class_names=("a", "b"))
    with pytest.raises(TeacherError, match="it has 10 classes, the data has 2"):
        load_target(open_target(str(weights), source=None), fewer)


def test_a_run_that_has_not_ended_is_refused(copy, split):
    copy.model.unlink()
    with pytest.raises(RunError, match="training has not ended"):
        load_target(open_target(str(copy.path), source=None), split)


@pytest.mark.parametrize("as_source", [False, True])
@pytest.mark.parametrize(
    "change", [{"image_shape": (1, 16, 16)}, {"class_names": tuple("abcdefghij")}], ids=str
)
def test_images_of_another_kind_are_refused(run, split, change, as_source):
    """Also where the run is the source of a file."""
    path, source = (run.onnx("fp32"), str(run.path)) if as_source else (run.path, None)
    with pytest.raises(DataError, match="give the data of the run with --data"):
        load_target(open_target(str(path), source=source), replace(split, **change))


@pytest.mark.parametrize("as_source", [False, True])
def test_training_images_are_refused(run, split, as_source):
    path, source = (run.onnx("fp32"), str(run.path)) if as_source else (run.path, None)
    trained_on = json.loads(run.facts.read_text())["training_content_sha256"]
    known = replace(split, content_sha256=trained_on)
    with pytest.raises(DataError, match="the test images are the training images of this run"):
        load_target(open_target(str(path), source=source), known)


# What it costs


def costs(run, split):
    target = open_target(str(run.path), source=None)
    return [row.name for row in cost_rows(target, load_target(target, split), ())]


def spoil(file, content):
    file.unlink() if content is None else file.write_bytes(content)


def test_the_export_of_the_present_weights_has_a_cost(copy, split):
    assert costs(copy, split) == ["student tiny", "model.fp32.onnx"]


@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"\xff\xfe", b"{}", b"[1]", b"null", b'{"source_sha256": null}']
    + [b'{"source_sha256": "0"}'],
    ids=str,
)
def test_an_export_of_which_nothing_is_known_has_none(copy, split, content):
    """Its row is not worth the hours of attacks that come before it."""
    spoil(copy.onnx_verification("fp32"), content)
    assert costs(copy, split) == ["student tiny"]


def test_an_export_that_is_not_the_one_in_its_record_has_none(copy, split):
    """A process killed between the two leaves a file beside the record of the one before."""
    table = json.loads(copy.onnx_verification("fp32").read_text())
    spoil(copy.onnx_verification("fp32"), json.dumps(table | {"sha256": "0" * 64}).encode())
    assert costs(copy, split) == ["student tiny"]


@pytest.mark.parametrize("content", [None, b"", b"no ONNX"], ids=str)
def test_an_export_that_cannot_be_run_has_none(copy, split, content):
    spoil(copy.onnx("fp32"), content)
    assert costs(copy, split) == ["student tiny"]
