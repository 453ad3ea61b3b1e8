"""A bundle holds what proves it, has the same bytes each time, and its engines are run last."""

import json
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli.main import main
from compressor.device.build_options import BuildOptions
from compressor.device.kit_files import sha256_of
from compressor.errors import ArtefactMismatchError, MissingDependencyError
from compressor.gate.gate import judge
from compressor.performance_settings import PerformanceSettings
from compressor.reports.report import TargetFacts, write_report
from compressor.run_directory import RunDirectory
from exporters.bundle.bundle import check_bundle_request, write_bundle
from exporters.bundle.manifest import BundleError, parse_manifest
from exporters.bundle.verification import open_bundle, verify_bundle
from exporters.engine.to_tensorrt import build_engine
from exporters.request import ExportRequest
from exporters.workflow import export_run
from tests.unit.bundle_models import bytes_below, policy, rewrite, verify
from tests.unit.device_models import needs_tensorrt_rtx

SETTINGS = PerformanceSettings(device="cpu", training_dtype="float32", num_threads=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, train_on_digits):
    """A run whose float32 file was exported, and what that left in memory."""
    run = train_on_digits(tmp_path_factory.mktemp("runs") / "mine", epochs=1)
    prepared, made = export_run(ExportRequest(run=run, settings=SETTINGS, num_images=40))
    return SimpleNamespace(run=run, prepared=prepared, made=made)


