"""Four steps of each method with one teacher or none, in numpy float64, from the papers' formulas.

An oracle for `compressor.methods`: it shares no code with it. Student and teacher are linear, so
that every gradient is written out by hand. N images of 6 pixels, K = 4 classes.
"""

import numpy as np

NUM_STEPS, NUM_IMAGES, NUM_CLASSES, SHAPE = 4, 6, 4, (1, 2, 3)
EPSILON, STEP_SIZE, ATTACK_STEPS = 0.1, 0.04, 3
LEARNING_RATE, MOMENTUM = 0.5, 0.9


def waves(shape, phase):
    """Numbers in [-1, 1] without pattern, the same with every version of every library."""
    count = np.arange(np.prod(shape), dtype=np.float64)
    return np.sin(12.9898 * count + 78.233 * phase + 0.001 * count * count).reshape(shape)


def student_start():
    return 1.5 * waves((NUM_CLASSES, 6), 1.0), 0.3 * waves((NUM_CLASSES,), 2.0)


def teacher():
    return 4 * waves((NUM_CLASSES, 6), 3.0), 0.3 * waves((NUM_CLASSES,), 4.0)


def batch(step):
    """Clean images, labels, and start noise: one in [0, 1) and one of standard deviation 1."""
    images = 0.5 + 0.5 * waves((NUM_IMAGES, 6), 10.0 + step)
    labels = (np.arange(NUM_IMAGES) * 7 + step) % NUM_CLASSES
    flat = 0.5 + 0.49 * waves((NUM_IMAGES, 6), 200.0 + step)
    return images, labels, flat, 1.4 * waves((NUM_IMAGES, 6), 100.0 + step)


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def softmax(z):
    return np.exp(log_softmax(z))


def kl(first, second):
    """Per row, of the softmax of two tables of logits."""
    return (softmax(first) * (log_softmax(first) - log_softmax(second))).sum(axis=1)


def kl_slope_first(first, second):
    gap = log_softmax(first) - log_softmax(second) - kl(first, second)[:, None]
    return softmax(first) * gap


def kl_slope_second(first, second):
    return softmax(second) - softmax(first)


def one_hot(labels):
    return np.eye(NUM_CLASSES)[labels]


def ask(network, images):
    weight, bias = network
    return images @ weight.T + bias


def attack(images, start, slope):
    """`slope` gives the gradient of what is raised."""
    adversarial = start
    for _ in range(ATTACK_STEPS):
        adversarial = adversarial + STEP_SIZE * np.sign(slope(adversarial))
        adversarial = np.minimum(np.maximum(adversarial, images - EPSILON), images + EPSILON)
        adversarial = np.clip(adversarial, 0, 1)
    return adversarial


def attack_label(student, data):
    images, labels, flat, _ = data

    def slope(adversarial):
        return (softmax(ask(student, adversarial)) - one_hot(labels)) @ student[0]

    return attack(images, images + EPSILON * (2 * flat - 1), slope)


def mean_ce(z, labels):
    return -(one_hot(labels) * log_softmax(z)).sum(axis=1).mean()


def distillation(student, master, data, fraction, *, temperature, teacher_weight, loss_scale):
    images, labels, _, _ = data
    z, t = ask(student, images), ask(master, images)
    soft = kl(t / temperature, z / temperature).mean()
    loss = teacher_weight * loss_scale * temperature**2 * soft + (1 - teacher_weight) * mean_ce(
        z, labels
    )
    dz = teacher_weight * loss_scale * temperature * (
        softmax(z / temperature) - softmax(t / temperature)
    ) + (1 - teacher_weight) * (softmax(z) - one_hot(labels))
    return loss, [(dz, images)]


def ard(student, master, data, fraction, *, temperature, teacher_weight, loss_scale):
    images, labels, _, _ = data
    adversarial = attack_label(student, data)
    z_adv, z, t = ask(student, adversarial), ask(student, images), ask(master, images)
    soft = kl(t / temperature, z_adv / temperature).mean()
    loss = teacher_weight * loss_scale * temperature**2 * soft
    loss += (1 - teacher_weight) * mean_ce(z, labels)
    dz_adv = softmax(z_adv / temperature) - softmax(t / temperature)
    dz = (1 - teacher_weight) * (softmax(z) - one_hot(labels))
    return loss, [(teacher_weight * loss_scale * temperature * dz_adv, adversarial), (dz, images)]


