"""What an exported file is attacked through, and whether it hides its gradients.

A file answers, but has no gradient. Its differentiable twin, rebuilt from the numbers in the file,
has one, and is used once it is shown to answer alike. Images that fool the network it came from are
tried as well; alone they would flatter, because rounding shields a little from what was made
without it. That is another matter than masked gradients: these are where attacks without the
gradients of the twin break more than those with them.

N images, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from compressor.attacks.apgd import APGD
from compressor.attacks.draws import KeyedDraws
from compressor.attacks.protocol import Model
from compressor.data import Batch, TestSplit, evaluation_batches
from compressor.file_model import FileModel
from compressor.gate.paired import p_value_of_drop
from compressor.losses import centred, dlr
from compressor.onnx_graph import NoPlainGraphError, read_graph
from compressor.onnx_twin import OnnxTwin, differentiable_twin
from compressor.out_of_memory import is_out_of_memory
from compressor.proportions import Proportion
from compressor.randomness import child_keys
from compressor.reports.report import ArtefactFacts, Count, ValidityRow
from compressor.sample_order import representative_order
from compressor.threat import DEFAULT_THREAT, ThreatModel
from compressor.validity.attack_checks import BLACK_BOX, TRANSFER
from compressor.validity.claim import Purpose
from compressor.validity.origins import inner_points

NUM_COMPARED_IMAGES = 250
_NUM_AT_ONCE = 50
"""More large images would not fit into memory."""
MIN_TWIN_AGREEMENT = 0.95
"""Share of images on which the twin gives the label of its file."""
MAX_TWIN_ERROR = 0.05
"""Root mean square of the twin's error, as a share of that of the file's logits around their mean
over the classes, or a large number added to all would hide any error. ONNX Runtime also rounds the
biases of an int8 file, by itself, so that some steps fall the other way: that costs 0.02."""
SAME_FUNCTION = 1e-3
"""Largest difference of logits, as a share of the largest, between a file that rounds nothing and
its source."""
_FLATTERS_P_VALUE = 0.01
_FLATTERS_FRACTION = 0.01
"""By so much a file must look better than its source under images made on that."""
_WITHOUT_GRADIENTS: Mapping[str, str] = MappingProxyType(
    {BLACK_BOX.name: "Square", TRANSFER.name: "transferred images"}
)
"""By the check that compares them with the attacks that follow gradients."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Twin:
    """The differentiable form of a file, or why there is none."""

    module: OnnxTwin | None = field(repr=False)
    agreement: Proportion | None
    reason: str
    """In words, for the report."""


def compared_images(split: TestSplit) -> Sequence[Batch]:
    """Images that are like the whole split, whose classes may follow each other or take turns."""
    order_N = representative_order(split.labels_N, split.index_N)[:NUM_COMPARED_IMAGES]
    return list(evaluation_batches(split, batch_size=_NUM_AT_ONCE, order_N=order_N))


@torch.no_grad()
def checked_twin(
    file: FileModel, images: Sequence[Batch], *, threat: ThreatModel = DEFAULT_THREAT
) -> Twin:
    """The twin of a file, if it answers as the file does, on these images and with noise on them.

    Clean images have whole grey levels, which a file can tell from those that attacks ask about.
    """
    clean = [batch.x_NCHW.cpu() for batch in images]
    noised = [_noised(batch, threat) for batch in images]
    file_NK, of_noised_NK = (torch.cat([file(x_NCHW) for x_NCHW in xs]) for xs in (clean, noised))
    try:
        graph = read_graph(file.content, file.path)
        twin = differentiable_twin(graph, takes_bytes=file.takes_bytes).eval()
        alike = _alike(twin, clean, file_NK)
        alike_noised = _alike(twin, noised, of_noised_NK)
    except NoPlainGraphError as error:
        return _no_twin(str(error))
    except Exception as error:
        if is_out_of_memory(error):
            raise  # of this machine and not of the file, which may have a twin elsewhere
        # A foreign file can make any operator fail.
        return _no_twin(type(error).__name__)
    reason = (
        f"its differentiable twin gives its label on {alike.same} test images, and its logits to "
        f"within {100 * alike.error_fraction:.2g} %; with noise of {threat} on them, on "
        f"{alike_noised.same}, to within {100 * alike_noised.error_fraction:.2g} %"
    )
    if not (alike.is_close and alike_noised.is_close):
        reason = f"{reason}: too far to attack through it"
        return Twin(module=None, agreement=alike.same, reason=reason)
    return Twin(module=twin, agreement=alike.same, reason=reason)


