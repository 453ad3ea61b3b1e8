"""Do exported files answer as PyTorch does, for every kind of network, on many images?

Weights are seeded and not trained, but for the statistics of BatchNorm and the scale of the last
layer, which a few batches of the images set, so that labels differ from image to image.

    python tests/evidence/export_agreement.py --data imagefolder:FOLDER \
        --write docs/results/export-agreement.md
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from compressor.data import evaluation_batches, load_test_split
from compressor.environment import describe_environment
from compressor.networks import NetworkSpec, build_classifier
from compressor.onnx_model import load_onnx_model
from compressor.performance import Performance, resolve_performance
from compressor.performance_settings import PerformanceSettings
from compressor.recipe import DataRecipe
from compressor.reports.markdown import markdown_table
from compressor.run_directory import write_text_atomically
from exporters.to_onnx import OnnxForm, write_onnx

ARCHITECTURES = (
    "resnet18",
    "mobilenet_v2",
    "resnet56",
    "wide_resnet_34_10",
    "torchvision:mobilenet_v3_small",
    "torchvision:convnext_tiny",
)
NUM_SETTLING_BATCHES = 4
BATCH_SIZE = 50
LOGIT_SPREAD = 3.0
"""Standard deviation of a logit over the images."""


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    settings = PerformanceSettings(device="cpu", training_dtype="float32")
    performance = resolve_performance(settings)
    split = load_test_split(
        DataRecipe(source=options.data, validation_size=1),
        settings=settings,
        device=performance.device,
        num_images=options.images,
    )
    batches = [batch.x_NCHW for batch in evaluation_batches(split, batch_size=BATCH_SIZE)]
    rows = []
    for architecture in ARCHITECTURES:
        spec = NetworkSpec(
            architecture=architecture,
            num_classes=len(split.class_names),
            image_shape=split.image_shape,
            mean=(0.5,) * split.image_shape[0],
            std=(0.25,) * split.image_shape[0],
        )
        network = build_classifier(spec, seed=0)
        rows.append([architecture, *_compare(network, spec, batches)])
        print(*rows[-1], sep=" | ", flush=True)  # noqa: T201
    if options.write:
        write_text_atomically(options.write, _markdown(rows, performance, options.images))


@torch.no_grad()
def _compare(network: nn.Module, spec: NetworkSpec, batches: list[torch.Tensor]) -> list[str]:
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # so that its statistics are those of these batches alone
    for batch in batches[:NUM_SETTLING_BATCHES]:
        network(batch)
    network.eval()
    _spread_logits(network, batches[0])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        started_at_seconds = time.perf_counter()
        write_onnx(network, path, form=OnnxForm(image_shape=spec.image_shape), metadata={})
        seconds = time.perf_counter() - started_at_seconds
        model = load_onnx_model(path, num_threads=torch.get_num_threads())
        num_bytes = path.stat().st_size
        ours = torch.cat([network(batch) for batch in batches])
        theirs = torch.cat([model(batch) for batch in batches])
        exact = torch.cat([network.double()(batch.double()) for batch in batches])
    num_same = int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum())
    return [
        f"{num_bytes:,}",
        f"{seconds:.1f} s",
        f"{num_same} of {len(ours)}",
        f"{float((ours - theirs).abs().max()):.1e}",
        f"{float((ours - exact).abs().max()):.1e}",
        f"{float(ours.abs().max()):.2f}",
        f"{len(ours.argmax(dim=1).unique())}",
    ]


def _spread_logits(network: nn.Module, batch: torch.Tensor) -> None:
    """Centre and scale the last layer, or all images would get the same label by a wide margin."""
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    logits_NK = network(batch)
    scale = LOGIT_SPREAD / logits_NK.std(dim=0).mean()
    last.bias.sub_(logits_NK.mean(dim=0)).mul_(scale)
    last.weight.mul_(scale)


def _markdown(rows: list[list[str]], performance: Performance, num_images: int) -> str:
    header = (
        *("network", "bytes", "written in", "same label", "largest difference of a logit"),
        *("PyTorch float32 from float64", "largest logit", "classes answered"),
    )
    environment = describe_environment(performance)
    blocks = [
        "# Do exported files answer as PyTorch does?",
        f"float32 ONNX by ONNX Runtime against PyTorch on {num_images} CIFAR-10 test images. "
        "Networks of width 1 with seeded weights, not trained but for the statistics of BatchNorm "
        "and the scale of the last layer. Beside the difference between file and PyTorch is that "
        "between PyTorch in float32 and in float64, which is what rounding alone does.",
        markdown_table(header, rows),
        "`python tests/evidence/export_agreement.py --data imagefolder:DATA`",
        "\n".join(f"- {name}: {value}" for name, value in environment.items()),
    ]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    main()
