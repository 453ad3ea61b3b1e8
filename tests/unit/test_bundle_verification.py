"""A bundle is hashed first, then replayed; an engine runs only under a trusted manifest."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import onnx  # noqa: TID253 (makes a file)
import pytest

import exporters.bundle.engines
import exporters.bundle.verification
from compressor.device.kit_files import DeviceError, read_kit, sha256_of
from compressor.errors import MissingDependencyError, UsageError
from compressor.run_directory import RunDirectory
from exporters.bundle.bundle import check_bundle_request
from exporters.bundle.engines import EngineRun, HashedKit, rebuild_engine, run_engine
from exporters.bundle.manifest import BundleError
from exporters.bundle.verification import is_bundle, open_bundle, verify_bundle
from tests.unit.bundle_models import (
    ENGINE,
    RTX_VERSION,
    bytes_below,
    copied,
    make_bundle,
    resign,
    rewrite,
    verify,
)
from tests.unit.device_models import make_model, needs_tensorrt_rtx

PASS = EngineRun(status="PASS", reason="by TensorRT 10.3.0", lines=("layers: 3 in fp16",))


@pytest.fixture(scope="module")
def original(tmp_path_factory, make_report):
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    make_bundle(folder, tmp_path_factory.mktemp("models"), make_report)
    return folder


@pytest.fixture
def bundle(original, tmp_path):
    return copied(original, tmp_path / "bundle")


def trusted(bundle):
    return open_bundle(bundle, manifest_sha256=sha256_of((bundle / "manifest.json").read_bytes()))


@pytest.fixture
def engine_calls(monkeypatch):
    """What would be run of engines, in order; each passes. The machine has all it takes."""
    calls = []

    def run(kit, entry, *, plan, sidecar):
        calls.append(("run", entry.file, plan))
        return PASS

    def rebuild(kit, entry):
        calls.append(("rebuild", entry.file))
        return PASS

    monkeypatch.setattr(exporters.bundle.verification, "run_engine", run)
    monkeypatch.setattr(exporters.bundle.verification, "rebuild_engine", rebuild)
    monkeypatch.setattr(exporters.bundle.verification, "why_no_engine_runs_here", lambda: None)
    return calls


def test_an_engine_is_run_under_a_trusted_manifest(bundle, engine_calls):
    shown = verify_bundle(trusted(bundle))
    assert engine_calls == [("run", "model.fp16.onnx", (bundle / ENGINE).read_bytes())]
    assert (shown.verdict, shown.files[-1].kind, shown.files[-1].status) == (
        "PASS",
        "engine",
        "PASS",
    )


def test_an_engine_is_built_anew_under_any_other_manifest(bundle, engine_calls):
    """The one in the bundle is not touched, and stays unverified."""
    shown = verify_bundle(open_bundle(bundle))
    assert engine_calls == [("rebuild", "model.fp16.onnx")]
    assert [(r.file, r.kind, r.status) for r in shown.files[-2:]] == [
        (ENGINE, "engine", "UNVERIFIED"),
        (ENGINE, "rebuilt engine", "PASS"),
    ]
    assert shown.verdict == "PASS, engines UNVERIFIED"
    assert "the manifest is not authenticated" in shown.files[-2].reason


def test_without_a_gpu_nothing_is_built_and_the_reason_is_said(bundle, engine_calls, monkeypatch):
    monkeypatch.setattr(
        exporters.bundle.verification, "why_no_engine_runs_here", lambda: "there is no GPU"
    )
    shown = verify_bundle(open_bundle(bundle))
    assert engine_calls == []
    assert shown.files[-1].reason.endswith("nor can one be built in its place: there is no GPU")
    assert (shown.verdict, int(shown.exit_code)) == ("PASS, engines UNVERIFIED", 0)


@pytest.mark.parametrize("anchored", [True, False])
def test_an_engine_that_answers_otherwise_fails_the_bundle(
    bundle, engine_calls, monkeypatch, anchored
):
    failed = EngineRun(status="FAIL", reason="clean logits are off by more than 2.0e-02")
    for name in ("run_engine", "rebuild_engine"):
        monkeypatch.setattr(exporters.bundle.verification, name, lambda *_, **__: failed)
    shown = verify_bundle(trusted(bundle) if anchored else open_bundle(bundle))
    assert (shown.verdict, int(shown.exit_code)) == ("FAIL", 5)


def test_an_engine_that_changes_while_it_is_verified_is_not_run(bundle, engine_calls, monkeypatch):
    opened = trusted(bundle)

    def change_then_replay(kit, name):
        (bundle / ENGINE).write_bytes(b"another plan")
        return replayed(kit, name)

    replayed = exporters.bundle.verification.replay
    monkeypatch.setattr(exporters.bundle.verification, "replay", change_then_replay)
    shown = verify_bundle(opened)
    assert engine_calls == []
    assert shown.verdict == "FAIL"


def test_an_onnx_file_that_changes_while_it_is_verified_fails(bundle, engine_calls, monkeypatch):
    opened = trusted(bundle)

    def change_then_replay(kit, name):
        (bundle / "kit/model.int8.onnx").write_bytes(b"another")
        return replayed(kit, name)

    replayed = exporters.bundle.verification.replay
    monkeypatch.setattr(exporters.bundle.verification, "replay", change_then_replay)
    shown = verify_bundle(opened)
    assert shown.verdict == "FAIL"
    assert "was changed" in next(r.reason for r in shown.files if "int8" in r.file)


def test_wrong_answers_fail(bundle, engine_calls):
    """Everything is consistent, but the model is another one than the golden logits are of."""
    onnx.save(make_model(scale=1.5), bundle / "kit/model.int8.onnx")
    swap_hash(bundle, "kit/model.int8.onnx")
    shown = verify_bundle(open_bundle(bundle))
    assert shown.problems == ()
    statuses = {result.file: result.status for result in shown.files if result.kind == "onnx"}
    assert statuses["kit/model.fp32.onnx"] == "PASS"
    assert statuses["kit/model.int8.onnx"] == "FAIL"
    assert (shown.verdict, int(shown.exit_code)) == ("FAIL", 5)


def swap_hash(bundle, name):
    """Everything that names the hash of a model names the one that it has now."""
    before = json.loads((bundle / "manifest.json").read_text())["files"][name]["sha256"]
    after = sha256_of((bundle / name).read_bytes())
    for path in (bundle / "kit/kit.json", bundle / "manifest.json"):
        path.write_text(path.read_text().replace(before, after))
    resign(bundle, name)
    resign(bundle, "kit/kit.json")


def test_a_file_that_onnx_runtime_refuses_is_unverified_which_is_no_pass(bundle, engine_calls):
    (bundle / "kit/model.int8.onnx").write_bytes(b"\x08\x0a not a model")
    swap_hash(bundle, "kit/model.int8.onnx")
    shown = verify_bundle(open_bundle(bundle))
    assert (shown.verdict, int(shown.exit_code)) == ("UNVERIFIED", 4)


@pytest.mark.tensorrt
@needs_tensorrt_rtx
def test_an_engine_of_another_version_says_what_to_do(bundle, monkeypatch, capsys):
    """A process of its own is really started; the plan is never given to TensorRT."""
    anchor = sha256_of((bundle / "manifest.json").read_bytes())
    shown = verify(bundle, monkeypatch, capsys, "--manifest-sha256", anchor)
    assert shown.code == 0
    line = next(line for line in shown.out.splitlines() if ENGINE in line and "UNVER" in line)
    assert f"was built with tensorrt-rtx {RTX_VERSION}, and this is TensorRT-RTX" in line
    assert "run build_engine.py here" in line
    assert "PASS, engines UNVERIFIED; the manifest has the SHA-256 that was given" in shown.out


def hashed_kit(bundle):
    return HashedKit(
        kit=read_kit(bundle / "kit"), sha256=sha256_of((bundle / "kit/kit.json").read_bytes())
    )


@pytest.mark.tensorrt
@needs_tensorrt_rtx
def test_an_engine_is_really_built_anew(bundle):
    kit = hashed_kit(bundle)
    before = bytes_below(bundle)
    ran = rebuild_engine(kit, kit.kit.entry("model.fp16.onnx"))
    assert ran.status in {"UNVERIFIED", "PASS"}  # without or with a GPU
    assert ran.status == "PASS" or "GPU" in ran.reason or "cudart" in ran.reason
    assert bytes_below(bundle) == before


def ended(returncode, stdout="", stderr=""):
    return subprocess.CompletedProcess([], returncode, stdout, stderr)


@pytest.mark.parametrize(
    ("end", "status", "says"),
    [
        (ended(0, "PASS  model.fp16.engine by T 10\n  layers: 3 in fp16\n"), "PASS", "by T 10"),
        (ended(5, "FAIL  model.fp16.engine by T 10: off\n"), "FAIL", "by T 10: off"),
        (ended(4, "UNVERIFIED  model.fp16.engine: no GPU\n"), "UNVERIFIED", "no GPU"),
        (ended(4), "UNVERIFIED", ""),
        (ended(-11), "FAIL", "ended with signal 11"),
        (ended(1, "", "Traceback\nValueError: x"), "FAIL", "ended with code 1: Traceback Value"),
    ],
)
def test_how_a_process_ends_is_the_verdict(bundle, monkeypatch, end, status, says):
    """A crash is no skipped check."""
    monkeypatch.setattr(exporters.bundle.engines, "_run", lambda *_, **__: end)
    kit = hashed_kit(bundle)
    ran = run_engine(kit, kit.kit.entry("model.fp16.onnx"), plan=b"plan", sidecar=b"{}")
    assert ran.status == status
    assert says in ran.reason
    assert ran.lines == (("layers: 3 in fp16",) if status == "PASS" else ())


def test_a_process_that_does_not_end_fails(bundle, monkeypatch):
    monkeypatch.setattr(exporters.bundle.engines, "REPLAY_SECONDS", 0.01)
    kit = hashed_kit(bundle)
    ran = run_engine(kit, kit.kit.entry("model.fp16.onnx"), plan=b"plan", sidecar=b"{}")
    assert (ran.status, "did not end within 0.01 s" in ran.reason) == ("FAIL", True)


def test_a_build_that_fails_is_unverified(bundle, monkeypatch):
    monkeypatch.setattr(
        exporters.bundle.engines, "_run", lambda *_, **__: ended(4, "", "Error: no memory")
    )
    kit = hashed_kit(bundle)
    ran = rebuild_engine(kit, kit.kit.entry("model.fp16.onnx"))
    assert ran == EngineRun(status="UNVERIFIED", reason="cannot be built here: Error: no memory")


def test_the_private_copy_is_hashed_again(bundle):
    kit = hashed_kit(bundle)
    (bundle / "kit/golden.npz").write_bytes(b"another")
    with pytest.raises(DeviceError, match="was changed"):
        run_engine(kit, kit.kit.entry("model.fp16.onnx"), plan=b"plan", sidecar=b"{}")


def test_a_full_disk_names_the_folder_of_the_copy(bundle):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    kit = hashed_kit(bundle)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            run_engine(kit, kit.kit.entry("model.fp16.onnx"), plan=b"plan", sidecar=b"{}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "robust-compress-" in caught.value.filename


def test_a_module_in_the_current_folder_is_not_imported(bundle, tmp_path, monkeypatch):
    """Or whoever sends a bundle could put `numpy.py` where it is unpacked."""
    monkeypatch.chdir(tmp_path)
    for name in ("numpy.py", "compressor.py", "argparse.py"):
        (tmp_path / name).write_text("raise SystemExit(99)")
    kit = hashed_kit(bundle)
    ran = run_engine(kit, kit.kit.entry("model.fp16.onnx"), plan=b"plan", sidecar=b"{}")
    assert ran.status == "UNVERIFIED"
    assert "is damaged" in ran.reason


def test_what_a_bundle_is(bundle, tmp_path):
    assert is_bundle(bundle)
    assert not is_bundle(tmp_path / "nowhere")
    assert not is_bundle(bundle / "README.md")
    assert not is_bundle(bundle / "kit")
    (bundle / "manifest.json").unlink()
    assert is_bundle(bundle)  # of which a file is missing


def test_a_hash_may_be_in_capitals(bundle):
    sha256 = sha256_of((bundle / "manifest.json").read_bytes())
    assert open_bundle(bundle, manifest_sha256=sha256.upper()).anchors == ("sha256",)


def test_a_hash_that_is_none_and_a_folder_that_is_none(bundle, tmp_path):
    with pytest.raises(UsageError, match="no SHA-256 of 64 digits"):
        open_bundle(bundle, manifest_sha256="0" * 63)
    with pytest.raises(BundleError, match="is no folder"):
        open_bundle(tmp_path / "nowhere")


def test_options_of_an_attack_are_refused(bundle, monkeypatch, capsys):
    shown = verify(bundle, monkeypatch, capsys, "--samples", 10, "--epsilon", "8/255")
    assert shown.code == 2
    assert "--epsilon, --samples would have no effect" in " ".join(shown.err.split())


def test_a_public_key_for_what_is_no_bundle_is_refused(tmp_path, monkeypatch, capsys):
    shown = verify(tmp_path, monkeypatch, capsys, "--public-key", "key.pub.pem")
    assert shown.code == 2
    assert "--public-key is for bundles" in shown.err


def test_what_is_printed(bundle, monkeypatch, capsys):
    shown = verify(bundle, monkeypatch, capsys)
    text = " ".join(shown.out.split())
    assert "adversarial images: same label on 21 of 21" in text
    assert "2.0 points (-2.8 to 7.6), n = 100 held-out images" in text
    assert "report.student.json: VERIFIED, linf 8/255: clean 8 of 10, 5 of 10 stand" in text
    assert "gate.student.json: gate FAIL" in text or "gate INCONCLUSIVE" in text
    assert "measured before and not here" in text
    rewrite(bundle, lambda table: table.update(gate=None))
    (bundle / "reports/gate.student.json").unlink()
    rewrite(bundle, lambda table: table["files"].pop("reports/gate.student.json"))
    assert " not gated" in verify(bundle, monkeypatch, capsys).out
    table = json.loads(verify(bundle, monkeypatch, capsys, "--json").out)
    assert (table["status"], table["verdict"]) == ("PASS", "PASS, engines UNVERIFIED")
    assert [row["status"] for row in table["files"]] == ["PASS"] * 3 + ["UNVERIFIED"]
    assert table["authenticated_by"] == []


def test_verifying_a_bundle_needs_no_torch(bundle):
    code = (
        "import sys; sys.modules['torch'] = None; "
        f"sys.argv = ['robust-compress', 'verify', {str(bundle)!r}]; "
        "from cli.main import main; main()"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "PASS, engines UNVERIFIED" in finished.stdout


def test_without_the_package_it_says_what_to_install(bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for call in (
        lambda: check_bundle_request(
            tmp_path / "new", tmp_path / "key.pem", run=RunDirectory(tmp_path)
        ),
        lambda: open_bundle(bundle, public_key=tmp_path / "key.pub.pem"),
    ):
        with pytest.raises(MissingDependencyError, match=r"robust-compress\[signing\]") as caught:
            call()
        assert caught.value.exit_code == 4
