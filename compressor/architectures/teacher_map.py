"""A last layer in two: features to a map with one slice for each teacher, and map to logits.

It is there while a student learns. There is no non-linearity between the two layers, so
afterwards they become one, and the student costs no more than any other.

N images, D features, M teachers, K classes.
"""

import torch
from torch import Tensor, nn

from compressor.errors import RecipeError

_SEED_OF_HEAD = 0x5EED_0F_3EAD
"""Or the head would begin with the numbers of the first convolution."""


class StudentTeacherHead(nn.Module):
    """Features [N, D] to the student-teacher map [N, M x K] to logits [N, K].

    Source: DARHT's released script, where every student ends in these two layers; there the map
    is a second output for ever.
    """

    def __init__(self, num_features: int, *, num_teachers: int, num_classes: int) -> None:
        super().__init__()
        self.num_teachers = num_teachers
        self.num_classes = num_classes
        self.to_map = nn.Linear(num_features, num_teachers * num_classes)
        self.to_logits = nn.Linear(num_teachers * num_classes, num_classes)

    def forward(self, features_ND: Tensor) -> Tensor:
        """Logits [N, K]."""
        return self.to_logits(self.to_map(features_ND))  # type: ignore[no-any-return]

    def slices(self, map_NF: Tensor) -> Tensor:
        """The answer of `to_map`, [N, M x K], as [N, M, K]: each teacher has K neighbours."""
        return map_NF.view(-1, self.num_teachers, self.num_classes)

    def read_out(self, map_NMK: Tensor) -> Tensor:
        """Logits [N, K] of a map [N, M, K]."""
        return self.to_logits(map_NMK.flatten(1))  # type: ignore[no-any-return]

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same function as one layer; computed in float64 and rounded once."""
        first, second = self.to_map, self.to_logits
        layer = nn.Linear(first.in_features, second.out_features).to(second.weight)
        weight, bias = second.weight.double(), second.bias.double()
        layer.weight.copy_(weight @ first.weight.double())
        layer.bias.copy_(weight @ first.bias.double() + bias)
        return layer


def add_teacher_map(
    network: nn.Module, *, num_classes: int, num_teachers: int, seed: int
) -> StudentTeacherHead:
    """Replace the last linear layer of a network, in place, by the two layers.

    Their weights are a function of `seed`; global randomness stays. On the device of the layer
    that they replace, and in its format.

    Returns:
        The new head.

    Raises:
        RecipeError: if the network does not end in a linear layer with `num_classes` outputs.
    """
    layers = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    name, last = layers[-1] if layers else ("", None)
    if last is None or not name or last.out_features != num_classes:
        raise RecipeError(
            f"a teacher map replaces the last linear layer, which has to give {num_classes} "
            f"logits; the last one of this network is {name or 'none'} ({last}). Take another "
            "student.architecture, or another method.name"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed ^ _SEED_OF_HEAD)
        head = StudentTeacherHead(
            last.in_features, num_teachers=num_teachers, num_classes=num_classes
        )
    network.set_submodule(name, head.to(last.weight).train(last.training))
    return head


def find_teacher_map(network: nn.Module) -> StudentTeacherHead | None:
    """The two layers of a network; None where it ends in one."""
    found = (m for m in network.modules() if isinstance(m, StudentTeacherHead))
    return next(found, None)


def merge_teacher_map(network: nn.Module) -> None:
    """Make one linear layer of the two again, in place; nothing where there is one already."""
    heads = [(n, m) for n, m in network.named_modules() if isinstance(m, StudentTeacherHead)]
    for name, head in heads:
        network.set_submodule(name, head.merged().train(head.training))
