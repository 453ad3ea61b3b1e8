"""What an exported file is attacked through, and whether it hides its gradients.

A file answers, but has no gradient. Its differentiable twin, rebuilt from the numbers in the file,
has one, and is used once it is shown to answer alike. Images that fool the network it came from are
tried as well; alone they would flatter, because rounding shields a little from what was made
without it.

N images, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.attacks.apgd import APGD
from compressor.attacks.draws import KeyedDraws
from compressor.attacks.protocol import Model
from compressor.data import Batch, TestSplit, evaluation_batches
from compressor.file_model import FileModel
from compressor.gate.paired import p_value_of_drop
from compressor.losses import dlr
from compressor.onnx_graph import NoPlainGraphError, read_graph
from compressor.onnx_twin import OnnxTwin, differentiable_twin
from compressor.proportions import Proportion
from compressor.reports.report import ArtefactFacts, Count
from compressor.threat import ThreatModel

NUM_COMPARED_IMAGES = 250
_NUM_AT_ONCE = 50
"""More large images would not fit into memory."""
MIN_TWIN_AGREEMENT = 0.95
"""Share of images on which the twin gives the label of its file."""
MAX_TWIN_ERROR = 0.1
"""Root mean square of the twin's error, as a share of that of the file's logits. ONNX Runtime also
rounds the biases of an int8 file, by itself, so that some steps fall the other way: that costs
0.02."""
SAME_FUNCTION = 1e-3
"""Largest difference of logits, as a share of the largest, between a file that rounds nothing and
its source."""
_MASKED_P_VALUE = 0.01
_MASKED_FRACTION = 0.01
"""By so much a file must look better under transferred images alone to be called masked."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Twin:
    """The differentiable form of a file, or why there is none."""

    module: OnnxTwin | None = field(repr=False)
    agreement: Proportion | None
    reason: str
    """In words, for the report."""


def compared_images(split: TestSplit) -> Sequence[Batch]:
    """Images spread over the split, as folders have one class after the other."""
    num_compared = min(NUM_COMPARED_IMAGES, split.num_images)
    places_N = torch.arange(num_compared, device=split.index_N.device)
    order_N = places_N * split.num_images // num_compared
    return list(evaluation_batches(split, batch_size=_NUM_AT_ONCE, order_N=order_N))


@torch.no_grad()
def checked_twin(file: FileModel, images: Sequence[Batch]) -> Twin:
    """The twin of a file, if it answers as the file does."""
    file_NK = torch.cat([file(batch.x_NCHW.cpu()) for batch in images])
    try:
        graph = read_graph(file.content, file.path)
        twin = differentiable_twin(graph, takes_bytes=file.takes_bytes).eval()
        twin_NK = torch.cat([twin(batch.x_NCHW.cpu()) for batch in images])
    except NoPlainGraphError as error:
        return _no_twin(str(error))
    except Exception as error:  # noqa: BLE001 (a foreign file can make any operator fail)
        return _no_twin(type(error).__name__)
    if twin_NK.shape != file_NK.shape:
        return _no_twin(f"it would give {tuple(twin_NK.shape)}")
    is_same_N = torch.eq(file_NK.argmax(dim=1), twin_NK.argmax(dim=1))
    same = Proportion(num_correct=int(is_same_N.sum()), num_total=len(is_same_N))
    error_fraction = float((file_NK - twin_NK).norm() / file_NK.norm().clamp(min=1e-12))
    reason = (
        f"its differentiable twin gives its label on {same} test images, and its logits to within "
        f"{100 * error_fraction:.2g} %"
    )
    if same.fraction < MIN_TWIN_AGREEMENT or not error_fraction <= MAX_TWIN_ERROR:
        return Twin(module=None, agreement=same, reason=f"{reason}: too far to attack through it")
    return Twin(module=twin, agreement=same, reason=reason)


def _no_twin(why: str) -> Twin:
    return Twin(module=None, agreement=None, reason=f"it has no differentiable twin ({why})")


@torch.no_grad()
def rounds(file: FileModel, network: Model, images: Sequence[Batch]) -> bool:
    """Whether a file is more than its source written down, so that transfer is worth a try."""
    for batch in images:
        file_NK, source_NK = file(batch.x_NCHW.cpu()), network(batch.x_NCHW.cpu())
        allowed = SAME_FUNCTION * float(source_NK.abs().max())
        if not float((file_NK - source_NK).abs().max()) <= allowed:  # so that NaN differs
            return True
    return False


def describe_artefact(
    twin: Twin,
    source: Model | None,
    batch: Batch,
    *,
    threat: ThreatModel,
    stands_transfer_N: Tensor | None,
) -> ArtefactFacts:
    """How the file was attacked, and whether transferred images alone would have flattered.

    Args:
        twin: of the file.
        source: the network it came from, which is attacked here by itself.
        batch: the first images of the verification.
        threat: what the attacker may do.
        stands_transfer_N: whether the file withstands images made on its source, bool [N]; None
            if that was not tried.
    """
    if source is None or stands_transfer_N is None:
        return ArtefactFacts(
            attacked_through="twin" if twin.module is not None else "source",
            twin=twin.reason,
            transfer=None,
            source=None,
            gradients_are_masked=False,
            masking="not asked: no images were made on a source",
        )
    stands_source_N = _stands(source, batch, threat=threat)
    better = int((stands_transfer_N & ~stands_source_N).sum())
    worse = int((~stands_transfer_N & stands_source_N).sum())
    p_value = p_value_of_drop(num_broken=better, num_fixed=worse)
    gain = (better - worse) / len(stands_source_N)
    is_masked = p_value < _MASKED_P_VALUE and gain > _MASKED_FRACTION
    verdict = "gradients are masked" if is_masked else "no sign of masked gradients"
    return ArtefactFacts(
        attacked_through="twin" if twin.module is not None else "source",
        twin=twin.reason,
        transfer=_count(stands_transfer_N),
        source=_count(stands_source_N),
        gradients_are_masked=is_masked,
        masking=f"{verdict}: {better} images fool only the source they were made on, {worse} only "
        f"the file, of {len(stands_source_N)} (p = {p_value:.2g})",
    )


def _stands(source: Model, batch: Batch, *, threat: ThreatModel) -> Tensor:
    """Whether the source itself withstands what `transfer` makes on it, bool [N]."""
    attack = APGD(threat=threat, objective=dlr)
    draws = KeyedDraws(keys_N=batch.keys_N)
    found = attack.search(source, batch.x_NCHW, batch.y_N, draws=draws)
    with torch.no_grad():
        clean_N = torch.eq(source(batch.x_NCHW).argmax(dim=1), batch.y_N)
        return clean_N & torch.eq(source(found.x_adv_NCHW).argmax(dim=1), batch.y_N)


def _count(flags_N: Tensor) -> Count:
    return Count.of(Proportion(num_correct=int(flags_N.sum()), num_total=len(flags_N)))
