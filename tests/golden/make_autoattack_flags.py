"""What the released AutoAttack says about a small robust network, image by image.

Run it to train the network and to write `autoattack_network.safetensors` and
`autoattack_flags.json` beside it; a few minutes on one core:

    python tests/golden/make_autoattack_flags.py

The reference is pyautoattack, the released code of Croce and Hein, "Reliable evaluation of
adversarial robustness with an ensemble of diverse parameter-free attacks", ICML 2020. It seeds
the global generator and takes the tracer away from debuggers; whoever calls it from a test must
put both back.

N images, C channels, H and W pixels.
"""

import json
from importlib.metadata import version
from pathlib import Path

import pyautoattack
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from compressor.attacks.pgd import PGD
from compressor.augmentation import Augmentation
from compressor.data import (
    evaluation_batches,
    load_test_split,
    load_training_data,
    training_batches,
)
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe
from compressor.threat import ThreatModel
from compressor.verification.verification import verification_order

HERE = Path(__file__).parent
NETWORK, FLAGS = HERE / "autoattack_network.safetensors", HERE / "autoattack_flags.json"
THREATS = {
    "linf": ThreatModel(norm="linf", epsilon_pixels=0.15),
    "l2": ThreatModel(norm="l2", epsilon_pixels=0.7),
}
REFERENCE_NORMS = {"linf": "Linf", "l2": "L2"}
REFERENCE_ATTACKS = {
    "apgd_ce": "apgd-ce",
    "apgd_t": "apgd-t",
    "fab_t": "fab-t",
    "square": "square",
}
SEED, OTHER_SEEDS = 0, (1, 2, 3)
NUM_IMAGES, SUBSET_SEED = 40, 4
"""A part with images of every kind: wrong clean, broken early, broken late, standing."""
NUM_EPOCHS, BATCH_SIZE, LEARNING_RATE = 8, 64, 0.1
TRAINING_THREAT = ThreatModel(epsilon_pixels=0.1)
DATA = DataRecipe(source="digits", validation_size=100)
CPU = torch.device("cpu")


def load_split():
    """The test images that the flags are about."""
    return load_test_split(
        DATA, settings=PerformanceSettings(), device=CPU, num_images=NUM_IMAGES, seed=SUBSET_SEED
    )


def load_images(split):
    """All of them in one batch, in the order of a verification."""
    order_N = verification_order(split, seed=SEED)
    (batch,) = evaluation_batches(split, batch_size=NUM_IMAGES, seed=SEED, order_N=order_N)
    return batch


def build_network():
    """So small that the many passes of the released code take seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def load_network():
    """As it was trained."""
    network = build_network()
    network.load_state_dict(load_file(NETWORK))
    return network.eval().requires_grad_(False)  # noqa: FBT003 (torch's signature)


def reference_broken_by(
    model, x_NCHW, y_N, *, norm, attacks=tuple(REFERENCE_ATTACKS), num_queries=5000
):
    """The first attack of standard AutoAttack that breaks each image, `clean`, or None."""
    with torch.no_grad():
        is_wrong_N = model(x_NCHW).argmax(dim=1) != y_N
    broken_by = ["clean" if is_wrong else None for is_wrong in is_wrong_N.tolist()]
    for number in range(1, len(attacks) + 1):
        is_fooled_N = reference_fooled(
            model, x_NCHW, y_N, norm=norm, attacks=attacks[:number], num_queries=num_queries
        )
        for place in is_fooled_N.nonzero()[:, 0].tolist():
            broken_by[place] = broken_by[place] or attacks[number - 1]
    return broken_by


def reference_fooled(
    model,
    x_NCHW,
    y_N,
    *,
    norm,
    attacks=tuple(REFERENCE_ATTACKS),
    seed=SEED,
    num_queries=5000,
):
    """Which images these attacks leave with a wrong answer, bool [N]."""
    reference = pyautoattack.AutoAttack(
        model, norm=REFERENCE_NORMS[norm], eps=THREATS[norm].epsilon_pixels, seed=seed
    )
    reference.attacks_to_run = [REFERENCE_ATTACKS[name] for name in attacks]
    reference.square.n_queries = num_queries
    _, answer_N = reference.run_standard_evaluation(x_NCHW, y_N)
    return answer_N != y_N


def train_network():
    """A few epochs of adversarial training (Madry et al., ICLR 2018)."""
    data = load_training_data(DATA, seed=SEED, settings=PerformanceSettings(), device=CPU)
    network = build_network()
    attack = PGD(
        threat=TRAINING_THREAT, step_size_pixels=TRAINING_THREAT.epsilon_pixels / 3, num_steps=5
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=0.9)
    plain = Augmentation(crop_padding_pixels=0, horizontal_flip=False)
    for epoch in range(NUM_EPOCHS):
        for batch in training_batches(
            data.train, batch_size=BATCH_SIZE, seed=SEED, epoch=epoch, augment=plain
        ):
            x_adv = attack(network, batch.x_NCHW, batch.y_N, keys_N=batch.keys_N)
            optimizer.zero_grad()
            F.cross_entropy(network(x_adv), batch.y_N).backward()
            optimizer.step()
    return network


def record(model, x_NCHW, y_N, *, norm):
    """What broke each image, and the places where another seed decides otherwise."""
    broken_by = reference_broken_by(model, x_NCHW, y_N, norm=norm)
    is_fooled_N = torch.tensor([attack is not None for attack in broken_by])
    others = [reference_fooled(model, x_NCHW, y_N, norm=norm, seed=seed) for seed in OTHER_SEEDS]
    depends_N = (torch.stack(others) != is_fooled_N).any(dim=0)
    return {"broken_by": broken_by, "depends_on_seed": depends_N.nonzero()[:, 0].tolist()}


def main():
    torch.set_num_threads(1)
    save_file(train_network().state_dict(), NETWORK)
    split, model = load_split(), load_network()
    batch = load_images(split)
    x_NCHW = batch.x_NCHW.contiguous()
    flags = {
        "reference": f"pyautoattack {version('pyautoattack')}",
        "content_sha256": split.content_sha256,
        "index": batch.index_N.tolist(),
        **{norm: record(model, x_NCHW, batch.y_N, norm=norm) for norm in THREATS},
    }
    FLAGS.write_text(json.dumps(flags, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
