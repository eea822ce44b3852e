"""Detection on one GPU: what a training step takes, and what is found on aerial photographs, beside Swin-T.

    python benchmarks/detection_gpu.py step --output step.csv
    python benchmarks/detection_gpu.py step --compiled dynamic --output step.csv
    python benchmarks/detection_gpu.py trees --wheel deepforest-2.1.0-py3-none-any.whl --output trees.csv

`step`: Mask R-CNN at 1280×800, two images an update, forward to optimiser; both models in one process, in turns.
`--compiled` compiles the backbone of both: for images of all sizes, as `vmamba train --task detection --compile true`
does, or for this one size.
`trees`: the wheel `deepforest` (its data files alone) holds four aerial photographs with 951 boxes. They are cut into
tiles; the right third of every photograph is held out. Both backbones first learn to tell by which quarter turn a tile
is rotated, then Faster R-CNN is fine-tuned by the package's engine: same tiles, order, batch and number of updates.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from vmamba.models.config import get_config
from vmamba.models.vmamba import VMambaBackbone
from vmamba.tasks.detection import DetectorConfig, make_detector
from vmamba.training.detection import DetectionTask
from vmamba.training.detection_recipe import DetectionRecipe, detection_optimizer
from vmamba.training.engine import train

TILE, STEP = 400, 200
WIDTHS = (96, 192, 384, 768)
DROP_PATH = 0.2


class SwinMaps(nn.Module):
    """timm's Swin-T with a norm on each stage map, as mmdetection's Swin has it; images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.swin = timm.create_model(
            "swin_tiny_patch4_window7_224", features_only=True, strict_img_size=False, drop_path_rate=DROP_PATH
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in WIDTHS)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images to four maps (B, C, h, w)."""
        return [norm(x).permute(0, 3, 1, 2) for norm, x in zip(self.norms, self.swin(images), strict=True)]


BODIES: dict[str, Callable[[], nn.Module]] = {
    "vmamba_tiny": lambda: VMambaBackbone(get_config("vmamba_tiny"), num_classes=0, drop_path_rate=DROP_PATH),
    "swin_tiny": SwinMaps,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "trees"))
    parser.add_argument("--output", type=Path, required=True, help="CSV to write")
    parser.add_argument("--wheel", type=Path, help="the wheel deepforest, or a folder of its data files")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1280), help="height and width of a step's images")
    parser.add_argument(
        "--compiled", choices=("no", "dynamic", "static"), default="no", help="the backbone of a step's models"
    )
    parser.add_argument("--rounds", type=int, default=30, help="timed updates of each model")
    parser.add_argument("--pretrain", type=int, default=600, help="updates of telling rotations")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", choices=tuple(BODIES), default=tuple(BODIES))
    options = parser.parse_args()
    if options.what == "trees" and not options.wheel:
        parser.error("trees needs --wheel")
    rows = (time_steps if options.what == "step" else find_trees)(options)
    with options.output.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(row)


def facts(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__}


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def time_steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time whole updates of both models in turns; the medians are compared."""
    device, (height, width) = pick_device(), options.size
    images, targets = _made_up(height, width, device)
    models: dict[str, Any] = {}
    for name in options.models:
        torch.manual_seed(options.seed)
        config = DetectorConfig(80, min_size=min(height, width), max_size=max(height, width))
        model = make_detector(BODIES[name](), WIDTHS, config).to(device).train()
        if options.compiled != "no":
            model.backbone.body.compile(dynamic=options.compiled == "dynamic")
        models[name] = model, torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device.type == "cuda")

    def update(name: str) -> float:
        model, optimizer = models[name]
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            losses = model(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not torch.isfinite(loss):  # also waits for the device
            raise SystemExit(f"the loss of {name} is not finite")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    first = {name: update(name) for name in models}
    for _ in range(4 if device.type == "cuda" else 0):
        for name in models:
            update(name)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name in models:
            seconds[name].append(update(name))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    peer = median.get("swin_tiny")
    return [
        {
            "model": name, "precision": options.precision, "height": height, "width": width, "batch": len(images),
            "images_per_second": round(len(images) / median[name], 3),
            "times_swin": round(peer / median[name], 4) if peer else "",
            "compiled": options.compiled,
            "first_seconds": round(first[name], 1),
            "ms_quartiles": "/".join(f"{1e3 * q:.1f}" for q in statistics.quantiles(seconds[name], n=4)),
            **facts(device),
        }
        for name in models
    ]  # fmt: skip


def _made_up(height: int, width: int, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return two images of noise with twenty objects each."""
    chance = torch.Generator().manual_seed(0)
    images, targets = [], []
    for _ in range(2):
        corner = torch.rand(20, 2, generator=chance) * torch.tensor([width, height]) * 0.7
        extent = 20 + torch.rand(20, 2, generator=chance) * torch.tensor([width, height]) * 0.25
        boxes = torch.cat([corner, corner + extent], 1).round()
        masks = torch.zeros(20, height, width, dtype=torch.uint8)
        for mask, (x, y, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y:bottom, x:right] = 1
        labels = torch.randint(1, 81, (20,), generator=chance)
        images.append(torch.rand(3, height, width, generator=chance).to(device))
        targets.append({"boxes": boxes.to(device), "labels": labels.to(device), "masks": masks.to(device)})
    return images, targets


def find_trees(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Pretrain, fine-tune and measure each model."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        numbers = write_tiles(options.wheel, root)
        for name in options.models:
            torch.manual_seed(options.seed)
            began = time.perf_counter()
            body, accuracy = pretrained(BODIES[name](), root, options)
            middle = time.perf_counter()
            result = train(
                tree_recipe(root, name, options),
                Console(),
                make_task=partial(TreeTask, body={key: value.cpu() for key, value in body.state_dict().items()}),
            )
            totals = result.report.box.totals
            rows.append({
                "model": name, **numbers, "seed": options.seed, "epochs": options.epochs, "rotations": options.pretrain,
                "rotations_right": round(accuracy, 4), "AP50": round(totals["AP50"], 4), "AP": round(totals["AP"], 4),
                "pretrain_seconds": round(middle - began), "finetune_seconds": round(result.seconds),
                "precision": options.precision, **facts(pick_device()),
            })  # fmt: skip
    return rows


def tree_recipe(root: Path, name: str, options: argparse.Namespace) -> DetectionRecipe:
    """Return the recipe both models are fine-tuned by."""
    return DetectionRecipe(
        data=str(root),
        output=str(root / name),
        model=name,
        masks=False,
        epochs=options.epochs,
        batch_size=8,
        min_sizes=(400, 480, 560, 640),
        max_size=800,
        detections=200,
        precision=options.precision,
        seed=options.seed,
        workers=4,
        trackers=(),
        optimizer=replace(detection_optimizer(), lr=2e-4, lr_batch=0, warmup_epochs=2.0, decay_form="clean"),
    )


class TreeTask(DetectionTask):
    """Detection with a backbone that is handed over."""

    def __init__(self, recipe: DetectionRecipe, body: Mapping[str, Tensor]) -> None:
        self._body = body
        super().__init__(recipe)

    def _build_model(self) -> FasterRCNN:
        recipe = self.recipe
        config = DetectorConfig(
            len(self.train.classes), masks=False, min_size=recipe.min_sizes[-1], max_size=recipe.max_size,
            detections=recipe.detections,
        )  # fmt: skip
        model = make_detector(BODIES[recipe.model](), WIDTHS, config)
        model.backbone.body.load_state_dict(self._body)
        return model

    def parameter_groups(self, recipe: Any) -> list[dict[str, Any]]:
        """Spare biases, norms and what the body names; Swin names nothing."""
        named = list(self.model.named_parameters())
        spare = getattr(self.model.backbone.body, "no_weight_decay", set)()
        spared = {n for n, p in named if p.ndim < 2 or n.removeprefix("backbone.body.") in spare or "bias" in n}
        decay = recipe.optimizer.weight_decay
        return [
            {"params": [p for n, p in named if n not in spared], "weight_decay": decay},
            {"params": [p for n, p in named if n in spared], "weight_decay": 0.0},
        ]

    def save_weights(self, weights: Mapping[str, Tensor], path: Path, figures: Mapping[str, Any]) -> None:
        """Write the tensors alone; nobody opens these files again."""
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}, path)


def pretrained(body: nn.Module, root: Path, options: argparse.Namespace) -> tuple[nn.Module, float]:
    """Teach a backbone to tell by which quarter turn a piece of a training tile is rotated; return it and its score."""
    device = pick_device()
    content = json.loads((root / "train.json").read_text())
    pixels = np.stack([np.asarray(Image.open(root / image["file_name"])) for image in content["images"]])
    tiles = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
    head = nn.Linear(WIDTHS[-1], 4)
    model = nn.ModuleList([body, head]).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, max(options.pretrain, 2))
    chance, side, right = np.random.default_rng(options.seed), 224, 0.0
    for step in range(options.pretrain):
        which, turns = chance.integers(len(tiles), size=64), chance.integers(4, size=64)
        corners = chance.integers(0, TILE - side + 1, size=(64, 2))
        pieces = torch.stack([
            torch.rot90(tiles[i, :, y : y + side, x : x + side], int(turn), (1, 2))
            for i, (y, x), turn in zip(which, corners, turns, strict=True)
        ])  # fmt: skip
        answer = torch.from_numpy(turns).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            logits = head(body((pieces.float() / 255 - 0.45) / 0.22)[-1].mean((2, 3)))
            loss = nn.functional.cross_entropy(logits, answer)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step >= options.pretrain * 3 // 4:
            right += float((logits.argmax(1) == answer).float().mean())
    return body, right / max(options.pretrain - options.pretrain * 3 // 4, 1)


def write_tiles(wheel: Path, root: Path) -> dict[str, int]:
    """Cut the annotated photographs into tiles with their boxes, in COCO's format; return how many there are."""
    data = wheel
    if wheel.is_file():
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith("deepforest/data/")]
            archive.extractall(root / "wheel", members)
        data = root / "wheel" / "deepforest" / "data"
    sets: dict[str, dict[str, Any]] = {
        name: {"images": [], "annotations": [], "categories": [{"id": 1, "name": "tree"}]} for name in ("train", "val")
    }
    trees = 0
    for path in sorted(data.glob("*.xml")):
        boxes = read_boxes(path)
        trees += len(boxes)
        with Image.open(path.with_suffix(".png")) as image:
            photograph = np.asarray(image.convert("RGB"))
        border = photograph.shape[1] * 2 // 3
        for part, start, end in (("train", 0, border), ("val", border, photograph.shape[1])):
            _cut(sets[part], root, path.stem, photograph[:, start:end], boxes - [start, 0, start, 0], part)
    for name, content in sets.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    return {"trees": trees, "tiles": len(sets["train"]["images"]), "held_out_tiles": len(sets["val"]["images"])}


def read_boxes(path: Path) -> np.ndarray:
    """Return the boxes of a Pascal VOC file, xyxy in pixels."""
    objects = ElementTree.parse(path).getroot().iter("bndbox")
    names = ("xmin", "ymin", "xmax", "ymax")
    return np.array([[float(box.findtext(name, "nan")) for name in names] for box in objects]).reshape(-1, 4)


def _cut(content: dict[str, Any], root: Path, stem: str, photograph: np.ndarray, boxes: np.ndarray, part: str) -> None:
    """Add the tiles of a piece of a photograph: half over each other to train on, side by side to measure on."""
    height, width = photograph.shape[:2]
    step = STEP if part == "train" else TILE
    for y in range(0, max(height - TILE, 0) + step, step):
        for x in range(0, max(width - TILE, 0) + step, step):
            tile = photograph[y : y + TILE, x : x + TILE]
            if min(tile.shape[:2]) < TILE // 4:
                continue
            filled = np.zeros((TILE, TILE, 3), np.uint8)
            filled[: tile.shape[0], : tile.shape[1]] = tile
            moved = boxes - [x, y, x, y]
            inside = moved.clip(0, [tile.shape[1], tile.shape[0]] * 2)
            areas, visible = (np.prod((b[:, 2:] - b[:, :2]).clip(0), axis=1) for b in (moved, inside))
            kept = inside[visible > 0.5 * areas]
            key, name = len(content["images"]) + 1, f"{part}-{stem}-{y}-{x}.png"
            Image.fromarray(filled).save(root / name)
            content["images"].append({"id": key, "file_name": name, "height": TILE, "width": TILE})
            content["annotations"] += [
                {"id": len(content["annotations"]) + i, "image_id": key, "category_id": 1,
                 "bbox": [a, b, c - a, d - b], "iscrowd": 0, "area": (c - a) * (d - b)}
                for i, (a, b, c, d) in enumerate(kept.tolist(), 1)
            ]  # fmt: skip


if __name__ == "__main__":
    main()
