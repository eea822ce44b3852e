"""Segmentation on one GPU: mIoU on a composited set beside Swin-T from the same start, training step, large images.

The set is made here: cut-outs (PNG with alpha, one folder a class, such as Debian's tuxpaint-stamps-default sorted into
classes) laid on photographs of scikit-image and scikit-learn, so that masks are exact. Every fourth cut-out of a class
is kept from training; `held_out_seen` shows other compositions of the known ones, `held_out_new` the kept ones alone.
Neither network has seen an image before: both start from random weights, with the same batches and updates.

    python benchmarks/segmentation_gpu.py --stamps FOLDER --output results/segmentation
"""

import argparse
import csv
import dataclasses
import functools
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from vmamba.data.segmentation import open_segmentation_source
from vmamba.data.segmentation_loaders import evaluation_pairs
from vmamba.tasks.segmentation import UperNet, create_segmenter, evaluate, segmentation_loss
from vmamba.tasks.segmentation_inference import InferenceOptions, Segmenter
from vmamba.training.engine import train
from vmamba.training.recipe import OptimizerOptions
from vmamba.training.segmentation import SegmentationTask
from vmamba.training.segmentation_pictures import draw_overlay
from vmamba.training.segmentation_recipe import SegmentationRecipe

SWIN = "swin_tiny_patch4_window7_224"


class SwinMaps(nn.Module):
    """timm's Swin-T as published for UperNet: the maps of four stages, with a norm on each."""

    def __init__(self, side):
        super().__init__()
        self.body = timm.create_model(SWIN, features_only=True, img_size=side, drop_path_rate=0.2)
        self.channels = self.body.feature_info.channels()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, images):
        """Return four maps (B, C, H, W)."""
        return [norm(m).permute(0, 3, 1, 2) for norm, m in zip(self.norms, self.body(images), strict=True)]


def swin_segmenter(classes, side):
    backbone = SwinMaps(side)
    return UperNet(backbone, backbone.channels, classes)


class SwinTask(SegmentationTask):
    """The same task with Swin-T for a backbone."""

    def _build_model(self):
        return swin_segmenter(len(self.source.classes), self.recipe.crop)


@functools.cache
def photographs():
    """Return the photographs that come with scikit-learn and scikit-image."""
    from sklearn.datasets import load_sample_images

    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    try:
        from skimage import data
    except ModuleNotFoundError:
        return pictures
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        try:
            pictures.append(Image.fromarray(getattr(data, name)()).convert("RGB"))
        except (OSError, ValueError, ModuleNotFoundError) as error:  # not in the wheel, and there is no network
            print(f"without skimage.data.{name}: {error}", file=sys.stderr)
    return pictures


