"""Losses and entropies: pure functions, logits or probabilities in, one value per example out.

N examples, K classes; every value is in nats. The caller reduces, so that the reduction is
visible where it matters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

RATIO_GUARD = 1e-12
"""Added to the denominators of the logit ratios by the authors of AutoAttack."""

LOG_GUARD = 1e-5
"""Added to the teacher's probabilities inside the logarithm by the authors of RSLAD, MTARD and
B-MTARD. It shifts loss values and entropies and has no effect on gradients."""


def cross_entropy(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Cross-entropy on labels, shape [N]."""
    return F.cross_entropy(logits_NK, y_N, reduction="none")


def centred(logits: Tensor) -> Tensor:
    """Logits [..., K] less their mean over the classes: one constant on all changes no answer."""
    return logits - logits.mean(dim=-1, keepdim=True)


def margin(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Largest wrong logit minus the logit of the label, shape [N]; above 0 where fooled.

    Source: Carlini and Wagner, "Towards evaluating the robustness of neural networks",
    IEEE S&P 2017, objective f6 with the sign that an attacker maximises.
    """
    label_N = logits_NK.gather(1, y_N[:, None])[:, 0]
    wrong_NK = logits_NK.scatter(1, y_N[:, None], -torch.inf)
    return wrong_NK.amax(dim=1) - label_N


def dlr(logits_NK: Tensor, y_N: Tensor) -> Tensor:
    """Difference of logits ratio, shape [N]; above 0 where fooled, and blind to logit scale.

    With fewer than three classes the ratio does not exist, and it is the margin.
    Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of
    diverse parameter-free attacks", ICML 2020, equation 6.
    """
    if logits_NK.shape[1] < 3:
        return margin(logits_NK, y_N)
    sorted_NK = logits_NK.topk(3, dim=1).values
    label_N = logits_NK.gather(1, y_N[:, None])[:, 0]
    is_top_N = logits_NK.argmax(dim=1) == y_N
    rival_N = torch.where(is_top_N, sorted_NK[:, 1], sorted_NK[:, 0])
    return -(label_N - rival_N) / (sorted_NK[:, 0] - sorted_NK[:, 2] + RATIO_GUARD)


def targeted_dlr(logits_NK: Tensor, pairs_N2: Tensor) -> Tensor:
    """Targeted difference of logits ratio, shape [N]: rises as the target overtakes the label.

    Args:
        logits_NK: logits.
        pairs_N2: label and target of each example.

    With fewer than four classes it is the plain difference of the two logits.
    Source: as `dlr`, equation 7.
    """
    label_target_N2 = logits_NK.gather(1, pairs_N2)
    gap_N = label_target_N2[:, 1] - label_target_N2[:, 0]
    if logits_NK.shape[1] < 4:
        return gap_N
    top_N4 = logits_NK.topk(4, dim=1).values
    return gap_N / (top_N4[:, 0] - 0.5 * (top_N4[:, 2] + top_N4[:, 3]) + RATIO_GUARD)


def kl_to_probabilities(logits_NK: Tensor, p_NK: Tensor) -> Tensor:
    """KL(p || softmax(logits)), shape [N]; exact, and 0 where p is 0. For constant p."""
    log_q_NK = F.log_softmax(logits_NK, dim=1)
    return (torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK).sum(dim=1)


def kl_divergence(p_logits_NK: Tensor, q_logits_NK: Tensor) -> Tensor:
    """KL(softmax(p_logits) || softmax(q_logits)), shape [N]; its gradient is finite everywhere."""
    log_p_NK = F.log_softmax(p_logits_NK, dim=1)
    log_q_NK = F.log_softmax(q_logits_NK, dim=1)
    return (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(dim=1)


def temper(teacher_logits_NK: Tensor, temperature: float) -> Tensor:
    """Teacher probabilities at a temperature, shape [N, K], without gradient."""
    return F.softmax(teacher_logits_NK.detach() / temperature, dim=1)


def softened_kl(
    teacher_logits_NK: Tensor, student_logits_NK: Tensor, *, temperature: float
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), shape [N]; the teacher is constant.

    Both sides are tempered, and T squared keeps the size of the gradients.
    Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", NIPS
    workshop 2014.
    """
    p_NK = temper(teacher_logits_NK, temperature)
    return temperature**2 * kl_to_probabilities(student_logits_NK / temperature, p_NK)


def guarded_negative_entropy(p_NK: Tensor) -> Tensor:
    """Sum of p log(p + guard), shape [N]: minus the entropy, and slightly above 0 for one-hot p.

    Source: Zhao et al., "Mitigating accuracy-robustness trade-off via balanced multi-teacher
    adversarial distillation", TPAMI 46(12), 2024; as released, where the mean also runs over
    the classes. Only the ratio of two such means is used, so the factor 1/K is left out.
    """
    return (p_NK * torch.log(p_NK + LOG_GUARD)).sum(dim=1)


def guarded_kl(p_NK: Tensor, student_logits_NK: Tensor) -> Tensor:
    """KL(teacher || student) with the authors' guard in the teacher's logarithm, shape [N].

    Only the teacher is tempered (before), and there is no factor T squared. The released code
    averages over examples and classes, which is 1/K of the mean of this over examples.
    Source: as `guarded_negative_entropy`.
    """
    log_q_NK = F.log_softmax(student_logits_NK, dim=1)
    return guarded_negative_entropy(p_NK) - (p_NK * log_q_NK).sum(dim=1)
