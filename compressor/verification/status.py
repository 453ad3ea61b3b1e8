"""What may be said of a verification: whether it counts, and what it still lacks."""

from collections.abc import Sequence

from compressor.attacks.stages import is_autoattack
from compressor.reports.report import Status, ValidityRow
from compressor.verification.request import Prepared
from compressor.verification.verification import Verification


def status_of(
    prepared: Prepared,
    found: Verification,
    validity: Sequence[ValidityRow],
    ended_because: str,
) -> tuple[Status, str]:
    """The status of a verification, and why.

    Args:
        prepared: what was to be done.
        found: what the attacks found.
        validity: what the checks said.
        ended_because: why, if not all planned images are done.
    """
    alarms = [row.name for row in validity if row.status == "alarm"]
    num_done, num_planned = len(found.samples), found.num_planned
    if alarms:
        return "invalid", f"validity checks raised an alarm: {', '.join(alarms)}"
    twin = prepared.model.twin
    if prepared.model.differentiable is None:
        return "unverified", (
            f"no white-box attack was possible, because {twin.reason if twin else ''}; give the "
            "run it was exported from with --source"
        )
    if all(stage.kind != "white-box" for stage in prepared.stages):
        return "unverified", "no white-box attack was run"
    if twin is not None and twin.module is None:
        through = f"{twin.reason}, so the file was attacked with images made on its source"
        if prepared.model.rounds:
            return "unverified", (
                f"{through}, which flatter, and square finds too little on a file that rounds to "
                "make up for it; export it so that it has a twin, in float32 for example"
            )
        if _lacks_square(prepared):
            return "unverified", (
                f"the protocol is incomplete: {through} alone, which flatter; add square, which "
                "asks the file itself, to --attacks"
            )
    if not found.is_complete:
        return "incomplete", (
            f"{ended_because} after {num_done} of {num_planned} images, a random part of them"
        )
    reason = f"all {num_planned} images went through all attacks, and no check objects"
    return "verified", reason + _reservation(prepared)


def _reservation(prepared: Prepared) -> str:
    """What a verified result still lacks; empty if nothing."""
    twin = prepared.model.twin
    if _lacks_square(prepared):
        return (
            "; but the protocol is incomplete and the bound a loose one, as without Square nobody "
            "asked the file but where the gradients of its twin led"
        )
    if twin is not None and twin.module is None:
        return f"; the file was attacked with images of its source and by Square: {twin.reason}"
    if not is_autoattack([stage.name for stage in prepared.stages]):
        return "; the whole cascade was not among them, so the bound is a loose one"
    return ""


def _lacks_square(prepared: Prepared) -> bool:
    """Whether a file was attacked only along the gradients of something else."""
    is_file = prepared.model.file is not None
    return is_file and all(stage.name != "square" for stage in prepared.stages)
