"""A small data set of objects whose masks are known exactly: shapes painted on pieces of photographs."""

import json

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_images

CATEGORIES = {3: "disc", 7: "square", 11: "triangle"}  # ids with gaps
COLOURS = {3: (230, 60, 50), 7: (60, 90, 230), 11: (240, 220, 60)}


def make_coco(root, images=12, seed=0, height=80, width=112, name="train", **changes):
    """Write `name`.json and its images below `root`; return the file's content.

    Every image has two objects apart from each other: polygons for squares and triangles, run lengths for discs.
    """
    (root / "images").mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(seed)
    photographs = load_sample_images().images
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": key, "name": name} for key, name in CATEGORIES.items()]
    for number in range(images):
        photograph = photographs[number % len(photographs)]
        y, x = (
            int(chance.integers(0, size - side))
            for size, side in zip(photograph.shape[:2], (height, width), strict=True)
        )
        picture = Image.fromarray(photograph[y : y + height, x : x + width])
        file = f"{name}-{number}.png"
        content["images"].append({"id": 10 * number + 5, "file_name": file, "height": height, "width": width})
        for half in (0, 1):
            side = int(chance.integers(24, 40))
            left = int(chance.integers(0, width // 2 - side)) + half * (width // 2)
            top = int(chance.integers(0, height - side))
            category = int(chance.choice(list(CATEGORIES)))
            annotation = paint(picture, category, left, top, side)
            annotation |= {"id": len(content["annotations"]) + 1, "image_id": 10 * number + 5}
            content["annotations"].append(annotation)
        picture.save(root / "images" / file)
    content |= changes
    (root / f"{name}.json").write_text(json.dumps(content))
    return content


def paint(picture, category, left, top, side):
    """Paint a shape, and return its annotation with exact box and mask."""
    right, bottom = left + side, top + side
    corners = {
        7: [left, top, right, top, right, bottom, left, bottom],
        11: [left + side / 2, top, right, bottom, left, bottom],
    }
    if category == 3:
        drawn = Image.new("L", picture.size)
        ImageDraw.Draw(drawn).ellipse((left, top, right - 1, bottom - 1), fill=1)
        mask = np.asarray(drawn)
        runs = coco_mask.encode(np.asfortranarray(mask))
        segmentation = {"size": list(mask.shape), "counts": text_of(runs["counts"])}
    else:
        segmentation = [corners[category]]
        mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(segmentation, picture.height, picture.width)))
    pixels = np.array(picture)
    pixels[mask.astype(bool)] = COLOURS[category]
    picture.paste(Image.fromarray(pixels))
    rows, columns = np.nonzero(mask)
    x, y = int(columns.min()), int(rows.min())
    box = [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]
    area = int(mask.sum())
    return {"category_id": category, "bbox": box, "area": area, "iscrowd": 0, "segmentation": segmentation}


def text_of(counts):
    return counts.decode() if isinstance(counts, bytes) else counts
