"""MTARD and CIARD in plain numpy float64, written from their formulas, for a linear student.

It shares no code with `compressor`. Images are rows of D pixels; a linear network is a pair of
weights [K, D] and biases [K]; the robust teacher normalises its pixels first, as BatchNorm does.
"""

import math

import numpy as np

N, D, K = 6, 4, 3
GUARD = 1e-5
RATE = 0.5


def waves(shape, phase):
    count = np.arange(math.prod(shape), dtype=np.float64)
    return np.sin(12.9898 * count + 78.233 * phase + 0.001 * count * count).reshape(shape)


def linear(phase, gain):
    return gain * waves((K, D), phase), 0.3 * waves((K,), phase + 0.5)


STUDENT, CLEAN = linear(1.0, 0.7), linear(2.0, 6.0)
ROBUST, SECOND_ROBUST = linear(3.0, 1.5), linear(4.0, 2.5)
NORM = {
    "gamma": 1 + 0.2 * waves((D,), 5.0),
    "beta": 0.1 * waves((D,), 6.0),
    "mean": 0.5 + 0.1 * waves((D,), 7.0),
    "variance": 0.08 + 0.02 * waves((D,), 8.0),
}


def batch(step):
    """Clean pixels, adversarial pixels and labels."""
    pixels = 0.5 + 0.4 * waves((N, D), 10.0 + step)
    adversarial = np.clip(pixels + 0.1 * np.sign(waves((N, D), 20.0 + step)), 0, 1)
    return pixels, adversarial, (np.arange(N) * 2 + step) % K


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def answer(network, pixels):
    return pixels @ network[0].T + network[1]


def divergence(target, logits):
    """Per example, with the guard in the logarithm of the target."""
    return (target * (np.log(target + GUARD) - np.log(softmax(logits)))).sum(axis=1)


def entropy_like(target):
    return (target * np.log(target + GUARD)).sum(axis=1).mean()


def descend(network, slopes):
    return tuple(values - RATE * slope for values, slope in zip(network, slopes, strict=True))


def mtard(num_steps, *, scale, weight_rate, exponent):
    """One teacher of each role, in the form of the ECCV script: the robust weight is 1 - w."""
    student, clean_weight, first, rows = STUDENT, 0.5, None, []
    for step in range(num_steps):
        pixels, adversarial, _ = batch(step)
        robust_target = softmax(answer(ROBUST, adversarial))
        clean_target = softmax(answer(CLEAN, pixels))
        robust_logits, clean_logits = answer(student, adversarial), answer(student, pixels)
        robust_loss = scale * divergence(robust_target, robust_logits).mean()
        clean_loss = scale * divergence(clean_target, clean_logits).mean()
        first = first or (robust_loss, clean_loss)
        robust_part = (robust_loss / first[0]) ** exponent
        clean_part = (clean_loss / first[1]) ** exponent
        goal = clean_part / (robust_part + clean_part)
        clean_weight = clean_weight - weight_rate * (clean_weight - goal)
        robust_slope = (1 - clean_weight) * scale / N * (softmax(robust_logits) - robust_target)
        clean_slope = clean_weight * scale / N * (softmax(clean_logits) - clean_target)
        slopes = (
            robust_slope.T @ adversarial + clean_slope.T @ pixels,
            robust_slope.sum(axis=0) + clean_slope.sum(axis=0),
        )
        rows.append(
            {
                "loss_nats": (1 - clean_weight) * robust_loss + clean_weight * clean_loss,
                "robust_loss_nats": robust_loss,
                "clean_loss_nats": clean_loss,
                "robust_weight_fraction": 1 - clean_weight,
                "clean_weight_fraction": clean_weight,
                "slopes": slopes,
            }
        )
        student = descend(student, slopes)
    return rows


