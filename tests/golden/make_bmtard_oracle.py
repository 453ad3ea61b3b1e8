"""Twenty steps of B-MTARD in float64, spelt out from the description of the released script.

An oracle for `compressor.methods.bmtard`: it shares with it only the architecture of the tiny
network. Run it to write `bmtard_float64.json` beside it:

    python tests/golden/make_bmtard_oracle.py
"""

import json
import math
from pathlib import Path

import torch

from compressor.architectures.tiny import build_tiny

NUM_STEPS = 20
NUM_IMAGES = 16
NUM_CLASSES = 4
EPSILON = 8 / 255
TEMPERATURE_RATE, WEIGHT_RATE = 0.03, 0.025
LOWEST, HIGHEST = 1.0, 1.35  # low enough to be reached
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 2e-4
DECAY_FROM_STEP, DECAY = 16, 0.1
GUARD = 1e-5


def waves(shape, phase):
    """Numbers in [-1, 1] without pattern, the same with every version of every library."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(12.9898 * count + 78.233 * phase + 0.001 * count * count).view(*shape)


def make_network(phase, *, gain=1.0):
    network = build_tiny(num_classes=NUM_CLASSES, image_shape=(3, 8, 8), width=0.5).double()
    with torch.no_grad():
        for place, parameter in enumerate(network.parameters()):
            wave = waves(parameter.shape, phase + 0.37 * place)
            if parameter.dim() > 1:
                parameter.copy_(gain * wave * math.sqrt(3 / parameter[0].numel()))
            else:
                parameter.copy_(1 + 0.2 * wave if place % 3 == 1 else 0.1 * wave)
        for place, module in enumerate(m for m in network.modules() if hasattr(m, "running_var")):
            module.running_mean.copy_(0.1 * waves(module.running_mean.shape, phase + place))
            module.running_var.copy_(1 + 0.3 * waves(module.running_var.shape, phase - place))
    return network


def make_student():
    return make_network(1.0)


def make_teachers():
    """Robust and clean; the clean one is surer of itself."""
    return make_network(2.0, gain=1.2).eval(), make_network(3.0, gain=1.9).eval()


def make_batch(step):
    """Clean images, labels, and standard normal start noise of the attack."""
    images = 0.5 + 0.5 * waves((NUM_IMAGES, 3, 8, 8), 10.0 + step)
    labels = (torch.arange(NUM_IMAGES) * 7 + step) % NUM_CLASSES
    noise = math.sqrt(2) * waves((NUM_IMAGES, 3, 8, 8), 100.0 + step)
    return images, labels, noise


def attack(student, images, labels, noise, *, num_steps=10, step_size=2 / 255):
    student.eval()
    adversarial = images + 0.001 * noise
    for _ in range(num_steps):
        adversarial = adversarial.detach().requires_grad_()
        loss = torch.nn.CrossEntropyLoss()(student(adversarial), labels)
        slope = torch.autograd.grad(loss, [adversarial])[0]
        adversarial = adversarial.detach() + step_size * torch.sign(slope)
        adversarial = torch.min(torch.max(adversarial, images - EPSILON), images + EPSILON)
        adversarial = torch.clamp(adversarial, 0.0, 1.0)
    student.train()
    return adversarial.detach()


def guarded_divergence(target, logits):
    log_student = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    return (target * (torch.log(target + GUARD) - log_student)).mean()


def soften(logits, temperature):
    exponentials = torch.exp(logits / temperature)
    return exponentials / exponentials.sum(dim=1, keepdim=True)


def move(temperature, own, other, rate):
    ratio = torch.tensor(own / other - 1.0, dtype=torch.float64)
    moved = temperature - rate * float(torch.sign(ratio))
    return min(HIGHEST, max(LOWEST, moved))


def shares(relative_robust, relative_clean):
    """As the script does it: each over their mean, then over the sum of the two."""
    mean = (relative_robust + relative_clean) / 2
    robust, clean = relative_robust / mean, relative_clean / mean
    return robust / (robust + clean), clean / (robust + clean)


def run_oracle(strength_of=lambda step: {}):
    """Rows of numbers, one for each step; `strength_of` it has the settings of its attack."""
    student = make_student()
    robust_teacher, clean_teacher = make_teachers()
    velocity = [torch.zeros_like(p) for p in student.parameters()]
    temperature_robust = temperature_clean = 1.0
    weight_robust = weight_clean = 0.5
    reference_robust = reference_clean = None
    rows = []
    for step in range(NUM_STEPS):
        factor = DECAY if step >= DECAY_FROM_STEP else 1.0
        images, labels, noise = make_batch(step)

        student.train()
        adversarial = attack(student, images, labels, noise, **strength_of(step))
        student_robust = student(adversarial)
        with torch.no_grad():
            target_robust = soften(robust_teacher(adversarial), temperature_robust)
        student_clean = student(images)
        with torch.no_grad():
            target_clean = soften(clean_teacher(images), temperature_clean)

        loss_robust = guarded_divergence(target_robust, student_robust)
        loss_clean = guarded_divergence(target_clean, student_clean)
        value_robust, value_clean = loss_robust.item(), loss_clean.item()

        entropy_robust = (target_robust * torch.log(target_robust + GUARD)).mean().item()
        entropy_clean = (target_clean * torch.log(target_clean + GUARD)).mean().item()
        used = (temperature_robust, temperature_clean)
        temperature_robust, temperature_clean = (
            move(used[0], entropy_robust, entropy_clean, TEMPERATURE_RATE * factor),
            move(used[1], entropy_clean, entropy_robust, TEMPERATURE_RATE * factor),
        )

        if reference_robust is None:
            reference_robust, reference_clean = value_robust, value_clean
        goal_robust, goal_clean = shares(
            value_robust / reference_robust, value_clean / reference_clean
        )
        weight_robust -= WEIGHT_RATE * factor * (weight_robust - goal_robust)
        weight_clean -= WEIGHT_RATE * factor * (weight_clean - goal_clean)
        weight_robust, weight_clean = max(weight_robust, 0.0), max(weight_clean, 0.0)
        factor_of_both = 1.0 / (weight_robust + weight_clean)
        weight_robust, weight_clean = weight_robust * factor_of_both, weight_clean * factor_of_both

        total = weight_robust * loss_robust + weight_clean * loss_clean
        gradients = torch.autograd.grad(total, list(student.parameters()))
        with torch.no_grad():
            for parameter, speed, gradient in zip(
                student.parameters(), velocity, gradients, strict=True
            ):
                speed.mul_(MOMENTUM).add_(gradient + WEIGHT_DECAY * parameter)
                parameter.sub_(LEARNING_RATE * factor * speed)
        rows.append(
            {
                "robust_loss_nats": value_robust,
                "clean_loss_nats": value_clean,
                "loss_nats": total.item(),
                "robust_weight_fraction": weight_robust,
                "clean_weight_fraction": weight_clean,
                "robust_temperature_ratio": used[0],
                "clean_temperature_ratio": used[1],
                "next_robust_temperature": temperature_robust,
                "next_clean_temperature": temperature_clean,
                "sum_of_parameters": sum(float(p.detach().sum()) for p in student.parameters()),
                "sum_of_statistics": sum(
                    float(b.sum()) for b in student.buffers() if b.is_floating_point()
                ),
            }
        )
    return rows


if __name__ == "__main__":
    text = json.dumps({"steps": run_oracle()}, indent=1) + "\n"
    Path(__file__).with_name("bmtard_float64.json").write_text(text, encoding="utf-8")
