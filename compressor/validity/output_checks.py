"""First tier of the validity checks: what goes into the model, and what kind of function it is.

Source of the kinds: the flags of the released AutoAttack (Croce and Hein, ICML 2020), returned
here instead of printed, and without its trace function, which stops debuggers and coverage.

N images, C channels, H and W pixels, K classes.
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compressor.attacks.protocol import Model
from compressor.reports.report import ValidityRow
from compressor.threat import ThreatModel
from compressor.validity.check import Check

NUM_IMAGES = 64
NUM_PASSES = 5
NUM_ALONE = 4
"""Images that are also answered in a batch of one."""
SAME_ANSWER = 1e-4
"""Logits that differ by less, as a share of their spread over the classes, differ by rounding."""
NUDGES = (2.0**-22, 2.0**-21, 2.0**-20)
"""Relative changes of the pixels about as small as float32 can hold."""
LARGEST_JUMP = 0.05
"""Of the spread. Files in 8 bits jump by 1 to 3 % at a last bit; a model that jumps farther has no
more room for what the company of an image does."""
SUM_TOLERANCE = 1e-4
GREY_LEVEL = 1 / 255

INPUT_RANGE = Check(
    name="input_range",
    threshold="alarm outside [0, 1]",
    advice="Epsilon is in units of [0, 1], so it means another thing to this input. Give images in "
    "[0, 1], and do any scaling and normalising inside the model.",
)
EPSILON_UNITS = Check(
    name="epsilon_units",
    threshold="alarm below half a grey level; above 0.5 in linf, above the image's diagonal in l2",
    advice="Epsilon is a fraction of the full scale: eight grey levels are 8/255, not 8. Too small "
    "a value has mostly been divided by 255 twice.",
)
FINITE_OUTPUTS = Check(
    name="finite_outputs",
    threshold="alarm above 0",
    advice="A model that answers not-a-number or infinity is not under attack but broken; its "
    "gradients mislead every attack. Find the layer that overflows.",
)
PROBABILITIES = Check(
    name="probabilities",
    threshold="alarm if every row is in [0, 1] and sums to 1",
    advice="The model ends in a softmax, which flattens the gradients that attacks follow. Remove "
    "it, so that the model gives logits.",
)
LOG_PROBABILITIES = Check(
    name="log_probabilities",
    threshold=f"alarm if log-sum-exp of every row is 0 within {SUM_TOLERANCE:g}",
    advice="The model ends in a log-softmax, which costs digits where it is confident. Remove it, "
    "so that the model gives logits.",
)
DYNAMIC_MODEL = Check(
    name="dynamic_model",
    threshold="alarm if a gradient is taken while predicting",
    advice="The model optimises something at test time; attacks on it as it stands are known to "
    "overestimate. Attack through the optimisation, or verify the model without it.",
)
RANDOM_OUTPUTS = Check(
    name="random_outputs",
    threshold=f"alarm above {SAME_ANSWER:g} of the spread of the logits",
    advice="The same images get another answer each time: dropout or noise is on. Put the model in "
    "evaluation mode; a defence by randomness needs attacks on its average, which are not here.",
)
BATCH_DEPENDENCE = Check(
    name="batch_dependence",
    threshold=f"alarm above {SAME_ANSWER:g} of the spread of the logits, and above twice what the "
    f"last bits of the pixels change, or {LARGEST_JUMP:g}",
    advice="An image is answered differently in other company, mostly by BatchNorm in training "
    "mode. Put the model in evaluation mode.",
)
OUTPUT_CHECKS = (
    INPUT_RANGE,
    EPSILON_UNITS,
    FINITE_OUTPUTS,
    PROBABILITIES,
    LOG_PROBABILITIES,
    DYNAMIC_MODEL,
    RANDOM_OUTPUTS,
    BATCH_DEPENDENCE,
)


def output_checks(model: Model, x_NCHW: Tensor, *, threat: ThreatModel) -> list[ValidityRow]:
    """The rows of `OUTPUT_CHECKS`, from the first images.

    A module is copied first, so that running statistics stay as they are; a plain function
    cannot be copied.
    """
    x = x_NCHW[:NUM_IMAGES]
    if isinstance(model, nn.Module):
        model = copy.deepcopy(model)
    logits_NK, takes_gradient = _watched_answer(model, x)
    rows = [
        _judge_input(x),
        _judge_epsilon(threat, x),
        _judge_finite(logits_NK),
        _judge_probabilities(logits_NK),
        _judge_log_probabilities(logits_NK),
        DYNAMIC_MODEL.judged(
            f"{'a' if takes_gradient else 'no'} gradient was taken in a pass of {len(x)} images",
            is_alarm=takes_gradient,
        ),
    ]
    # Optimising at test time may itself be random, and randomness changes with the batch.
    rows.append(_unless(rows[-1], RANDOM_OUTPUTS) or _judge_repeated(model, x, logits_NK))
    rows.append(_unless(rows[-1], BATCH_DEPENDENCE) or _judge_company(model, x, logits_NK))
    return rows


def _unless(cause: ValidityRow, check: Check) -> ValidityRow | None:
    if cause.status == "passed":
        return None
    explained = f"explained by {cause.name}" if cause.status == "alarm" else cause.advice
    return check.not_run(explained)


def _judge_input(x_NCHW: Tensor) -> ValidityRow:
    low, high = float(x_NCHW.min()), float(x_NCHW.max())
    kind = ""
    if not bool(x_NCHW.isfinite().all()):
        kind = ", some not finite"
    elif high > 8:
        kind = ", as of 8-bit images"
    elif low < 0:
        kind = ", as of normalised images"
    return INPUT_RANGE.judged(
        f"pixels from {low:.4g} to {high:.4g}{kind} in {len(x_NCHW)} images",
        is_alarm=not (low >= 0 and high <= 1),  # not-a-number is not inside
    )


def _judge_epsilon(threat: ThreatModel, x_NCHW: Tensor) -> ValidityRow:
    largest = 0.5 if threat.norm == "linf" else math.sqrt(x_NCHW[0].numel())
    is_plausible = GREY_LEVEL / 2 <= threat.epsilon_pixels <= largest
    return EPSILON_UNITS.judged(
        f"{threat}, that is {threat.epsilon_pixels / GREY_LEVEL:.4g} grey levels",
        is_alarm=not is_plausible,
    )


def _judge_finite(logits_NK: Tensor) -> ValidityRow:
    num_bad = int((~_finite_rows(logits_NK)).sum())
    return FINITE_OUTPUTS.judged(
        f"{num_bad} of {len(logits_NK)} images have an answer that is not finite",
        is_alarm=num_bad > 0,
    )


def _judge_probabilities(logits_NK: Tensor) -> ValidityRow:
    rows_MK = logits_NK[_finite_rows(logits_NK)]
    in_range_M = (rows_MK >= -SUM_TOLERANCE).all(dim=1) & (rows_MK <= 1 + SUM_TOLERANCE).all(dim=1)
    is_like_M = in_range_M & ((rows_MK.sum(dim=1) - 1).abs() <= SUM_TOLERANCE)
    return PROBABILITIES.judged(
        f"{int(is_like_M.sum())} of {len(rows_MK)} rows are probabilities",
        is_alarm=len(rows_MK) > 0 and bool(is_like_M.all()),
    )


def _judge_log_probabilities(logits_NK: Tensor) -> ValidityRow:
    rows_MK = logits_NK[_finite_rows(logits_NK)]
    is_like_M = rows_MK.logsumexp(dim=1).abs() <= SUM_TOLERANCE
    return LOG_PROBABILITIES.judged(
        f"{int(is_like_M.sum())} of {len(rows_MK)} rows are logarithms of probabilities",
        is_alarm=len(rows_MK) > 0 and bool(is_like_M.all()),
    )


def _judge_repeated(model: Model, x_NCHW: Tensor, logits_NK: Tensor) -> ValidityRow:
    again = [_answer(model, x_NCHW) for _ in range(NUM_PASSES - 1)]
    worst = max(_difference(logits_NK, other) for other in again)
    return RANDOM_OUTPUTS.judged(
        f"{NUM_PASSES} passes of {len(x_NCHW)} images differ by up to {worst:.2g} of the spread",
        is_alarm=worst > SAME_ANSWER,
    )


def _judge_company(model: Model, x_NCHW: Tensor, logits_NK: Tensor) -> ValidityRow:
    num_images = len(x_NCHW)
    if num_images < 2:
        return BATCH_DEPENDENCE.not_run("two images are needed")
    halves = torch.cat([_answer(model, half) for half in x_NCHW.tensor_split(2)])
    try:
        alone = torch.cat([_answer(model, x) for x in torch.split(x_NCHW[:NUM_ALONE], 1)])
    except (RuntimeError, ValueError) as error:  # BatchNorm in training mode may refuse one image
        return BATCH_DEPENDENCE.judged(f"one image alone is refused: {error}", is_alarm=True)
    worst = max(_difference(logits_NK, halves), _difference(logits_NK[: len(alone)], alone))
    found = f"{num_images} images in halves and {len(alone)} alone differ by up to {worst:.2g} of "
    if worst <= SAME_ANSWER:
        return BATCH_DEPENDENCE.judged(f"{found}the spread", is_alarm=False)
    # A batch of another size is summed in another order. A model that rounds what it has summed
    # makes a jump of that last bit, and then makes such jumps of a last bit of the pixels; twice
    # their largest, since both are the largest of a few images.
    jump = max(_difference(logits_NK, _answer(model, x_NCHW * (1 - nudge))) for nudge in NUDGES)
    return BATCH_DEPENDENCE.judged(
        f"{found}the spread, and the last bits of the pixels change them by up to {jump:.2g}",
        is_alarm=worst > min(2 * jump, LARGEST_JUMP),
    )


def _finite_rows(logits_NK: Tensor) -> Tensor:
    return logits_NK.isfinite().all(dim=1)


def _difference(logits_NK: Tensor, other_NK: Tensor) -> float:
    """Largest change of a logit, over the median spread of a row; two of the same oddity agree."""
    finite_MK = logits_NK[_finite_rows(logits_NK)]
    spread_M = finite_MK.amax(dim=1) - finite_MK.amin(dim=1)
    spread = float(spread_M.median()) if len(spread_M) else 0.0
    is_same_NK = (logits_NK == other_NK) | (logits_NK.isnan() & other_NK.isnan())
    change_NK = (logits_NK - other_NK).abs().nan_to_num(nan=math.inf)
    largest = float(change_NK.masked_fill(is_same_NK, 0).max())
    return largest / spread if spread else (math.inf if largest else 0.0)


def _answer(model: Model, x_NCHW: Tensor) -> Tensor:
    """Logits as an attack gets them: a model may behave differently where gradients are off."""
    with torch.enable_grad():
        return model(x_NCHW).detach()


def _watched_answer(model: Model, x_NCHW: Tensor) -> tuple[Tensor, bool]:
    with _GradientWatch() as watch:
        logits_NK = _answer(model, x_NCHW)
    return logits_NK, watch.has_seen


class _GradientWatch(TorchFunctionMode):
    """Notices that a gradient is taken, in this thread and inside the `with` only."""

    def __init__(self) -> None:
        super().__init__()
        self.has_seen = False

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        del types
        self.has_seen |= func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
        return func(*args, **(kwargs or {}))
