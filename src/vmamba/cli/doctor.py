"""`vmamba doctor`: what this machine has, and what "auto" makes of it."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from vmamba.cli.arguments import parse

_PACKAGES = ("vmamba", "torch", "torchvision", "triton", "timm", "accelerate", "torchmetrics", "safetensors", "numpy")


@dataclass(frozen=True)
class DoctorOptions:
    """Show versions, devices and, for every operation, the backend that "auto" picks and why not another.

    Args:
        format: Tables to read, or JSON for a bug report.
    """

    format: Literal["table", "json"] = "table"


def run(argv: Sequence[str]) -> int:
    """Print what was found."""
    options = parse("doctor", DoctorOptions, argv)
    findings = examine()
    if options.format == "json":
        from vmamba.cli.opening import to_json

        print(to_json(findings))
    else:
        _print_tables(findings)
    return 0


def examine() -> dict[str, Any]:
    """Return versions, devices and backends as plain values."""
    import torch

    from vmamba.ops.capabilities import explain_backends

    devices = [f"cpu: {torch.get_num_threads()} threads of {os.cpu_count()} cores, {platform.machine()}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB,"
            f" compute capability {properties.major}.{properties.minor}"
        )
    places = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "system": platform.platform(),
        "cuda": torch.version.cuda,
        "devices": devices,
        "caches": _caches(),
        "backends": [{"device": place, **row._asdict()} for place in places for row in explain_backends(place)],
    }


def _caches() -> list[dict[str, Any]]:
    """Say where compiled kernels are kept between runs and how much is there: where it is empty, a first run waits."""
    from vmamba.ops.nvrtc import cache_folder

    places = {
        "CUDA kernels (NVRTC, about a second each)": cache_folder(),
        "Triton kernels (seconds each)": Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"),
        "torch.compile (tens of seconds a model)": Path(
            os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
        ),
    }
    rows = []
    for name, folder in places.items():
        sizes = []
        for path in folder.rglob("*") if folder.is_dir() else ():
            with contextlib.suppress(OSError):  # a run of now may be moving its files about
                sizes += [path.stat().st_size] if path.is_file() else []
        rows.append({"kind": name, "folder": str(folder), "files": len(sizes), "bytes": sum(sizes)})
    return rows


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.getuid())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _print_tables(findings: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in findings["versions"].items())
    console.print(f"versions  {versions}", highlight=False)
    console.print(f"system    {findings['system']}; torch built for CUDA {findings['cuda'] or '–'}", highlight=False)
    for device in findings["devices"]:
        console.print(f"device    {device}", highlight=False)
    for cache in findings["caches"]:
        held = f"{cache['files']:,} files, {cache['bytes'] / 2**20:,.1f} MiB" if cache["files"] else "empty"
        console.print(f"cache     {cache['kind']}: {cache['folder']}, {held}", highlight=False)
    table = Table("device", "operation", "backend", "runs", "why")
    previous = ""
    for row in findings["backends"]:
        if previous not in ("", row["device"] + row["op"]):
            table.add_section()
        previous = row["device"] + row["op"]
        runs = "[green]yes[/green]" if row["can_run"] else "[red]no[/red]"
        table.add_row(row["device"], row["op"], row["backend"], runs, row["reason"])
    console.print(table)
