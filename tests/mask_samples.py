"""Pictures with exact masks: shapes composited on photographs, by a seed."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("background", "disc", "square", "triangle")
COLOURS = ((), (220, 40, 40), (40, 90, 220), (240, 200, 40))


def photographs():
    """Crops of scikit-learn's two photographs, which need no download."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(picture) for picture in load_sample_images().images]


def pair(backgrounds, generator, size):
    """Return a picture and its mask, in which every class but the background has the colour of its own."""
    width, height = size
    background = backgrounds[int(generator.integers(len(backgrounds)))]
    left, top = (int(generator.integers(full - part)) for full, part in zip(background.size, size, strict=True))
    picture, mask = background.crop((left, top, left + width, top + height)), Image.new("L", size, 0)
    for _ in range(int(generator.integers(2, 5))):
        number = int(generator.integers(1, 4))
        side = int(generator.integers(min(size) // 4, min(size) // 2))
        x, y = int(generator.integers(width - side)), int(generator.integers(height - side))
        shape = (x, y, x + side, y + side)
        for canvas, colour in ((picture, COLOURS[number]), (mask, number)):
            draw = ImageDraw.Draw(canvas)
            if number == 1:
                draw.ellipse(shape, fill=colour)
            elif number == 2:
                draw.rectangle(shape, fill=colour)
            else:
                draw.polygon([(x, y + side), (x + side, y + side), (x + side // 2, y)], fill=colour)
    return picture, mask


def write_pairs(root: Path, number: int, seed: int = 0, size=(72, 64)):
    """Write `images`, `masks` and `classes.txt` below a folder."""
    generator, backgrounds = np.random.default_rng(seed), photographs()
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for index in range(number):
        picture, mask = pair(backgrounds, generator, size)
        picture.save(root / "images" / f"{index:03d}.jpg", quality=95)
        mask.save(root / "masks" / f"{index:03d}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root
