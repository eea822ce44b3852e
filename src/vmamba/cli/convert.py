"""`vmamba convert`: weights of any origin into safetensors, or into the published layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmamba.cli.arguments import UsageError, parse


@dataclass(frozen=True)
class ConvertOptions:
    """Turn weights into safetensors (a target in .safetensors) or into the authors' layout (a target in .pth).

    Args:
        source: Any weights file that can be read, or a Hugging Face Hub id.
        target: File to write, ending in .safetensors or .pth; the latter holds no labels and no normalisation.
        prefer_ema: Take the averaged weights where the file has both.
        overwrite: Replace the target if it exists.
    """

    source: str | None = None
    target: str | None = None
    prefer_ema: bool = True
    overwrite: bool = False


def run(argv: Sequence[str]) -> int:
    """Convert as the words say."""
    options = parse("convert", ConvertOptions, argv, positionals=[("source", "?"), ("target", "?")])
    if not options.source or not options.target:
        raise UsageError("name two files: vmamba convert IN OUT, where OUT ends in .safetensors or .pth")
    target = Path(options.target).expanduser()
    if target.exists() and not options.overwrite:
        raise ValueError(f"{target} exists already; --overwrite true replaces it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} to")
    from vmamba.models.checkpoint import convert_checkpoint

    report = convert_checkpoint(options.source, target, prefer_ema=options.prefer_ema)
    print(report)
    print(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")
    if target.suffix.lower() == ".pth":
        print("labels, image size and normalisation are not in it: the published layout has no place for them")
    return 0
