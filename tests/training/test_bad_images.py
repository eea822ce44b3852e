"""Sixteen kinds of bad image among good ones, and a shard cut short: training ends, and the report names them all."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from runs import quiet, recipe

from vmamba.data.images import DamagedImageError, read_image
from vmamba.data.shards import write_shards
from vmamba.training.engine import train
from vmamba.training.guards import TrainingFailedError
from vmamba.training.recipe import GuardOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # webdataset leaves files to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def encode(image=NOISE, kind="jpeg", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb():
    """A PNG of 60,000 × 60,000 pixels in a few hundred bytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.new("RGB", (40, 20)), exif=exif)


def middle_overwritten():
    content = bytearray(encode(kind="png"))
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    return bytes(content)


# What cannot be read, and what can although it is odd: sixteen kinds.
UNREADABLE = {
    "empty.jpg": b"",
    "text.jpg": b"this is no image at all",
    "page.jpg": b"<!DOCTYPE html><html>404</html>",
    "cut.jpg": encode()[: len(encode()) // 2],
    "cut.png": encode(kind="png")[:200],
    "header.jpg": encode()[:20],
    "overwritten.png": middle_overwritten(),
    "bomb.png": bomb(),
    "zeros.jpg": bytes(5000),
}
ODD = {
    "cmyk.jpg": encode(NOISE.convert("CMYK")),
    "palette.png": encode(NOISE.quantize(16), "png"),
    "bits16.png": encode(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16), "png"),
    "grey.jpg": encode(NOISE.convert("L")),
    "alpha.png": encode(NOISE.convert("RGBA"), "png"),
    "turned.jpg": turned(),
    "really_a_png.jpg": encode(kind="png"),
}


@pytest.mark.parametrize(
    ("name", "content"), (UNREADABLE | ODD).items(), ids=lambda value: value if str(value)[0] != "b" else ""
)
def test_each_kind_is_read_or_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    if name in ODD:
        image = read_image(path)
        assert image.mode == "RGB"
        assert image.size == ((20, 40) if name == "turned.jpg" else (64, 64))
    else:
        with pytest.raises(DamagedImageError, match=name):
            read_image(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes of twenty good images, half of the sixteen kinds in each, and a link to nowhere."""
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for index in range(20):
            NOISE.save(tmp_path / "data" / label / f"good-{index}.png")
    for index, (name, content) in enumerate((UNREADABLE | ODD).items()):
        (tmp_path / "data" / ("cat", "dog")[index % 2] / name).write_bytes(content)
    (tmp_path / "data" / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    return tmp_path / "data"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_training_ends_normally_and_names_every_bad_file(folder, tmp_path, workers):
    # A batch of one epoch is the whole set, so every image is read, in training or in evaluation.
    result = train(recipe(folder, tmp_path / "run", batch_size=3, workers=workers), quiet())
    named = [line.partition(":")[0] for line in (tmp_path / "run" / "damaged.txt").read_text().splitlines()]
    expected = {str(path) for path in folder.rglob("*") if path.name in (*UNREADABLE, "gone.jpg")}
    assert set(named) == expected
    assert len(named) == len(expected) == 10
    assert set(result.damaged) == set((tmp_path / "run" / "damaged.txt").read_text().splitlines())


def test_too_large_a_share_ends_the_run(folder, tmp_path):
    with pytest.raises(
        TrainingFailedError, match=r"of the \d+ training images read so far are damaged, more than the 5%"
    ):
        train(recipe(folder, tmp_path / "run", batch_size=3, guards=GuardOptions(damaged=0.05)), quiet())


def test_shards_with_bad_images_and_one_cut_short(tmp_path):
    place = tmp_path / "shards"
    good = [(encode(kind="png"), "png", index % 2) for index in range(40)]
    bad = [(content, name.rpartition(".")[2], 0) for name, content in (UNREADABLE | ODD).items()]
    write_shards(iter([s for pair in zip(good, bad * 3, strict=False) for s in pair]), ["a", "b"], place, "train", 20)
    write_shards(iter(good[:10]), ["a", "b"], place, "held_out", 20)
    shard = place / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    options = {"guards": GuardOptions(damaged=0.5), "epochs": 3}
    result = train(recipe(f"wds:{place}", tmp_path / "run", **options), quiet())
    assert result.report.count == 10
    assert any(line.startswith(f"{shard}: damaged after") for line in result.damaged)
    assert sum("not an image in a known format" in line for line in result.damaged) >= 2
