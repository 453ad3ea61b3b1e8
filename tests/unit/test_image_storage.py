"""Decoding that the processes of one host share: nobody does what another does as well.

This file is also the script of the processes.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from compressor import image_decoding, image_storage
from compressor.errors import DataError
from compressor.image_decoding import ImageFiles
from compressor.image_sources import open_source
from compressor.image_storage import StreamedImages, store_images
from compressor.performance_settings import PerformanceSettings
from compressor.ranks import ALONE, joined_ranks
from compressor.recipe import DataRecipe

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NUM_IMAGES = 22  # 1.03 MiB
STREAMED, RESIDENT = 1, 2
CASES = {
    "streamed: each checks a part": ("good", STREAMED, 1),
    "resident: the first fills the cache": ("good", RESIDENT, 1),
    "streamed, damaged": ("bad", STREAMED, 1),
    "resident, damaged": ("bad", RESIDENT, 1),
    "streamed on two hosts: each checks its own disk": ("good", STREAMED, 2),  # the last
}
"""Images, memory for them in MiB, hosts."""


# The part of the script ------------------------------------------------------------------------


def main(folder):
    """What this process meets in each case, and which files it decodes meanwhile."""
    decoded, read = [], image_decoding._read
    image_decoding._read = lambda files, name: decoded.append(name) or read(files, name)
    found = {}
    with joined_ranks(CPU, purpose="test") as ranks:
        for name, (images, memory_mib, num_hosts) in CASES.items():
            if num_hosts == 2:  # where each process is the only one
                os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            decoded.clear()
            found[name] = {"sum": 0, "error": ""}
            try:
                storage = store(Path(folder, images), memory_mib=memory_mib, ranks=ranks)
            except DataError as error:
                found[name]["error"] = str(error)
            found[name]["decoded"] = list(decoded)
            if not found[name]["error"]:
                (images_NCHW,) = storage.batches([torch.arange(NUM_IMAGES)])
                found[name]["sum"] = int(images_NCHW.int().sum())
    return found


def store(folder, *, memory_mib, num_workers=1, ranks=ALONE):
    recipe = DataRecipe(source=f"imagefolder:{folder}", validation_size=4)
    settings = PerformanceSettings(num_workers=num_workers, memory_budget_mib=memory_mib)
    source = open_source(recipe, part="train")
    return store_images(source, settings=settings, device=CPU, ranks=ranks)


# The part of the tests -------------------------------------------------------------------------


def make_images(folder):
    rng = np.random.default_rng(0)
    for part, count in (("train", NUM_IMAGES // 2), ("test", 1)):
        for name in ("cat", "dog"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two processes met, by case."""
    folder = tmp_path_factory.mktemp("two")
    make_images(folder / "good")
    bad = make_images(folder / "bad")
    for name in ("cat/00.png", "dog/10.png"):  # one in each part
        (bad / "train" / name).write_bytes(b"damaged")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        own = os.environ | {name: str(value) for name, value in place.items()}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        own |= {"PYTHONPATH": str(ROOT), "ROBUST_COMPRESS_CACHE": str(folder / "cache")}
        command = [sys.executable, __file__, str(folder)]
        processes.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(one) for one in said]


@pytest.mark.parametrize(
    ("case", "num_decoded"),
    [
        ("streamed: each checks a part", [NUM_IMAGES // 2, NUM_IMAGES // 2]),
        ("resident: the first fills the cache", [NUM_IMAGES, 0]),
        ("streamed on two hosts: each checks its own disk", [NUM_IMAGES, NUM_IMAGES]),
    ],
)
def test_processes_of_a_host_decode_each_image_once(of_two, case, num_decoded):
    first, second = (found[case] for found in of_two)
    assert [len(first["decoded"]), len(second["decoded"])] == num_decoded
    assert len({*first["decoded"], *second["decoded"]}) == NUM_IMAGES
    assert first["sum"] == second["sum"] > 0


@pytest.mark.parametrize("case", ["streamed, damaged", "resident, damaged"])
def test_all_processes_name_all_damaged_files(of_two, case):
    first, second = (found[case]["error"] for found in of_two)
    assert first == second
    assert first.startswith("2 files in ")
    assert "train/cat/00.png" in first
    assert "train/dog/10.png" in first


@pytest.mark.parametrize(
    ("num_processes", "asked", "num_workers"),
    [("1", None, 8), ("3", None, 2), ("16", None, 1), ("3", 5, 5)],
)
def test_cores_are_divided_among_the_processes_of_a_host(
    monkeypatch, tmp_path, num_processes, asked, num_workers
):
    """Or eight would fork a thousand decoders on 128 cores. Who has met none checks all."""
    used = []
    monkeypatch.setattr(image_storage, "num_usable_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", num_processes)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(
        ImageFiles,
        "problems",
        lambda self, *, num_workers: used.append((num_workers, len(self))) or [],
    )
    storage = store(make_images(tmp_path), memory_mib=STREAMED, num_workers=asked)
    assert isinstance(storage, StreamedImages)
    assert (storage.num_workers, used) == (num_workers, [(num_workers, NUM_IMAGES)])


def test_freed_memory_is_given_back_while_images_are_streamed(monkeypatch, tmp_path):
    """Else the heap falls into pieces. Once before workers are forked, then every 16 batches."""
    given = []
    monkeypatch.setattr(image_storage, "give_freed_memory_back", lambda: given.append(1))
    storage = store(make_images(tmp_path), memory_mib=STREAMED)
    seen = [len(given) for _ in storage.batches([torch.arange(2)] * 33)]
    assert (seen[0], seen[15], seen[16], seen[32]) == (2, 2, 3, 4)


if __name__ == "__main__":
    json.dump(main(*sys.argv[1:]), sys.stdout)
