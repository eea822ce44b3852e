"""`vmamba models`: the variants, their sizes and what was published about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Literal

from vmamba.cli.arguments import did_you_mean, parse


@dataclass(frozen=True)
class ModelsOptions:
    """List the variants with parameters, FLOPs and published accuracy.

    Args:
        pattern: Only names that contain this, or are like it where it has a *.
        published: Also every configuration of the paper's ladder and ablations, by the authors' names.
        format: A table to read, Markdown or JSON.
    """

    pattern: str = "*"
    published: bool = False
    format: Literal["table", "markdown", "json"] = "table"


@dataclass(frozen=True)
class ModelRow:
    """A line of the table.

    Attributes:
        name: What `create_model` takes.
        params: Parameters, with the classifier the variant is made with.
        gflops: 10⁹ multiply-accumulates at 224×224 as the authors count them; None for variants of ours.
        top1: Published ImageNet-1K accuracy in percent.
        weights: Whether weights were published.
    """

    name: str
    params: int
    gflops: float
    top1: float | None
    weights: bool


def run(argv: Sequence[str]) -> int:
    """Print the table."""
    options = parse("models", ModelsOptions, argv, positionals=[("pattern", "?")])
    rows = model_rows(options.published, options.pattern)
    if options.format == "json":
        from vmamba.cli.opening import to_json

        print(to_json([asdict(row) for row in rows]))
    elif options.format == "markdown":
        print(as_markdown(rows))
    else:
        _print_table(rows)
    return 0


def model_rows(published: bool = False, pattern: str = "*") -> list[ModelRow]:
    """Return the lines of the table.

    Raises:
        ValueError: No name is like `pattern`.
    """
    from vmamba.models.config import list_models, published_info

    def matching(names: Sequence[str]) -> list[str]:
        return [name for name in names if fnmatch(name, pattern) or pattern in name]

    names = matching(list_models(published=published)) or matching(list_models(published=True))
    if not names:
        hint = did_you_mean(pattern, list_models(published=True))
        raise ValueError(f"no variant is called {pattern}{hint or '; `vmamba models` lists them'}")
    rows = []
    for name in names:
        info = published_info(name)
        if info:
            rows.append(ModelRow(name, info.params, info.gflops, info.top1, info.url is not None))
        else:
            rows.append(ModelRow(name, *_count(name), None, False))
    return rows


def as_markdown(rows: Sequence[ModelRow]) -> str:
    """Return the table as the README has it."""
    lines = [
        "| model | parameters | GFLOPs (224²) | ImageNet-1K top-1 | published weights |",
        "|---|---:|---:|---:|---|",
    ]
    lines += [f"| `{row.name}` | {' | '.join(_cells(row))} |" for row in rows]
    return "\n".join(lines)


def _cells(row: ModelRow) -> list[str]:
    return [
        f"{row.params / 1e6:.2f} M",
        f"{row.gflops:.2f}",
        "–" if row.top1 is None else f"{row.top1:.1f} %",
        "yes" if row.weights else "–",
    ]


def _print_table(rows: Sequence[ModelRow]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "parameters", "GFLOPs (224²)", "ImageNet-1K top-1", "published weights")
    for column in table.columns[1:4]:
        column.justify = "right"
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(row.name, *_cells(row))
    Console().print(table)


def _count(name: str) -> tuple[int, float]:
    """Return the parameters of a variant, and its 10⁹ multiply-accumulates at 224 × 224."""
    import torch

    from vmamba.analysis.flops import count_flops
    from vmamba.models.config import get_config
    from vmamba.models.vmamba import VMamba

    with torch.device("meta"):
        model = VMamba(get_config(name))
    return sum(parameter.numel() for parameter in model.parameters()), count_flops(model).total / 1e9