def composite(arguments):
    """Write one picture and its mask."""
    folder, number, side, seed, cutouts = arguments
    generator = np.random.default_rng([seed, number])
    backgrounds = photographs()
    background = backgrounds[generator.integers(len(backgrounds))]
    scale = side / min(background.size) * float(generator.uniform(1.0, 2.0))
    background = background.resize([max(round(length * scale), side) for length in background.size])
    left, top = (int(generator.integers(length - side + 1)) for length in background.size)
    picture, mask = background.crop((left, top, left + side, top + side)), Image.new("L", (side, side), 0)
    for _ in range(int(generator.integers(2, 6))):
        value, path = cutouts[generator.integers(len(cutouts))]
        stamp = Image.open(path).convert("RGBA")
        factor = side * float(generator.uniform(0.2, 0.55)) / max(stamp.size)
        stamp = stamp.resize([max(round(length * factor), 2) for length in stamp.size])
        stamp = stamp.rotate(float(generator.uniform(-25, 25)), expand=True)
        place = tuple(int(generator.integers(-length // 4, side - length * 3 // 4 + 1)) for length in stamp.size)
        picture.paste(stamp, place, stamp)
        mask.paste(value, place, stamp.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0))
    picture.save(folder / "images" / f"{number:05d}.jpg", quality=92)
    mask.save(folder / "masks" / f"{number:05d}.png")


def make_set(root, stamps, side, train_number, held_out_number):
    """Composite the set; return the folders of the held-out parts."""
    classes = sorted(entry.name for entry in stamps.iterdir() if entry.is_dir())
    if len(classes) < 8:
        raise SystemExit(f"{stamps} holds {len(classes)} class folders; 8 or more are needed")
    files = {name: sorted((stamps / name).glob("*.png")) for name in classes}
    known, new = (
        [(i, f) for i, name in enumerate(classes, 1) for k, f in enumerate(files[name]) if (k % 4 == 3) == kept]
        for kept in (False, True)
    )
    names = "\n".join(["background", *classes]) + "\n"
    jobs = []
    for part, (number, cutouts) in {
        "train": (train_number, known),
        "val": (held_out_number, known),
        "new": (held_out_number, new),
    }.items():
        folder = root / ("set" if part != "new" else "new") / (part if part != "new" else "val")
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True)
        seed = {"train": 0, "val": 1, "new": 2}[part]
        jobs += [(folder, index, side, seed, cutouts) for index in range(number)]
    (root / "new" / "train").symlink_to(root.resolve() / "new" / "val")
    for name in ("set", "new"):
        (root / name / "classes.txt").write_text(names)
    with ProcessPoolExecutor() as pool:
        list(pool.map(composite, jobs, chunksize=16))
    return root / "set", root / "new"


def quality(arguments, rows):
    """Train both networks with the same budget and measure them on known and new objects."""
    data, new = make_set(arguments.output, arguments.stamps, arguments.side, arguments.pictures, arguments.held_out)
    side = arguments.side
    recipe = SegmentationRecipe(
        data=str(data),
        model=arguments.model,
        model_options={"drop_path_rate": 0.2},
        crop=side,
        short_side=side,
        long_side=4 * side,
        scales=[0.75, 1.5],
        epochs=4,
        updates=arguments.updates // 4,
        batch_size=16,
        precision=arguments.precision,
        optimizer=OptimizerOptions(lr=3e-4, min_lr=0.0, warmup_lr=1e-7, warmup_epochs=0.4, weight_decay=0.01),
        trackers=(),
    )
    networks = {arguments.model: SegmentationTask, SWIN: SwinTask}
    for name in arguments.networks or networks:
        make_task = networks[name]
        folder = arguments.output / name
        options = dataclasses.replace(recipe, output=str(folder))
        began = time.perf_counter()
        result = train(options, make_task=make_task)
        seconds = time.perf_counter() - began
        task = make_task(options)
        weights = load_weights(folder / "last.safetensors")
        task.model.load_state_dict(weights)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        segmenter = Segmenter(task.model.to(device))
        source = open_segmentation_source(str(new))
        batches = (
            (b.images.to(device), b.masks.to(device)) for b in evaluation_pairs(source.held_out, task.preprocessing)
        )
        unknown = evaluate(segmenter, batches, source.classes, device)
        for part, report in (("held_out_seen", result.report), ("held_out_new", unknown)):
            rows.append(
                (name, f"miou_{part}", f"{report.miou:.4f}", f"{arguments.updates} updates of 16, {seconds:.0f} s")
            )
            print(rows[-1], flush=True)
        for index in range(3):
            picture, _ = source.held_out.read(index)
            labels = segmenter(task.preprocessing(picture)[None].to(device), picture.size[::-1])[0].cpu().numpy()
            draw_overlay(picture, labels, source.classes).save(arguments.output / f"{name}-new-{index}.png")


def load_weights(path):
    from safetensors.torch import load_file

    return load_file(path)


def step_time(arguments, rows):
    """Time training steps of both networks in turn: crops of 512, batch 16, bf16, AdamW."""
    device, batch, side, classes = torch.device("cuda"), 16, 512, 150
    images = torch.randn(batch, 3, side, side, device=device)
    masks = torch.randint(0, classes, (batch, side, side), device=device, dtype=torch.uint8)
    models = {
        arguments.model: create_segmenter(arguments.model, classes, drop_path_rate=0.2),
        SWIN: swin_segmenter(classes, side),
    }
    steps = {}
    for name, model in models.items():
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step(model=model, optimizer=optimizer):
            with torch.autocast("cuda", torch.bfloat16):
                output = model(images)
            segmentation_loss(output, masks).backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step
        for _ in range(5):
            step()
    times = {name: [] for name in steps}
    for _ in range(8):
        for name, step in steps.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(4):
                step()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - began) / 4)
    speeds = {name: batch / statistics.median(values) for name, values in times.items()}
    for name, speed in speeds.items():
        rows.append((name, "training_images_per_second", f"{speed:.1f}", f"{speed / speeds[SWIN]:.3f} x {SWIN}"))
        print(rows[-1], flush=True)


def large_images(arguments, rows):
    """Measure the peak memory of 4096x4096 pixels in 150 classes, beside the weights."""
    device = torch.device("cuda")
    model = create_segmenter(arguments.model, 150).to(device).eval()
    image = torch.randn(1, 3, 4096, 4096, device=device)
    for mode in ("slide", "whole"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            labels = Segmenter(model, InferenceOptions(mode))(image, (4096, 4096))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        assert labels.shape == (1, 4096, 4096)
        gib = (torch.cuda.max_memory_allocated() - before) / 2**30
        rows.append((arguments.model, f"gib_4096_{mode}", f"{gib:.2f}", f"{seconds:.2f} s, bf16"))
        print(rows[-1], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stamps", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="vmamba_tiny")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--held_out", type=int, default=200)
    parser.add_argument("--updates", type=int, default=1600)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--networks", nargs="+", help="of the part quality; by default --model and Swin-T")
    parser.add_argument("--parts", nargs="+", default=["step", "large", "quality"])
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    parts = {"step": step_time, "large": large_images, "quality": quality}
    for part in arguments.parts:
        parts[part](arguments, rows)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    with (arguments.output / "segmentation.csv").open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["model", "figure", "value", "note", "device", "torch", "commit"])
        writer.writerows([*row, device, torch.__version__, found.stdout.strip()] for row in rows)


if __name__ == "__main__":
    main()
