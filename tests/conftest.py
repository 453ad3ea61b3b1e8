"""Small things that many tests need: tiny networks, seeded images, one thread, own cache."""

import pytest
import torch
from hypothesis import settings

from compressor.architectures.tiny import build_tiny
from compressor.threat import ThreatModel

settings.register_profile("quiet", deadline=None, database=None)
settings.load_profile("quiet")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """No test reads or fills the cache of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROBUST_COMPRESS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def make_tiny():
    """Builds a seeded tiny network, 4 classes and 3x8x8 unless told."""

    def make(*, seed=0, num_classes=4, num_channels=3, width=0.5, dtype=torch.float32):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = build_tiny(
                num_classes=num_classes, image_shape=(num_channels, 8, 8), width=width
            )
        return network.to(dtype)

    return make


@pytest.fixture(scope="session")
def make_images():
    """Builds seeded uniform images in [0, 1] and labels."""

    def make(num_images=6, *, seed=0, num_classes=4, num_channels=3, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        x_NCHW = torch.rand(num_images, num_channels, 8, 8, generator=generator).to(dtype)
        return x_NCHW, torch.arange(num_images) % num_classes

    return make


@pytest.fixture
def tiny_network(make_tiny):
    return make_tiny()


@pytest.fixture
def threat():
    return ThreatModel(epsilon_pixels=8 / 255)
