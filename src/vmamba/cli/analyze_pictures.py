"""The analyses that look inside: `vmamba analyze erf`, `attention` and `routes`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vmamba.cli.analyze import parse_size, print_table, progress, require_positive, save, write_tables
from vmamba.cli.arguments import UsageError, parse

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

    from vmamba.analysis.attention_maps import ScanRecord
    from vmamba.cli.opening import OpenedModel


@dataclass(frozen=True)
class ErfOptions:
    """Draw effective receptive fields and tell the squares that hold shares of them.

    Args:
        models: Names of models, ours or timm's, with random weights.
        checkpoints: Trained models: weights files, run folders, Hugging Face Hub ids or published variants.
        before: Also each checkpoint's architecture before training.
        pretrained: Give models of timm their trained weights.
        routes: Scan patterns to build the models of ours with: cross2d, unidi, bidi or cascade2d.
        stages: Which maps, from 0, or negative from the end.
        images: Image files or folders; by default noise.
        count: How many images to average over.
        img_size: Side of the images in pixels.
        shares: Shares of the contributions the table is about.
        device: cpu, cuda, or auto for the best there is.
        output: Folder for the table (CSV, JSON) and the figure (PNG, SVG).
    """

    models: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    before: bool = False
    pretrained: bool = False
    routes: list[str] = field(default_factory=list)
    stages: list[int] = field(default_factory=lambda: [-1])
    images: list[str] = field(default_factory=list)
    count: int = 50
    img_size: int = 224
    shares: list[float] = field(default_factory=lambda: [0.2, 0.3, 0.5, 0.99])
    device: Literal["auto", "cpu", "cuda"] = "auto"
    output: str = "analysis"


@dataclass(frozen=True)
class AttentionOptions:
    """Draw the attention maps hidden in the scan of one block, over an image.

    Args:
        image: Image file, of any shape.
        checkpoint: Weights file, run folder, Hugging Face Hub id or published variant; by default the newest run.
        model: Name of a variant to take with random weights instead.
        stage: From 0; by default the last but one, or the only one.
        block: Within the stage, from 0; by default the last.
        kind: What the query pixel looks at (activation), how much each pixel looks at itself (diagonal), or the maps
            followed through the blocks of the stage (rollout).
        query: Pixel of the resized image, as ROW,COLUMN from 0; by default its centre.
        mode: attention, (Q⊙w)(K/w)ᵀ; similarity, QKᵀ; decay, w; or influence, with Δ and the skip connection.
        normalization: none, minmax, absolute (over the largest) or rows (each query's add up to one).
        normalize_routes: Normalise each route before the merge instead of the merged map.
        reduction: Mean of the channels, or of their magnitudes (absolute).
        img_size: Shorter side in pixels, or HEIGHTxWIDTH; rounded to multiples of 32.
        device: cpu, cuda, or auto for the best there is.
        output: Folder for the maps (CSV, JSON) and the figure (PNG, SVG).
    """

    image: str = ""
    checkpoint: str | None = None
    model: str | None = None
    stage: int | None = None
    block: int | None = None
    kind: Literal["activation", "diagonal", "rollout"] = "activation"
    query: str | None = None
    mode: Literal["attention", "similarity", "decay", "influence"] = "attention"
    normalization: Literal["none", "minmax", "absolute", "rows"] = "none"
    normalize_routes: bool = False
    reduction: Literal["mean", "absolute"] = "absolute"
    img_size: int | str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    output: str = "analysis"


@dataclass(frozen=True)
class RoutesOptions:
    """Draw the scan routes over an image.

    Args:
        image: Image file.
        grid: Patches the image is cut into, as ROWSxCOLUMNS.
        routes: Pattern: cross2d, unidi, bidi, rows or columns.
        output: Folder for the figure (PNG, SVG) and the order of reading (CSV, JSON).
    """

    image: str = ""
    grid: str = "6x6"
    routes: str = "cross2d"
    output: str = "analysis"


def erf(argv: Sequence[str]) -> int:
    """Draw receptive fields."""
    options = parse("analyze erf", ErfOptions, argv)
    require_positive(options, "count")
    if options.img_size < 32:
        raise ValueError(f"img_size must be 32 or more, not {options.img_size}")
    if not options.models and not options.checkpoints:
        raise UsageError("name what to look at: --models NAME… (random weights) or --checkpoints FILE…")
    from vmamba.analysis.effective_receptive_field import central_squares, effective_receptive_field, field_table
    from vmamba.analysis.figures import draw_fields

    fields, table = {}, []
    for name, model, mean, std in _erf_models(options):
        for stage in options.stages:
            label = name if len(options.stages) == 1 else f"{name}, map {stage}"
            progress(f"receptive field of {label}")
            found = effective_receptive_field(model, _erf_images(options, mean, std), stage)
            if found.skipped:
                print(f"vmamba analyze: {label}: {found.skipped} images had no finite gradient", file=sys.stderr)
            fields[label] = found.contribution
            table += field_table(label, found, options.shares)
    write_tables(options.output, "erf", table)
    shown = [
        (label, *(f"{r['side_px']} px, {r['area']:.1%}" for r in table if r["field"] == label)) for label in fields
    ]
    title = "smallest central squares holding shares of log10(contribution + 1), as published"
    print_table(title, ("field", *(f"{share:.0%}" for share in options.shares)), shown)
    half = {label: central_squares(values, (0.5,), "linear")[0].side for label, values in fields.items()}
    save(options.output, "erf", draw_fields(fields, half))
    return 0


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _erf_models(options: ErfOptions) -> Iterator[tuple[str, nn.Module, Sequence[float], Sequence[float]]]:
    """Yield what to look at, one at a time: name, model, and the mean and deviation it takes images with."""
    import timm

    import vmamba
    from vmamba.analysis.throughput import load_model
    from vmamba.cli.opening import open_model, pick_device

    device = pick_device(options.device)
    ours = vmamba.list_models(published=True)
    for name in options.models:
        if name in ours:
            for routes in options.routes or [""]:
                changes: dict[str, Any] = {"routes": routes} if routes else {}
                label = f"{name}, {routes}" if routes else name
                yield f"{label}, untrained", vmamba.create_model(name, **changes).to(device), *_IMAGENET
        elif options.pretrained and timm.is_model(name):
            yield name, timm.create_model(name, pretrained=True).to(device), *_IMAGENET
        else:
            yield f"{name}, untrained", load_model(name, (options.img_size,) * 2).to(device), *_IMAGENET
    for checkpoint in options.checkpoints:
        opened = open_model(checkpoint, options.device)
        look = opened.preprocessing.mean, opened.preprocessing.std
        if options.before:
            yield f"{checkpoint}, before", vmamba.VMamba(opened.model.config).to(device), *look
        yield checkpoint, opened.model, *look


def _erf_images(options: ErfOptions, mean: Sequence[float], std: Sequence[float]) -> Iterable[Tensor]:
    """Yield the images one by one, resized and cut to a square in the middle; noise where none are named."""
    from vmamba.analysis.effective_receptive_field import noise_images

    size = options.img_size
    if not options.images:
        yield from noise_images(options.count, (size, size))
        return
    from PIL import ImageOps

    from vmamba.cli.predict import find_images
    from vmamba.data.images import read_image

    for path in find_images(options.images)[: options.count]:
        yield _as_tensor(ImageOps.fit(read_image(path), (size, size)), mean, std)


def attention(argv: Sequence[str]) -> int:
    """Draw attention maps."""
    options = parse("analyze attention", AttentionOptions, argv, positionals=[("image", "?")])
    if not options.image:
        raise UsageError("name an image: vmamba analyze attention IMAGE")
    if options.checkpoint and options.model:
        raise UsageError("give --checkpoint for a trained model or --model for random weights, not both")
    from vmamba.analysis.attention_maps import query_position, record_scan, rollout
    from vmamba.analysis.figures import draw_maps
    from vmamba.data.images import read_image

    image = read_image(options.image)
    opened = _open(options)
    image = _resized(image, options.img_size or opened.preprocessing.img_size)
    pixels = _as_tensor(image, opened.preprocessing.mean, opened.preprocessing.std).to(opened.device)
    stages = opened.model.stages()
    stage = max(len(stages) - 2, 0) if options.stage is None else options.stage
    inside = len(stages[stage].blocks) if 0 <= stage < len(stages) else 1
    block = inside - 1 if options.block is None else options.block
    record = record_scan(opened.model, pixels, stage, block)
    row, column = _query(options.query, image)
    position = query_position(record, (row, column), (image.height, image.width))
    if options.kind == "rollout":
        followed, _ = rollout(opened.model, pixels, stage, block)
        maps = {f"rollout, blocks 0–{block}": followed[position]}
    else:
        maps = _maps(options, record, position)
    grids = {name: values.cpu().view(record.height, record.width) for name, values in maps.items()}
    _tell(opened, record, stage, block, options)
    table = [
        {"map": name, "row": r, "column": c, "value": float(values[r, c])}
        for name, values in grids.items()
        for r in range(record.height)
        for c in range(record.width)
    ]
    write_tables(options.output, "attention", table)
    query = None if options.kind == "diagonal" else (row, column)
    label = f"{options.kind}, {options.mode}" if options.kind != "rollout" else "rollout of influence"
    save(options.output, "attention", draw_maps(image, grids, query, label))
    return 0


def _maps(options: AttentionOptions, record: ScanRecord, position: int) -> dict[str, Tensor]:
    """Return the maps of every route and merged, (L,) each."""
    import torch

    from vmamba.analysis.attention_maps import attention_map, diagonal_map

    chosen: dict[str, int | None] = {f"route {k}": k for k in range(record.route_count)} | {"merged": None}
    if options.kind == "diagonal":
        return {name: diagonal_map(record, k, options.mode).flatten() for name, k in chosen.items()}
    # Only normalisation by the whole map needs the maps of all queries.
    needs_all = options.normalization in ("minmax", "absolute")
    queries = None if needs_all else torch.tensor([position], device=record.u.device)
    maps = {}
    for name, k in chosen.items():
        progress(f"map of {name}")
        found = attention_map(
            record,
            k,
            options.mode,
            queries=queries,
            normalization=options.normalization,
            normalize_routes=options.normalize_routes,
            reduction=options.reduction,
        )
        maps[name] = found[position if needs_all else 0]
    return maps


def _tell(opened: OpenedModel, record: ScanRecord, stage: int, block: int, options: AttentionOptions) -> None:
    """Say what was looked at, and for exact modes how well the maps give the scan's output on a few channels' worth."""
    progress("")
    E, L = record.u.shape
    print(f"{opened.name}: stage {stage}, block {block}: a map of {record.height}×{record.width}, {E} channels")
    if options.kind == "activation" and options.mode in ("attention", "influence"):
        from vmamba.analysis.attention_maps import exactness

        if E * L * L * record.route_count < 2e8:  # a second or two
            print(f"maps times V against the scan's output, skip connection aside: off by {exactness(record):.1e}")


def _open(options: AttentionOptions) -> OpenedModel:
    from vmamba.cli.opening import OpenedModel, open_model, pick_device
    from vmamba.data.transforms import Preprocessing
    from vmamba.models.registry import create_model

    if not options.model:
        return open_model(options.checkpoint, options.device)
    model, device = create_model(options.model), pick_device(options.device)
    print(f"{options.model} has random weights: its maps show where the scan can look, not what it has learned")
    size = model.config.img_size
    preprocessing = Preprocessing(img_size=size if isinstance(size, int) else min(size))
    return OpenedModel(model.eval().to(device), options.model, None, preprocessing, {}, device)


def _resized(image: Image, size: int | str) -> Image:
    """Resize to a shorter side, or to HEIGHTxWIDTH, rounded to multiples of 32."""
    height, width = parse_size(size)
    if "x" not in str(size).lower():
        scale = height / min(image.height, image.width)
        height, width = round(image.height * scale), round(image.width * scale)
    height, width = (max(32, round(side / 32) * 32) for side in (height, width))
    return image.resize((width, height))


def _as_tensor(image: Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (1, 3, H, W), normalised."""
    import numpy as np
    import torch

    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    normalized: Tensor = (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    return normalized[None]


def _query(text: str | None, image: Image) -> tuple[int, int]:
    if text is None:
        return image.height // 2, image.width // 2
    parts = text.replace(" ", "").split(",")
    if len(parts) != 2 or not all(part.lstrip("-").isdigit() for part in parts):
        raise ValueError(
            f"--query is ROW,COLUMN, rows 0 to {image.height - 1} and columns 0 to {image.width - 1}; not {text}"
        )
    return int(parts[0]), int(parts[1])


def routes(argv: Sequence[str]) -> int:
    """Draw the routes."""
    options = parse("analyze routes", RoutesOptions, argv, positionals=[("image", "?")])
    if not options.image:
        raise UsageError("name an image: vmamba analyze routes IMAGE")
    from vmamba.analysis.figures import draw_routes
    from vmamba.data.images import read_image
    from vmamba.ops.routes import get_routes, route_index

    grid = parse_size(options.grid)
    figure = draw_routes(read_image(options.image), grid, options.routes)
    table = [
        {"route": k, "step": step, "row": position // grid[1], "column": position % grid[1]}
        for k, route in enumerate(get_routes(options.routes))
        for step, position in enumerate(route_index(route, *grid).tolist())
    ]
    write_tables(options.output, "routes", table)
    save(options.output, "routes", figure)
    return 0