class Copy:
    """The robust teacher that learns: a normalisation and a linear layer, with momentum."""

    def __init__(self):
        self.values = {"gamma": NORM["gamma"], "beta": NORM["beta"]}
        self.values |= {"weight": ROBUST[0], "bias": ROBUST[1]}
        self.speed = {name: np.zeros_like(value) for name, value in self.values.items()}

    def hidden(self, pixels):
        normal = (pixels - NORM["mean"]) / np.sqrt(NORM["variance"] + 1e-5)
        return normal, normal * self.values["gamma"] + self.values["beta"]

    def logits(self, pixels):
        return self.hidden(pixels)[1] @ self.values["weight"].T + self.values["bias"]

    def learn(self, pixels, labels, *, rate, momentum, decay):
        normal, hidden = self.hidden(pixels)
        slope = (softmax(self.logits(pixels)) - np.eye(K)[labels]) / N
        back = slope @ self.values["weight"]
        slopes = {
            "gamma": (back * normal).sum(axis=0),
            "beta": back.sum(axis=0),
            "weight": slope.T @ hidden,
            "bias": slope.sum(axis=0),
        }
        for name, value in slopes.items():
            value = value + decay * self.values[name]
            self.speed[name] = momentum * self.speed[name] + value
            self.values[name] = self.values[name] - rate * self.speed[name]


def moved(temperature, own, other, rate):
    return min(max(temperature - rate * np.sign(own / other - 1), 1.0), 10.0)


def ciard(num_steps, *, scale, settings):
    student, copy = STUDENT, Copy()
    robust_temperature = clean_temperature = 1.0
    robust_weight = clean_weight = 0.5
    first, rows = None, []
    for step in range(num_steps):
        fraction = step / num_steps
        pixels, adversarial, labels = batch(step)
        robust_answer = copy.logits(adversarial)
        robust_target = softmax(robust_answer / robust_temperature)
        clean_target = softmax(answer(CLEAN, pixels) / clean_temperature)
        mistaken = softmax(answer(CLEAN, adversarial))
        wrong = mistaken.argmax(axis=1) != labels
        robust_logits, clean_logits = answer(student, adversarial), answer(student, pixels)
        robust_loss = scale * divergence(robust_target, robust_logits).mean()
        clean_loss = scale * divergence(clean_target, clean_logits).mean()
        softened = robust_logits / settings["push_temperature"]
        push = scale * divergence(mistaken, softened)[wrong].mean()
        decades = [math.floor(math.log10(value)) for value in (robust_loss, clean_loss, push)]
        factor = settings["push_factor"] * 10.0 ** (min(decades[:2]) - decades[2])

        used = (robust_temperature, clean_temperature)
        drop = settings["drop_factor"] if fraction >= settings["drop"] else 1.0
        own, other = entropy_like(robust_target), entropy_like(clean_target)
        robust_temperature = moved(used[0], own, other, drop * settings["temperature_rate"])
        clean_temperature = moved(used[1], other, own, drop * settings["temperature_rate"])
        first = first or (robust_loss, clean_loss)
        parts = robust_loss / first[0], clean_loss / first[1]
        weight_rate = drop * settings["weight_rate"]
        robust_weight -= weight_rate * (robust_weight - parts[0] / sum(parts))
        clean_weight -= weight_rate * (clean_weight - parts[1] / sum(parts))

        robust_slope = robust_weight * scale / N * (softmax(robust_logits) - robust_target)
        away = wrong[:, None] * (softmax(softened) - mistaken) / settings["push_temperature"]
        robust_slope = robust_slope - factor * scale * away / wrong.sum()
        clean_slope = clean_weight * scale / N * (softmax(clean_logits) - clean_target)
        slopes = (
            robust_slope.T @ adversarial + clean_slope.T @ pixels,
            robust_slope.sum(axis=0) + clean_slope.sum(axis=0),
        )
        label_loss = -np.log(softmax(robust_answer)[np.arange(N), labels]).mean()
        if fraction >= settings["teacher_from"]:
            done = (fraction - settings["teacher_from"]) / (1 - settings["teacher_from"])
            rate = settings["teacher_rate"] * (1 + math.cos(math.pi * done)) / 2
            copy.learn(
                adversarial,
                labels,
                rate=rate,
                momentum=settings["teacher_momentum"],
                decay=settings["teacher_decay"],
            )
        rows.append(
            {
                "loss_nats": robust_weight * robust_loss
                + clean_weight * clean_loss
                - factor * push,
                "robust_loss_nats": robust_loss,
                "clean_loss_nats": clean_loss,
                "push_loss_nats": push,
                "push_factor_ratio": factor,
                "push_images_fraction": wrong.mean(),
                "robust_weight_fraction": robust_weight,
                "robust_temperature_ratio": used[0],
                "clean_temperature_ratio": used[1],
                "robust_teacher_label_loss_nats": label_loss,
                "slopes": slopes,
                "copy": dict(copy.values),
            }
        )
        student = descend(student, slopes)
    return rows
