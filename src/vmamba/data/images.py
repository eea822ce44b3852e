"""Read image files of any origin as plain RGB, or say why that cannot be done."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class DamagedImageError(ValueError):
    """A file that cannot be decoded as an image; `reason` says why in a few words."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file completely and bring it to 8-bit RGB, upright; see `decode_image`.

    Raises:
        DamagedImageError: The file is empty, cut short, too large to be safe or not an image.
        OSError: The file is missing or may not be read.
    """
    return decode_image(Path(path).read_bytes(), path)


def decode_image(content: bytes, name: str | Path) -> Image.Image:
    """Decode an encoded image completely and bring it to 8-bit RGB, upright.

    16-bit and float images are scaled to 8 bits, transparent ones laid on white, CMYK and palettes converted, the EXIF
    rotation applied.

    Args:
        content: What an image file holds.
        name: What to call it in an error.

    Raises:
        DamagedImageError: It is empty, cut short, too large to be safe or not an image.
    """
    if not content:
        raise DamagedImageError(name, "the file is empty")
    with warnings.catch_warnings():
        # Pillow warns about odd metadata of images that it nevertheless decodes.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(content)) as image:
                image.load()
                return to_rgb(_upright(image))
        except Image.DecompressionBombError:
            raise DamagedImageError(name, "more pixels than is safe to decode") from None
        except Image.UnidentifiedImageError:
            raise DamagedImageError(name, "not an image in a known format") from None
        # Decoders meet corrupt data in many ways: OSError, SyntaxError, struct.error, IndexError and more.
        except Exception as error:
            raise DamagedImageError(name, f"cannot be decoded ({_first_line(error)})") from None


def image_files(folder: str | Path) -> list[str]:
    """Return the sorted paths of all files below a folder that bear the extension of an image."""
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring an image of any Pillow mode to 8-bit RGB."""
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_to_8_bit(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(canvas, layer).convert("RGB")
    return image.convert("RGB")


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Scale by the range the values are stored in: 0–1 for floats, 8 or 16 bits for integers."""
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=255.0, neginf=0.0)
        scale = 255.0 if pixels.max(initial=0.0) <= 1.0 else 1.0
    else:
        scale = 1.0 / 257.0 if pixels.max(initial=0) > 255 else 1.0
    return np.clip(np.rint(pixels * scale), 0, 255).astype(np.uint8)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # corrupt EXIF data says nothing about the pixels, which have been decoded already
        return image


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
