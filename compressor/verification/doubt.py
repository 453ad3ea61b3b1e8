"""From a verification to the claim that its validity checks doubt."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from compressor.attacks.gradients import in_parts
from compressor.attacks.protocol import Model
from compressor.attacks.stages import Stage
from compressor.data import Batch, evaluation_batches
from compressor.reports.report import ArtefactFacts, ValidityRow
from compressor.validity.active_test import ACTIVE_TEST, penultimate_features
from compressor.validity.attack_checks import ATTACK_CHECKS
from compressor.validity.claim import Claim
from compressor.validity.image_checks import repeated_images
from compressor.validity.output_checks import output_checks
from compressor.validity.validity import NUM_IMAGES, check_validity
from compressor.verification.artefact import NUM_COMPARED_IMAGES, describe_artefact
from compressor.verification.cascade import Subject
from compressor.verification.gallery import first_images
from compressor.verification.request import Prepared
from compressor.verification.samples import Sample
from compressor.verification.verification import Verification, verification_order

_STRONGEST = "apgd_t"
_NOT_RUN = f"the attacks that were run do not include {_STRONGEST}, so there is no claim to doubt"


def check_verification(
    prepared: Prepared, subject: Subject, found: Verification
) -> tuple[ValidityRow, ...]:
    """Whether images repeat, and the checks of `compressor.validity.validity` on the first ones.

    For a file, the questions about the function are asked of the file, and those about gradients
    and attacks of its twin or source, on which the attacks searched.
    """
    batch = first_images(
        prepared.split, prepared.plan, num_images=min(NUM_IMAGES, len(found.samples))
    )
    samples = found.samples[: len(batch.y_N)]
    by_name = {stage.name: stage for stage in prepared.stages}
    stage = by_name.get(_STRONGEST, prepared.stages[-1])
    is_whole = _STRONGEST in by_name
    by_transfer_N = _broken(samples, prepared.stages, kind="transfer", device=batch.y_N)
    by_white_box_N = _broken(samples, prepared.stages, kind="white-box", device=batch.y_N)
    is_late = _transfer_is_late(prepared.stages)
    model = prepared.model
    claim = Claim(
        model=subject.float32,
        x_NCHW=batch.x_NCHW,
        y_N=batch.y_N,
        keys_N=batch.keys_N,
        threat=prepared.threat,
        attack=stage.search,
        num_steps=int(stage.parameters.get("num_steps", 1)),
        broken_by_white_box_N=by_white_box_N if is_whole else None,
        tried_by_white_box_N=None if is_late else by_white_box_N | ~by_transfer_N,
        broken_by_transfer_N=by_transfer_N if is_late else None,
        broken_by_square_N=_broken(samples, prepared.stages, kind="black-box", device=batch.y_N)
        if "square" in by_name
        else None,
        teachers=_differentiable(prepared),
        features=_features(prepared, batch) if is_whole else None,
        file=None if model.file is None else subject.answer,
        is_twin=model.twin is not None and model.twin.module is not None,
    )
    rows = check_validity(claim)
    repeats = repeated_images(_images(prepared, num_images=len(found.samples)))
    if model.file is not None:
        of_file = output_checks(subject.answer, batch.x_NCHW, threat=prepared.threat)
        rows = (*map(_worse, of_file, rows), *rows[len(of_file) :])
    if not is_whole:
        unasked = {check.name: check for check in (*ATTACK_CHECKS, ACTIVE_TEST)}
        rows = tuple(
            unasked[row.name].not_run(_NOT_RUN) if row.name in unasked else row for row in rows
        )
    return repeats, *rows


def artefact_facts(
    prepared: Prepared, found: Verification, validity: Sequence[ValidityRow]
) -> ArtefactFacts | None:
    """How a file was attacked, and what the checks say of its gradients; None for a network."""
    model = prepared.model
    if model.twin is None:
        return None
    batch = first_images(
        prepared.split, prepared.plan, num_images=min(NUM_COMPARED_IMAGES, len(found.samples))
    )
    samples = found.samples[: len(batch.y_N)]
    stands_N = None
    if any(stage.kind == "transfer" for stage in prepared.stages):
        stands = [not s.fooled_by.get("transfer", True) for s in samples]
        stands_N = torch.tensor(stands, device=batch.y_N.device)
    source = model.network
    return describe_artefact(
        model.twin,
        None if source is None else in_parts(source, max_rows=prepared.max_rows),
        batch,
        threat=prepared.threat,
        stands_transfer_N=stands_N,
        validity=validity,
    )


def _transfer_is_late(stages: Sequence[Stage]) -> bool:
    """Whether transferred images were tried after all attacks with gradients had ended."""
    kinds = [stage.kind for stage in stages if stage.kind != "black-box"]
    return "white-box" in kinds and kinds.count("transfer") == 1 and kinds[-1] == "transfer"


def _images(prepared: Prepared, *, num_images: int) -> Iterator[Tensor]:
    """Those that were attacked, batch by batch."""
    split, plan = prepared.split, prepared.plan
    order_N = verification_order(split, seed=plan.seed)[:num_images]
    for batch in evaluation_batches(split, batch_size=plan.batch_size, order_N=order_N):
        yield batch.x_NCHW


def _worse(of_file: ValidityRow, of_source: ValidityRow) -> ValidityRow:
    """The file's answer, unless only the source raises an alarm."""
    is_alarm_of_source = of_source.status == "alarm" and of_file.status != "alarm"
    return of_source if is_alarm_of_source else of_file


def _features(prepared: Prepared, batch: Batch) -> Model | None:
    network = prepared.model.network
    features = None if network is None else penultimate_features(network, batch.x_NCHW)
    return features and in_parts(features, max_rows=prepared.max_rows)


def _broken(
    samples: Sequence[Sample], stages: Sequence[Stage], *, kind: str, device: Tensor
) -> Tensor:
    """Whether any attack of this kind fooled each image, bool [N]."""
    names = [stage.name for stage in stages if stage.kind == kind]
    flags = [any(s.fooled_by.get(name, False) for name in names) for s in samples]
    return torch.tensor(flags, dtype=torch.bool, device=device.device)


def _differentiable(prepared: Prepared) -> Mapping[str, Model]:
    models: dict[str, Model] = {}
    for teacher in prepared.teachers:
        if teacher.network is not None:
            model = in_parts(teacher.network, max_rows=prepared.max_rows)
            models[f"{teacher.role} {teacher.name}"] = model
    return models
