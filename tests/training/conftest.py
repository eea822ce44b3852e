"""What the tests of training share."""

import subprocess

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """A folder of 3 × 12 images of three colours with noise, which a model tells apart quickly."""
    root = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        (root / name).mkdir()
        for index in range(12):
            pixels = generator.integers(0, 120, (40, 40, 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root