def iad(
    student,
    master,
    data,
    fraction,
    *,
    temperature,
    teacher_weight,
    loss_scale,
    begin_fraction,
    trust_exponent,
    teacher_trust="weighted",
    self_target="live",
):
    if fraction < begin_fraction:
        return ard(
            student,
            master,
            data,
            fraction,
            temperature=temperature,
            teacher_weight=teacher_weight,
            loss_scale=loss_scale,
        )
    images, labels, _, _ = data
    adversarial = attack_label(student, data)
    z_adv, z, t = ask(student, adversarial), ask(student, images), ask(master, images)
    guide = softmax(ask(master, adversarial))[np.arange(NUM_IMAGES), labels]
    trust = guide**trust_exponent
    factor = trust if teacher_trust == "weighted" else np.ones(NUM_IMAGES)
    soft = temperature**2 * kl(t / temperature, z_adv / temperature)
    loss = teacher_weight * loss_scale * (factor * soft + (1 - trust) * kl(z, z_adv)).mean()
    loss += (1 - teacher_weight) * mean_ce(z, labels)
    dz_adv = factor[:, None] * temperature * (
        softmax(z_adv / temperature) - softmax(t / temperature)
    ) + (1 - trust)[:, None] * kl_slope_second(z, z_adv)
    dz = (1 - teacher_weight) * (softmax(z) - one_hot(labels))
    if self_target == "live":
        slope = kl_slope_first(z, z_adv)
        dz = dz + teacher_weight * loss_scale * (1 - trust)[:, None] * slope
    return loss, [(teacher_weight * loss_scale * dz_adv, adversarial), (dz, images)]


def rslad(student, master, data, fraction, *, robust_weight, loss_scale):
    images, _, _, gauss = data
    t = ask(master, images)

    def slope(adversarial):
        return kl_slope_second(t, ask(student, adversarial)) @ student[0]

    adversarial = attack(images, images + 0.001 * gauss, slope)
    z_adv, z = ask(student, adversarial), ask(student, images)
    loss = robust_weight * kl(t, z_adv).mean() + (1 - robust_weight) * kl(t, z).mean()
    return loss_scale * loss, [
        (loss_scale * robust_weight * kl_slope_second(t, z_adv), adversarial),
        (loss_scale * (1 - robust_weight) * kl_slope_second(t, z), images),
    ]


def adaad(student, master, data, fraction, *, robust_weight, loss_scale):
    images, _, _, gauss = data

    def slope(adversarial):
        z, t = ask(student, adversarial), ask(master, adversarial)
        return kl_slope_second(t, z) @ student[0] + kl_slope_first(t, z) @ master[0]

    adversarial = attack(images, images + 0.001 * gauss, slope)
    z_adv, z = ask(student, adversarial), ask(student, images)
    t_adv, t = ask(master, adversarial), ask(master, images)
    loss = robust_weight * kl(t_adv, z_adv).mean() + (1 - robust_weight) * kl(t, z).mean()
    return loss_scale * loss, [
        (loss_scale * robust_weight * kl_slope_second(t_adv, z_adv), adversarial),
        (loss_scale * (1 - robust_weight) * kl_slope_second(t, z), images),
    ]


def cross_entropy(student, master, data, fraction):
    images, labels, _, _ = data
    z = ask(student, images)
    return mean_ce(z, labels), [(softmax(z) - one_hot(labels), images)]


def pgd_at(student, master, data, fraction):
    labels, adversarial = data[1], attack_label(student, data)
    z_adv = ask(student, adversarial)
    return mean_ce(z_adv, labels), [(softmax(z_adv) - one_hot(labels), adversarial)]


def trades(student, master, data, fraction, *, beta):
    images, labels, _, gauss = data
    z = ask(student, images)

    def slope(adversarial):
        return kl_slope_second(z, ask(student, adversarial)) @ student[0]

    adversarial = attack(images, images + 0.001 * gauss, slope)
    z_adv = ask(student, adversarial)
    loss = mean_ce(z, labels) + beta * kl(z, z_adv).mean()
    return loss, [
        (softmax(z) - one_hot(labels) + beta * kl_slope_first(z, z_adv), images),
        (beta * kl_slope_second(z, z_adv), adversarial),
    ]


METHODS = {
    "distillation": distillation,
    "ard": ard,
    "iad": iad,
    "rslad": rslad,
    "adaad": adaad,
    "cross_entropy": cross_entropy,
    "pgd_at": pgd_at,
    "trades": trades,
}


def run(name, **settings):
    """Loss, gradients and weights after each of the steps; SGD with momentum."""
    weight, bias = student_start()
    speed_weight, speed_bias = np.zeros_like(weight), np.zeros_like(bias)
    rows = []
    for step in range(NUM_STEPS):
        loss, slopes = METHODS[name](
            (weight, bias), teacher(), batch(step), step / NUM_STEPS, **settings
        )
        d_weight = sum(dz.T @ images for dz, images in slopes) / NUM_IMAGES
        d_bias = sum(dz.sum(axis=0) for dz, _ in slopes) / NUM_IMAGES
        speed_weight = MOMENTUM * speed_weight + d_weight
        speed_bias = MOMENTUM * speed_bias + d_bias
        weight, bias = weight - LEARNING_RATE * speed_weight, bias - LEARNING_RATE * speed_bias
        rows.append({"loss": loss, "d_weight": d_weight, "d_bias": d_bias, "weight": weight})
    return rows
