import io

import numpy as np
import pytest
from PIL import Image

from vmamba.data.images import DamagedImageError, image_files, read_image

GRADIENT = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))  # (48, 64), dark to light


def save(tmp_path, name, image, **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("grey.png", Image.fromarray(GRADIENT)),
        ("rgb.png", Image.fromarray(GRADIENT).convert("RGB")),
        ("palette.png", Image.fromarray(GRADIENT).convert("RGB").quantize(64)),
        ("cmyk.tif", Image.fromarray(GRADIENT).convert("RGB").convert("CMYK")),
        ("bits16.png", Image.fromarray(GRADIENT.astype(np.uint16) * 257)),
        ("bits32.tif", Image.fromarray(GRADIENT.astype(np.int32) * 257)),
        ("unit.tif", Image.fromarray(GRADIENT.astype(np.float32) / 255)),
        ("alpha.png", Image.fromarray(GRADIENT).convert("RGBA")),
        ("grey_alpha.png", Image.fromarray(GRADIENT).convert("LA")),
        ("web.webp", Image.fromarray(GRADIENT).convert("RGB")),
    ],
)
def test_every_mode_becomes_the_same_rgb(tmp_path, name, image):
    read = read_image(save(tmp_path, name, image))
    assert read.mode == "RGB"
    pixels = np.asarray(read).astype(int)
    assert np.abs(pixels - GRADIENT[..., None]).max() <= 8  # what palette and lossy webp may take away


def test_transparent_pixels_become_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    pixels = np.asarray(read_image(save(tmp_path, "clear.png", image)))
    assert pixels[0, 0].tolist() == [0, 0, 255]
    assert pixels[1, 1].tolist() == [255, 255, 255]


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    path = save(tmp_path, "turned.jpg", Image.new("RGB", (40, 20)), exif=exif)
    assert read_image(path).size == (20, 40)


def test_corrupt_exif_does_not_lose_the_image(tmp_path):
    path = save(tmp_path, "odd.jpg", Image.new("RGB", (40, 20)), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\0")
    assert read_image(path).size == (40, 20)


def jpeg():
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"this is a text", "not an image"),
        (jpeg()[: len(jpeg()) // 2], "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an image|cannot be decoded"),
    ],
)
def test_damaged_files_are_named_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(DamagedImageError, match=reason) as caught:
        read_image(path)
    assert caught.value.path == str(path)


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path, "large.png", Image.new("L", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4_000)
    with pytest.raises(DamagedImageError, match="more pixels than is safe"):
        read_image(path)


def test_image_files_lists_images_below_sorted_and_skips_the_rest(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.PNG", "a.jpg", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    assert image_files(tmp_path) == [str(tmp_path / "a.jpg"), str(tmp_path / "b" / "2.PNG")]
