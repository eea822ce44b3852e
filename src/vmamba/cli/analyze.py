"""`vmamba analyze`: what the paper argues with, as tables and figures of any model, image and checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmamba.cli.arguments import UsageError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ANALYSES = {
    "flops": "multiply-accumulates by part, module and image size",
    "ladder": "the paper's acceleration steps, built, counted and timed here",
    "scaling": "speed, FLOPs, memory and accuracy from small to large images",
    "erf": "effective receptive fields",
    "attention": "the attention maps hidden in the scan, over an image",
    "routes": "a picture of the scan routes over an image",
}
_FILES = {"flops": "numbers", "ladder": "numbers", "scaling": "numbers"}


def run(argv: Sequence[str]) -> int:
    """Run one analysis."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, ANALYSES))
        lines = "\n".join(f"  {name:<{width}}  {what}" for name, what in ANALYSES.items())
        print(f"usage: vmamba analyze ANALYSIS [options]\n\nanalyses:\n{lines}\n\n`vmamba analyze ANALYSIS --help`")
        return 0
    name, *rest = argv
    if name not in ANALYSES:
        raise UsageError(f"there is no analysis {name}{did_you_mean(name, ANALYSES)}; there are {', '.join(ANALYSES)}")
    status: int = getattr(import_module(f"vmamba.cli.analyze_{_FILES.get(name, 'pictures')}"), name)(rest)
    return status


def parse_size(text: int | str) -> tuple[int, int]:
    """Read a side in pixels, or HEIGHTxWIDTH."""
    parts = str(text).lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"a size is a number or HEIGHTxWIDTH, such as 224x288; not {text}")
    return int(parts[0]), int(parts[-1])


def require_positive(options: Any, *names: str) -> None:
    """Raise ValueError for an option that is given and not more than 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be more than 0, not {value:g}")


def progress(line: str) -> None:
    """Show what is being done, on standard error, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def number(value: float | None) -> str:
    """Format a measured number, or a dash for none."""
    return "–" if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """Format a share, or a dash for none."""
    return "–" if value is None else f"{value:.1%}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, all but its first column aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    progress("")
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_tables(folder: str, name: str, records: Sequence[dict[str, Any]]) -> None:
    """Write records as NAME.csv and NAME.json into a folder, which is made."""
    from vmamba.analysis.throughput import write_csv
    from vmamba.cli.opening import to_json, write_text

    target = Path(folder).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    write_csv(target / f"{name}.csv", records)
    write_text(str(target / f"{name}.json"), to_json(records))
    print(f"written: {target / name}.csv, .json", file=sys.stderr)


def save(folder: str, name: str, figure: Figure) -> None:
    """Write a figure as NAME.png and NAME.svg into a folder."""
    from vmamba.analysis.figures import save_figure

    written = save_figure(figure, Path(folder) / f"{name}.png")
    print(f"written: {written[0]}, .svg", file=sys.stderr)