@pytest.fixture
def write(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(folder="bundle", **changes):
        return write_bundle(
            exported.prepared, exported.made, Path(folder), options=BuildOptions(), **changes
        )

    return call


def test_a_bundle_passes_its_own_verification(write, exported):
    written = write()
    found = parse_manifest(Path("bundle/manifest.json").read_bytes())
    assert found == written.manifest
    (model,) = found.models
    (made,) = exported.made
    assert (model.file, model.sha256) == ("kit/model.fp32.onnx", made.sha256)
    assert model.hop.clean.num_total == model.hop.robust_drop.num_total == 40
    assert found.class_names == tuple(str(digit) for digit in range(10))
    assert found.source_sha256 == sha256_of(exported.run.model.read_bytes())
    facts = json.loads(exported.run.facts.read_text())
    assert found.split.validation_index_sha256 == facts["validation_index_sha256"]
    assert found.versions["robust-compress"]
    assert (found.reports, found.gate, found.engines) == ((), None, ())
    shown = verify_bundle(open_bundle(Path("bundle")))
    assert (shown.verdict, int(shown.exit_code)) == ("PASS", 0)
    (result,) = shown.files
    assert result.agreements["adversarial"].num_same == 32
    assert sorted(path.name for path in Path().iterdir()) == ["bundle"]


def test_a_bundle_made_twice_has_the_same_bytes(write):
    first, second = write(), write("again")
    assert bytes_below("bundle") == bytes_below("again")
    assert first.manifest_sha256 == second.manifest_sha256
    assert first.num_bytes == sum(len(content) for content in bytes_below("bundle").values())


def test_a_file_that_was_not_shown_to_be_as_robust_does_not_go_in(exported, tmp_path):
    (made,) = exported.made
    shown = replace(made.verification, status="unverified", reason="it has no twin")
    with pytest.raises(BundleError, match="is unverified: it has no twin, so it does not go into"):
        write_bundle(
            exported.prepared,
            [replace(made, verification=shown)],
            tmp_path / "bundle",
            options=BuildOptions(),
        )
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_holds_no_local_path(write, tmp_path, exported):
    write()
    for name, content in bytes_below("bundle").items():
        for trace in (str(tmp_path), str(exported.run.path), str(Path(__file__).parents[2])):
            assert trace.encode() not in content, name


def test_reports_and_gates_are_found_by_the_hash_of_their_target(
    write, exported, make_report, tmp_path
):
    """In the run and beside it; those of other files, and what is no report, are left out."""
    (made,) = exported.made
    student = TargetFacts(
        kind="run",
        architecture="tiny",
        sha256=exported.prepared.source_sha256,
        source_sha256=None,
    )
    of_file = student.model_copy(update={"kind": "onnx", "sha256": made.sha256})
    of_other = student.model_copy(update={"sha256": "0" * 64})
    run = shutil.copytree(exported.run.path, tmp_path / "copy/run")
    here = tmp_path / "runs/verify-model.fp32-0123abcd"
    here.mkdir(parents=True)
    report = make_report(target=student)
    write_report(report, run / "report.json")
    write_report(make_report(target=of_file), here / "report-40.json")
    write_report(make_report(target=of_other), run / "report-40.json")
    (run / "report-old.json").write_text('{"schema_version": 1}')
    gate = judge(report, policy(), baseline=None)
    (run / "gate.json").write_text(json.dumps(gate.model_dump(mode="json", by_alias=True)))
    (here / "gate-broken.json").write_text("[" * 100_000)
    request = exported.prepared.request
    moved = type(exported.run)(run)
    prepared = type(exported.prepared)(
        **vars(exported.prepared) | {"request": type(request)(**vars(request) | {"run": moved})}
    )
    written = write_bundle(prepared, exported.made, Path("bundle"), options=BuildOptions())
    names = [row.file for row in written.manifest.reports]
    assert [name.rpartition(".")[0].rpartition(".")[0] for name in names] == [
        "reports/report.model.fp32",
        "reports/report.student",
    ]
    assert Path("bundle", names[1]).read_bytes() == (run / "report.json").read_bytes()
    assert [row.worst_case.num_total for row in written.manifest.reports] == [10, 10]
    (decision,) = written.manifest.gate
    assert decision.verdict == gate.verdict != "pass"
    unreadable = {path.name: why for path, why in written.unreadable}
    assert set(unreadable) == {"report-old.json", "gate-broken.json"}
    assert "schema_version" in unreadable["report-old.json"]
    assert verify_bundle(open_bundle(Path("bundle"))).verdict == "PASS"


def test_a_folder_with_something_else_is_never_replaced(write, tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web/manifest.json").write_text('{"name": "my page"}')
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for folder in ("web", "file"):
        with pytest.raises(BundleError, match="exists and is no bundle"):
            write(folder)
    assert (tmp_path / "web/manifest.json").read_text() == '{"name": "my page"}'
    write("empty")
    (tmp_path / "link").symlink_to("empty")
    with pytest.raises(BundleError, match="exists and is no bundle"):
        write("link")
    (tmp_path / "empty/old").write_text("of an earlier export")
    write("empty")
    assert not (tmp_path / "empty/old").exists()


def test_what_fails_leaves_nothing_behind(write, monkeypatch, tmp_path):
    monkeypatch.setattr("exporters.bundle.bundle._README", "{unknown}")
    with pytest.raises(KeyError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_class_name_that_steers_a_terminal_is_refused(exported, tmp_path):
    names = ("\x1b[2J", *exported.prepared.class_names[1:])
    prepared = type(exported.prepared)(**vars(exported.prepared) | {"class_names": names})
    with pytest.raises(BundleError, match="class_names"):
        write_bundle(prepared, exported.made, tmp_path / "b", options=BuildOptions())
    assert list(tmp_path.iterdir()) == []


def test_files_of_other_weights_are_refused_by_name(write, exported, tmp_path):
    """The run was distilled again since the export, or the file was exported again."""
    (made,) = exported.made
    run = type(exported.run)(shutil.copytree(exported.run.path, tmp_path / "run"))
    request = type(exported.prepared.request)(**vars(exported.prepared.request) | {"run": run})
    prepared = type(exported.prepared)(**vars(exported.prepared) | {"request": request})
    here = type(made)(**vars(made) | {"path": run.onnx("fp32")})
    other = type(made)(**vars(here) | {"source_sha256": "0" * 64})

    def refused(file):
        with pytest.raises(ArtefactMismatchError) as caught:
            write_bundle(prepared, [file], Path("bundle"), options=BuildOptions())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
        return str(caught.value)

    path = run.onnx("fp32")
    said = f"{path} was made of other weights than those in {run.path}"
    assert refused(other).startswith(said)
    with path.open("ab") as file:
        file.write(b"x")
    assert refused(here).startswith(f"{path} is not the file that was verified")
    run.model.write_bytes(b"other weights")
    assert refused(here).startswith(said)


def test_a_full_disk_names_the_file_of_the_bundle(write, tmp_path):
    """Not a hidden one that is gone by then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert Path(caught.value.filename).parts[0] == "bundle"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.tensorrt
@needs_tensorrt_rtx
def test_engines_go_into_the_bundle_and_are_unverified_without_a_gpu(write, exported, tmp_path):
    """Deserialised in a process of their own, under a manifest that is trusted."""
    (made,) = exported.made
    new = build_engine(
        made.path, tmp_path / "model.fp32.engine", precision="fp32", options=BuildOptions()
    )
    new.write()
    facts = new.facts
    written = write(engines=[facts.path])
    (engine,) = written.manifest.engines
    assert (engine.file, engine.sha256) == ("engines/model.fp32.engine", facts.sha256)
    assert (engine.version, engine.status, engine.hop) == (facts.version, "unverified", None)
    shown = verify_bundle(open_bundle(Path("bundle"), manifest_sha256=written.manifest_sha256))
    assert [result.kind for result in shown.files] == ["onnx", "engine"]
    if shown.files[1].status == "UNVERIFIED":
        assert shown.verdict == "PASS, engines UNVERIFIED"
        assert "GPU" in shown.files[1].reason or "cudart" in shown.files[1].reason
    else:  # there is a GPU
        assert shown.verdict == "PASS"


def test_engines_that_do_not_belong_are_refused(write, exported, tmp_path):
    (made,) = exported.made
    engine = tmp_path / "model.fp32.engine"
    engine.write_bytes(b"plan")
    sidecar = {
        "status": "unverified",
        "engine": {"sha256": sha256_of(b"plan")},
        "onnx": {"sha256": made.sha256},
        "tensorrt": {"flavour": "tensorrt", "version": "10.3.0"},
        "machine": {"gpu": "Orin"},
    }
    for change, says in (
        ({"engine": {"sha256": "0" * 64}}, "is not the file that model.fp32.engine.json names"),
        ({"onnx": {"sha256": "0" * 64}}, "was not made of a file of this bundle"),
        ({"tensorrt": {}}, "is damaged"),
        ({"status": "PASS"}, "is damaged"),
    ):
        Path(f"{engine}.json").write_text(json.dumps(sidecar | change))
        with pytest.raises(BundleError, match=says):
            write(engines=[engine])
    with pytest.raises(BundleError, match="No such file"):
        write(engines=[tmp_path / "absent.engine"])
    Path(f"{engine}.json").write_text(json.dumps(sidecar))
    assert write(engines=[engine]).manifest.engines[0].gpu == "Orin"


@pytest.fixture
def keys(tmp_path):
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    made = SimpleNamespace(private=tmp_path / "key.pem", public=tmp_path / "key.pub.pem")
    key = ec.generate_private_key(ec.SECP256R1())
    form, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    made.private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, plain))
    made.public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return made


def test_a_signed_bundle_is_trusted_by_its_key(write, keys, monkeypatch, capsys):
    written = write(signing_key=keys.private)
    assert written.is_signed
    opened = open_bundle(Path("bundle"), public_key=keys.public)
    assert opened.anchors == ("signature",)
    both = open_bundle(
        Path("bundle"), public_key=keys.public, manifest_sha256=written.manifest_sha256
    )
    assert both.authentication == (
        "the manifest has the SHA-256 that was given and is signed by the key"
    )
    assert "by whom was not asked" in open_bundle(Path("bundle")).authentication
    shown = verify("bundle", monkeypatch, capsys, "--public-key", keys.public)
    assert (shown.code, "PASS; the manifest is signed by the key" in shown.out) == (0, True)
    secret = keys.private.read_bytes().splitlines()[1]
    assert not any(secret in content for content in bytes_below("bundle").values())
    write("again", signing_key=keys.private)
    assert bytes_below("again") == bytes_below("bundle")


def test_a_signature_that_is_gone_or_of_another_manifest_is_refused(write, keys):
    write(signing_key=keys.private)
    rewrite(Path("bundle"), lambda table: table.update(recipe_id="another"))
    with pytest.raises(ArtefactMismatchError, match="of something else than this manifest"):
        open_bundle(Path("bundle"), public_key=keys.public)
    Path("bundle/manifest.sig").write_bytes(b"{}")
    with pytest.raises(ArtefactMismatchError, match="is damaged, or no signature"):
        open_bundle(Path("bundle"), public_key=keys.public)
    Path("bundle/manifest.sig").unlink()
    with pytest.raises(ArtefactMismatchError, match=r"manifest\.sig is missing"):
        open_bundle(Path("bundle"), public_key=keys.public)


def test_a_key_that_would_be_deleted_with_the_folder_is_refused(write, keys):
    write()
    shutil.move(keys.private, "bundle/key.pem")
    with pytest.raises(BundleError, match="lies in bundle, which is replaced"):
        check_bundle_request(Path("bundle"), Path("bundle/key.pem"), run=RunDirectory(Path("run")))
    assert Path("bundle/key.pem").exists()


def export(*arguments):
    sys.argv = ["robust-compress", "export", *map(str, arguments)]
    try:
        main()
    except SystemExit as ended:
        return ended.code or 0
    return 0


@pytest.fixture
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", [])


def test_export_writes_a_bundle_even_if_tensorrt_is_missing(
    exported, tmp_path, monkeypatch, capsys, argv
):
    def missing(flavour=None):
        raise MissingDependencyError("tensorrt is not installed")

    monkeypatch.setattr("exporters.engine.to_tensorrt.import_tensorrt", missing)
    monkeypatch.setattr("cli.exporting.run_export", lambda *_, **__: (prepared, exported.made))
    prepared = exported.prepared
    arguments = (exported.run.path, "--trt", "--bundle", tmp_path / "b", "--samples", 100)
    assert export(*arguments, "--threads", 1) == 4
    out, err = capsys.readouterr()
    assert "is complete, without engines" in " ".join(err.split())
    shown = verify_bundle(open_bundle(tmp_path / "b"))
    assert shown.verdict == "PASS"
    assert f"--manifest-sha256 {shown.bundle.manifest_sha256}" in out


def test_export_refuses_before_it_works(exported, tmp_path, capsys, argv, monkeypatch):
    def never(*_arguments, **_options):
        raise AssertionError("it went to work")

    monkeypatch.setattr("cli.exporting.run_export", never)
    (tmp_path / "mine").write_text("")
    run = exported.run.path
    for arguments, code, says in (
        (("--signing-key", "key.pem"), 2, "--signing-key signs a bundle; add --bundle DIR"),
        (("--bundle", tmp_path / "mine"), 4, "exists and is no bundle"),
    ):
        assert export(run, *arguments) == code
        assert says in " ".join(capsys.readouterr().err.split())
