"""A small bundle that no export has written: three tiny files, an engine of nobody, two reports."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

from cli.main import main
from compressor.device.build_options import BuildOptions
from compressor.device.kit_files import sha256_of
from compressor.gate.gate import judge
from compressor.gate.policy import GatePolicy
from compressor.paired_difference import PairedDrop
from compressor.proportions import Proportion
from compressor.reports.report import TargetFacts
from exporters.budget import Budget
from exporters.bundle.manifest import (
    BundledEngine,
    BundledGate,
    BundledModel,
    BundledReport,
    BundleManifest,
    FileFacts,
    HopFacts,
    SplitFacts,
    ThreatFacts,
)
from exporters.exported_model import ExportVerification, verification_table
from tests.unit.device_models import make_golden, make_kit, make_models

CLASS_NAMES = ("cat", "dog", "fox", "owl")
STUDENT = "b" * 64
PLAN = b"not an engine that anything would run"
ENGINE = "engines/model.fp16.engine"
RTX_VERSION = "0.0.1"
"""Of no TensorRT-RTX that there is."""


def make_bundle(folder, models_folder, make_report, *, plan=PLAN, version=RTX_VERSION):
    """Writes it and gives its manifest."""
    paths = make_models(models_folder)
    make_kit(folder / "kit", paths, golden=make_golden(paths))
    models = tuple(bundled_model(folder, name) for name in paths)
    of_engine = engine_files(models[1], plan=plan, version=version)
    contents = of_engine | {"README.md": b"# Bundle\n"}
    report = make_report(
        target=TargetFacts(kind="run", architecture="tiny", sha256=STUDENT, source_sha256=None)
    )
    contents["reports/report.student.json"] = json.dumps(report.model_dump(mode="json")).encode()
    gate = judge(report, policy(), baseline=None)
    gate_json = json.dumps(gate.model_dump(mode="json", by_alias=True)).encode()
    contents["reports/gate.student.json"] = gate_json
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    manifest = BundleManifest(
        versions={"robust-compress": "0.1.0"},
        class_names=CLASS_NAMES,
        threat=ThreatFacts(norm="linf", epsilon_pixels=8 / 255),
        recipe_id="c" * 64,
        source_sha256=STUDENT,
        split=SplitFacts(
            training_content_sha256="d" * 64, validation_index_sha256="e" * 64, num_validation=100
        ),
        models=models,
        engines=(bundled_engine(models[1], plan=plan, version=version),),
        reports=(BundledReport.of(report, file="reports/report.student.json"),),
        gate=(BundledGate.of(gate, file="reports/gate.student.json"),),
        files=files_of(folder),
    )
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return manifest


def policy():
    return GatePolicy.model_validate(
        {
            "schema": 1,
            "threat": {"norm": "linf", "epsilon": 8 / 255},
            "worst_case": {"min_accuracy": 0.9},
        }
    )


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): FileFacts(
            sha256=sha256_of(path.read_bytes()), num_bytes=path.stat().st_size
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", "manifest.sig")
    }


def hop(**changes):
    """As `verification_table` gives it."""
    good, drop = (
        Proportion(num_correct=90, num_total=100),
        PairedDrop(num_newly_broken=3, num_newly_fixed=1, num_total=100),
    )
    shown = ExportVerification(
        status="verified",
        reason="largest logit difference 1e-6",
        clean_agreement=good,
        adversarial_agreement=good,
        num_clear_flips=0,
        flipped_margin_fraction=0.0,
        max_logit_difference=1e-6,
        tolerance=float("inf"),
        sqnr_db=float("inf"),
        clean=good,
        clean_drop=drop,
        robust=good,
        robust_drop=drop,
        budget=Budget(),
    )
    return verification_table(shown) | changes


def bundled_model(folder, precision):
    name = f"kit/model.{precision}.onnx"
    return BundledModel(
        file=name,
        sha256=sha256_of((folder / name).read_bytes()),
        variant=precision,
        opset=20,
        input_name="images",
        input_contract="float32 [batch, 3, 8, 8], pixels in [0, 1]",
        calibration_index_sha256="f" * 64 if precision == "int8" else None,
        hop=HopFacts.of(hop()),
        details={"layers": [{"name": "conv1", "is_kept": False}]} if precision == "int8" else {},
    )


def engine_files(model, *, plan, version):
    sidecar = {
        "status": "unverified",
        "engine": {"sha256": sha256_of(plan)},
        "onnx": {"sha256": model.sha256},
        "tensorrt": {"flavour": "tensorrt-rtx", "version": version},
        "machine": {"gpu": None},
        "options": BuildOptions().to_table(),
    }
    return {ENGINE: plan, f"{ENGINE}.json": json.dumps(sidecar).encode()}


def bundled_engine(model, *, plan, version):
    return BundledEngine(
        file=ENGINE,
        sha256=sha256_of(plan),
        sidecar=f"{ENGINE}.json",
        onnx_file=model.file,
        flavour="tensorrt-rtx",
        version=version,
        gpu=None,
        status="unverified",
        hop=None,
    )


def rewrite(folder, change):
    """Change the table of the manifest, as a stranger could."""
    path = folder / "manifest.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def resign(folder, name):
    """Give the manifest the hash that a file has now, as a stranger could."""
    content = (folder / name).read_bytes()
    facts = {"sha256": sha256_of(content), "num_bytes": len(content)}
    rewrite(folder, lambda table: table["files"].update({name: facts}))


def bytes_below(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def copied(bundle, target):
    """A bundle of one's own to spoil."""
    return shutil.copytree(bundle, target)


def verify(folder, monkeypatch, capsys, *options):
    """`robust-compress verify FOLDER`: its exit code, stdout and stderr, lines joined."""
    monkeypatch.setattr(sys, "argv", ["robust-compress", "verify", str(folder), *map(str, options)])
    try:
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    out, err = capsys.readouterr()
    return SimpleNamespace(code=code, out=out, err=err)
