"""The analyses that count and time: `vmamba analyze flops`, `ladder` and `scaling`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from vmamba.cli.analyze import number, parse_size, percent, print_table, progress, require_positive, save, write_tables
from vmamba.cli.arguments import parse

if TYPE_CHECKING:
    from vmamba.analysis.scaling import ScalingRow
    from vmamba.analysis.throughput import Precision

_PEERS = ("swin_tiny_patch4_window7_224", "convnext_tiny", "deit_small_patch16_224")
_SIZES = (224, 288, 384, 512, 640, 768, 1024)


@dataclass(frozen=True)
class FlopsOptions:
    """Count multiply-accumulates: by part and module, and how they grow with the image.

    Args:
        models: Names of models, ours or timm's.
        compare: Peers whose growth is drawn beside theirs.
        img_size: Side of the image in pixels, or HEIGHTxWIDTH.
        convention: The scan as in the paper's tables (authors), or in their struck-through figures (naive).
        sizes: Sides of the images for the growth; [] leaves the growth out.
        output: Folder for the tables (CSV, JSON) and figures (PNG, SVG).
    """

    models: list[str] = field(default_factory=lambda: ["vmamba_tiny"])
    compare: list[str] = field(default_factory=lambda: list(_PEERS))
    img_size: int | str = 224
    convention: Literal["authors", "naive"] = "authors"
    sizes: list[int] = field(default_factory=lambda: list(_SIZES))
    output: str = "analysis"


@dataclass(frozen=True)
class LadderOptions:
    """Build, count and time every step of the paper's acceleration ladder.

    Args:
        img_size: Side of the images in pixels.
        batch_size: Images in a batch; by default the paper's 128 on a GPU, 1 elsewhere.
        modes: inference, training (forward, cross-entropy and backward), or both.
        precision: By default autocast-bfloat16 on a GPU and float32 elsewhere; the paper's was autocast-float16.
        device: cpu, cuda, or auto for the best there is.
        rounds: Turns each step takes; the median counts.
        seconds_a_round: About how long a turn lasts.
        count_only: Parameters and FLOPs alone, nothing timed.
        output: Folder for the table (CSV, JSON) and the staircase (PNG, SVG).
    """

    img_size: int = 224
    batch_size: int | None = None
    modes: list[Literal["inference", "training"]] = field(default_factory=lambda: ["inference", "training"])
    precision: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rounds: int = 5
    seconds_a_round: float = 0.3
    count_only: bool = False
    output: str = "analysis"


@dataclass(frozen=True)
class ScalingOptions:
    """Measure how models take to larger images: speed, FLOPs, memory and, given data, accuracy.

    Args:
        models: Names of models, ours or timm's.
        compare: Peers to measure beside them.
        sizes: Sides of the images in pixels.
        batch_size: Images in a batch of the first size; at others as many as have the same number of pixels.
        precision: By default bfloat16 on a GPU and float32 elsewhere.
        compiled: eager, or a mode of torch.compile.
        mode: inference, or training (forward, cross-entropy and backward).
        device: cpu, cuda, or auto for the best there is.
        rounds: Turns each model takes; the median counts.
        seconds_a_round: About how long a turn lasts.
        count_only: FLOPs (and accuracy) alone, nothing timed.
        checkpoint: Model whose accuracy is measured, alone: weights file, run folder, Hub id or published variant.
        data: What it is measured on: digits, fashion-mnist, fashion-mnist:FOLDER or a folder of class folders.
        tune: Also with the linear head tuned on the training images at each size.
        epochs: Passes of that tuning.
        output: Folder for the table (CSV, JSON) and the figure (PNG, SVG).
    """

    models: list[str] = field(default_factory=lambda: ["vmamba_tiny"])
    compare: list[str] = field(default_factory=lambda: list(_PEERS))
    sizes: list[int] = field(default_factory=lambda: list(_SIZES))
    batch_size: int | None = None
    precision: str | None = None
    compiled: str = "eager"
    mode: Literal["inference", "training"] = "inference"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rounds: int = 5
    seconds_a_round: float = 0.3
    count_only: bool = False
    checkpoint: str | None = None
    data: str | None = None
    tune: bool = False
    epochs: int = 20
    output: str = "analysis"


def flops(argv: Sequence[str]) -> int:
    """Count."""
    options = parse("analyze flops", FlopsOptions, argv)
    import torch

    from vmamba.analysis.figures import draw_growth, draw_stages
    from vmamba.analysis.flops import StageCount, count_flops
    from vmamba.analysis.scaling import count_scaling
    from vmamba.analysis.throughput import load_model

    size = parse_size(options.img_size)
    stages: list[dict[str, Any]] = []
    modules: list[dict[str, Any]] = []
    for name in options.models:
        with torch.device("meta"):
            model = load_model(name, size)
        count = count_flops(model, size, convention=options.convention)
        facts = {"model": name, "height": size[0], "width": size[1], "convention": options.convention}
        total = StageCount("total", sum(p.numel() for p in model.parameters()), count.total)
        parts = [*count.stages, total]
        stages += [{**facts, **asdict(part)} for part in parts]
        modules += [{**facts, "module": module, "flops": flops} for module, flops in count.by_module.items()]
        title = f"{name}, {size[0]}×{size[1]}"
        shown = [(part.part, f"{part.params / 1e6:.3f}", f"{part.flops / 1e9:.4f}") for part in parts]
        print_table(title, ("part", "parameters, M", "GFLOPs"), shown)
        drawn = [(part.part, part.flops / 1e9) for part in count.stages]
        save(options.output, f"flops_{name}", draw_stages(drawn, f"{title}: {count.total / 1e9:.3f} G"))
    write_tables(options.output, "flops_stages", stages)
    write_tables(options.output, "flops_modules", modules)
    if options.sizes:
        rows = count_scaling([*options.models, *options.compare], options.sizes, convention=options.convention)
        write_tables(
            options.output, "flops_growth", [{"model": r.model, "size": r.size, "gflops": r.gflops} for r in rows]
        )
        save(options.output, "flops_growth", draw_growth(rows))
    return 0


def ladder(argv: Sequence[str]) -> int:
    """Climb the ladder."""
    options = parse("analyze ladder", LadderOptions, argv)
    from vmamba.analysis.figures import draw_ladder
    from vmamba.analysis.ladder import count_ladder, ladder_table, measure_ladder, reversals
    from vmamba.analysis.throughput import environment

    device = _device(options.device)
    on_gpu = device == "cuda"
    require_positive(options, "img_size", "rounds", "seconds_a_round", "batch_size")
    size = (options.img_size, options.img_size)
    if options.count_only:
        rows = count_ladder(size)
    else:
        rows = measure_ladder(
            device,
            img_size=size,
            batch_size=options.batch_size or (128 if on_gpu else 1),
            precision=_precision(options.precision or ("autocast-bfloat16" if on_gpu else "float32")),
            modes=options.modes,
            rounds=options.rounds,
            seconds_a_round=options.seconds_a_round,
            report=progress,
        )
    table = ladder_table(rows, device)
    write_tables(options.output, "ladder", table)
    columns = ("step", "params, M", "GFLOPs", "published", "measured", "published, training", "measured, training")
    shown = [
        (r["step"], f"{r['params'] / 1e6:.1f}", f"{r['gflops']:.2f}", number(r["published_inference"]),
         number(r["measured_inference"]), number(r["published_training"]), number(r["measured_training"]))
        for r in table
    ]  # fmt: skip
    print_table(f"images/s; published on an A100, measured on {environment(device)['device']}", columns, shown)
    for r in table:
        print(f"{r['step']:<15} {r['change']}")
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        print(f"not timed here, {', '.join(row.step.label for row in rows if row.reason == reason)}: {reason}")
    for mode in () if options.count_only else options.modes:
        other = ", ".join(f"{first}–{second}" for first, second in reversals(rows, mode))
        print(f"{mode}: neighbouring steps that go the other way than published: {other or 'none'}")
    if not options.count_only:
        save(options.output, "ladder", draw_ladder(rows, environment(device)["device"]))
    return 0


def scaling(argv: Sequence[str]) -> int:
    """Scale up."""
    options = parse("analyze scaling", ScalingOptions, argv)
    require_positive(options, "rounds", "seconds_a_round", "batch_size", "epochs")
    if not options.sizes or min(options.sizes) < 32:
        raise ValueError(f"sizes must be one or more sides of at least 32 pixels; got {options.sizes}")
    if bool(options.data) != bool(options.checkpoint):
        raise ValueError("accuracy needs both --checkpoint and --data")
    from vmamba.analysis.figures import draw_scaling
    from vmamba.analysis.scaling import count_scaling, measure_scaling, scaling_table
    from vmamba.analysis.throughput import CompileMode, environment

    device = _device(options.device)
    on_gpu = device == "cuda"
    if options.compiled not in get_args(CompileMode):
        raise ValueError(f"--compiled takes {', '.join(get_args(CompileMode))}; not {options.compiled}")
    names = [] if options.checkpoint else list(dict.fromkeys([*options.models, *options.compare]))
    if options.count_only or not names:
        rows = count_scaling(names, options.sizes)
    else:
        rows = measure_scaling(
            names,
            options.sizes,
            device,
            batch_size=options.batch_size or (128 if on_gpu else 1),
            base_size=options.sizes[0],
            precision=_precision(options.precision or ("bfloat16" if on_gpu else "float32")),
            compiled=options.compiled,  # type: ignore[arg-type]
            mode=options.mode,
            rounds=options.rounds,
            seconds_a_round=options.seconds_a_round,
            report=progress,
        )
    rows += _accuracy(options)
    write_tables(options.output, "scaling", table := scaling_table(rows, device))
    shown = [
        (r["model"], str(r["size"]), f"{r['gflops']:.2f}", number(r["batch_size"]), number(r["images_per_second"]),
         number(r["peak_memory_mib"]), percent(r["top1"]), percent(r["top1_tuned"]))
        for r in table
    ]  # fmt: skip
    columns = ("model", "px", "GFLOPs", "batch", "images/s", "MiB", "top-1", "head tuned")
    machine = environment(device)["device"]
    print_table(f"{options.mode} on {machine}", columns, shown)
    save(options.output, "scaling", draw_scaling(rows, machine if any(row.speed for row in rows) else ""))
    return 0


def _accuracy(options: ScalingOptions) -> list[ScalingRow]:
    """Measure the checkpoint's accuracy at each size, where one was given."""
    if not options.checkpoint or not options.data:
        return []
    from vmamba.analysis.flops import count_flops
    from vmamba.analysis.scaling import ScalingRow, accuracy_by_size
    from vmamba.cli.opening import open_model
    from vmamba.data.sources import open_source, with_labels

    opened = open_model(options.checkpoint, options.device)
    source = open_source(options.data, opened.metadata.get("held_out") or 0.2)
    labels = opened.labels or source.classes
    train, held_out = (with_labels(images, source.classes, labels) for images in (source.train, source.held_out))
    found = accuracy_by_size(
        opened.model, opened.preprocessing, train if options.tune else None, held_out, labels, options.sizes,
        epochs=options.epochs, report=progress,
    )  # fmt: skip
    params, name = sum(p.numel() for p in opened.model.parameters()), Path(opened.name).stem
    return [
        ScalingRow(name, size, params, count_flops(opened.model, (size, size)).total / 1e9, None, *accuracy)
        for size, accuracy in found.items()
    ]


def _device(name: str) -> str:
    from vmamba.cli.opening import pick_device

    return pick_device(name).type


def _precision(name: str) -> Precision:
    from vmamba.analysis.throughput import Precision

    if name not in get_args(Precision):
        raise ValueError(f"--precision takes {', '.join(get_args(Precision))}; not {name}")
    return name  # type: ignore[return-value]
