"""verify_network: attacks x test images -> counts. Always float32, eval mode, un-augmented."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.attacks.protocol import Attack
from compressor.data import TestSplit, evaluation_batches
from compressor.errors import InvalidEvaluationError
from compressor.folding import EvaluationView
from compressor.networks import evaluation_mode
from compressor.performance import Performance
from compressor.proportions import Proportion


@dataclass(frozen=True, kw_only=True)
class VerificationProgress:
    """How far verification has come."""

    attack: str
    num_images: int
    num_done: int
    num_correct: int


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """Accuracy under one attack."""

    accuracy: Proportion
    duration_seconds: float


@dataclass(frozen=True, kw_only=True)
class VerificationResult:
    """Counts over the test images."""

    clean: Proportion
    attacks: Mapping[str, AttackResult]
    worst_case: Proportion
    """Images that are correct clean and under every attack."""


def verify_network(
    network: nn.Module,
    attacks: Mapping[str, Attack],
    split: TestSplit,
    *,
    performance: Performance,
    batch_size: int = 256,
    observe: Callable[[VerificationProgress], None] = lambda _: None,
) -> VerificationResult:
    """Accuracy clean, under each attack, and under the worst of them image by image.

    The attacks search on the network with BatchNorm folded, the same function in eval mode;
    whether an image is fooled is decided by the network itself, in float32. A point outside the
    threat model never counts.

    Raises:
        InvalidEvaluationError: if an attack left its threat model.
    """
    exact = Performance(device=performance.device)
    network = exact.place_network(network)
    view = EvaluationView(network, exact)
    results: dict[str, AttackResult] = {}
    with evaluation_mode(network):
        clean_N = _survivors(network, None, split, batch_size=batch_size, view=view)
        worst_N = clean_N.clone()
        for name, attack in attacks.items():
            started_at_seconds = time.perf_counter()
            report = _reporter(observe, name, split.num_images)
            flags_N = _survivors(
                network, attack, split, batch_size=batch_size, view=view, report=report
            )
            accuracy = _count(flags_N)
            worst_N &= flags_N
            results[name] = AttackResult(
                accuracy=accuracy, duration_seconds=time.perf_counter() - started_at_seconds
            )
    return VerificationResult(clean=_count(clean_N), attacks=results, worst_case=_count(worst_N))


def _survivors(
    network: nn.Module,
    attack: Attack | None,
    split: TestSplit,
    *,
    batch_size: int,
    view: EvaluationView,
    report: Callable[[Tensor], None] = lambda _: None,
) -> Tensor:
    """Whether each image is answered correctly, bool [N]; under `attack` if there is one."""
    flags = []
    for batch in evaluation_batches(split, batch_size=batch_size):
        x = batch.x_NCHW
        if attack is not None:
            x = attack(view, x, batch.y_N, keys_N=batch.keys_N)
            _refuse_outside(x, batch.x_NCHW, attack)
        with torch.no_grad():
            logits_NK = network(x)
        is_answer_N = logits_NK.amax(dim=1).isfinite()  # not-a-number is never right
        flags.append((logits_NK.argmax(dim=1) == batch.y_N) & is_answer_N)
        report(flags[-1])
    return torch.cat(flags)


def _refuse_outside(x_adv_NCHW: Tensor, x_NCHW: Tensor, attack: Attack) -> None:
    slack = 1e-6  # float32 rounding of x + epsilon
    extremes = torch.stack([(x_adv_NCHW - x_NCHW).abs().amax(), *x_adv_NCHW.aminmax()])
    distance, low, high = extremes.tolist()
    is_inside = distance <= attack.threat.epsilon_pixels + slack and low >= 0 and high <= 1
    if not is_inside:  # not-a-number is not inside
        raise InvalidEvaluationError(
            f"{attack} left its threat model: distance {distance:.6f}, pixels {low} to {high}; "
            "no number was written. Please report it"
        )


def _reporter(
    observe: Callable[[VerificationProgress], None], name: str, num_images: int
) -> Callable[[Tensor], None]:
    done, correct = 0, 0

    def report(flags_N: Tensor) -> None:
        nonlocal done, correct
        done += len(flags_N)
        correct += int(flags_N.sum())
        observe(
            VerificationProgress(
                attack=name, num_images=num_images, num_done=done, num_correct=correct
            )
        )

    return report


def _count(flags_N: Tensor) -> Proportion:
    return Proportion(num_correct=int(flags_N.sum()), num_total=len(flags_N))