@dataclass(frozen=True, kw_only=True)
class _Alike:
    """How much two functions agree."""

    same: Proportion
    error_fraction: float

    @property
    def is_close(self) -> bool:
        is_near = self.error_fraction <= MAX_TWIN_ERROR  # not if it is not-a-number
        return is_near and self.same.fraction >= MIN_TWIN_AGREEMENT


def _alike(twin: Model, xs: Sequence[Tensor], file_NK: Tensor) -> _Alike:
    twin_NK = torch.cat([twin(x_NCHW) for x_NCHW in xs])
    if twin_NK.shape != file_NK.shape:
        raise NoPlainGraphError(f"it would give {tuple(twin_NK.shape)}")
    is_same_N = torch.eq(file_NK.argmax(dim=1), twin_NK.argmax(dim=1))
    spread = centred(file_NK).norm()
    return _Alike(
        same=Proportion(num_correct=int(is_same_N.sum()), num_total=len(is_same_N)),
        error_fraction=float((file_NK - twin_NK).norm() / spread.clamp(min=1e-12)),
    )


def _noised(batch: Batch, threat: ThreatModel) -> Tensor:
    keys_N = child_keys(batch.keys_N.cpu(), Purpose.TWIN_NOISE)
    return inner_points(batch.x_NCHW.cpu(), threat, KeyedDraws(keys_N=keys_N))


def _no_twin(why: str) -> Twin:
    return Twin(module=None, agreement=None, reason=f"it has no differentiable twin ({why})")


@torch.no_grad()
def rounds(file: FileModel, network: Model, images: Sequence[Batch]) -> bool:
    """Whether a file is more than its source written down, so that transfer is worth a try."""
    for batch in images:
        # about their means: one constant on all classes would hide what rounding does
        file_NK, source_NK = (centred(ask(batch.x_NCHW.cpu())) for ask in (file, network))
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
    validity: Sequence[ValidityRow],
) -> ArtefactFacts:
    """How the file was attacked, whether it hides gradients, and whether transfer would flatter.

    Args:
        twin: of the file.
        source: the network it came from, which is attacked here by itself.
        batch: the first images of the verification.
        threat: what the attacker may do.
        stands_transfer_N: whether the file withstands images made on its source, bool [N]; None
            if that was not tried.
        validity: the checks of the verification; what they say of hidden gradients is repeated.
    """
    is_masked, masking = _masking(validity)
    facts = ArtefactFacts(
        attacked_through="twin" if twin.module is not None else "source",
        twin=twin.reason,
        transfer=None,
        source=None,
        gradients_are_masked=is_masked,
        masking=f"{masking}; no images were made on a source",
    )
    if source is None or stands_transfer_N is None:
        return facts
    stands_source_N = _stands(source, batch, threat=threat)
    flatters, flattery = _flattery(stands_transfer_N, stands_source_N)
    counts = {"transfer": _count(stands_transfer_N), "source": _count(stands_source_N)}
    told = {"transfer_flatters": flatters, "masking": f"{masking}; {flattery}"}
    return facts.model_copy(update=counts | told)


def _masking(validity: Sequence[ValidityRow]) -> tuple[bool, str]:
    """Whether attacks without the gradients of the file beat those with them; and in words."""
    rows = [row for row in validity if row.name in _WITHOUT_GRADIENTS]
    alarms = [row for row in rows if row.status == "alarm"]
    if alarms:
        found = "; ".join(
            f"{_WITHOUT_GRADIENTS[row.name]} alone broke {row.found}" for row in alarms
        )
        return True, f"gradients are masked: {found} against attacks with gradients"
    asked = [_WITHOUT_GRADIENTS[row.name] for row in rows if row.status == "passed"]
    if not asked:
        return False, "whether gradients are masked was not asked"
    return False, (
        f"no sign of masked gradients: {' and '.join(asked)} broke no more than chance of what "
        "stood against attacks with gradients"
    )


def _flattery(stands_transfer_N: Tensor, stands_source_N: Tensor) -> tuple[bool, str]:
    """Whether a file looks better than its source under images made on that; and in words."""
    better = int((stands_transfer_N & ~stands_source_N).sum())
    worse = int((~stands_transfer_N & stands_source_N).sum())
    num_images = len(stands_source_N)
    p_value = p_value_of_drop(num_broken=better, num_fixed=worse)
    gain = (better - worse) / num_images
    counts = (
        f"{better} images fool only the source they were made on, {worse} only the file, of "
        f"{num_images} (p = {p_value:.2g})"
    )
    if p_value < _FLATTERS_P_VALUE and gain > _FLATTERS_FRACTION:
        return True, (
            "to images made on its source its gradients are masked, or it is another function by "
            f"now: transfer alone would flatter by {100 * gain:.1f} points: {counts}"
        )
    return False, f"transfer alone would not flatter: {counts}"


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
