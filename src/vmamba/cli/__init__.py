"""The command line: `vmamba COMMAND …`. Each command is a file here, imported when it is called, so help is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from vmamba.cli.ending import noting_interrupts

COMMANDS = {
    "quickstart": "train vmamba_nano on handwritten digits, evaluate it, look at what it sees",
    "train": "train a model on your images",
    "eval": "measure how good a model is on labelled images",
    "predict": "say what is in image files",
    "models": "list the variants with parameters, FLOPs and published accuracy",
    "benchmark": "time models against each other: throughput, latency, memory",
    "analyze": "FLOPs, the paper's ladder, scaling, receptive fields, attention maps, routes",
    "doctor": "show versions, devices and which backends can run here",
    "convert": "turn weights of any origin into safetensors, or into the published layout",
    "export": "write a model as ONNX, torch.export program or AOTInductor package, and prove the file",
    "serve": "answer HTTP requests with what is in their images",
    "demo": "open a web page: drop an image, see what the model sees",
    "embed": "turn images into vectors: a folder or shards into Parquet or NumPy",
}
# Package -> the extra that brings it, where that is not `train`.
_EXTRAS = {
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "gradio": "demo",
    "pyarrow": "embed",
    "transformers": "segmentation",
    "faster_coco_eval": "detection",
}
_EXTRA_PACKAGES = {"accelerate", "matplotlib", "sklearn", "tensorboard", "torchmetrics", *_EXTRAS}
_BAD_INPUT, _FAILED, _INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 done in part or failed, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    command, *rest = words
    if command in ("-V", "--version"):
        from vmamba import __version__

        print(f"vmamba {__version__}")
        return 0
    if command not in COMMANDS:
        close = get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        return _complain("vmamba", f"there is no command {command}; {hint}", _BAD_INPUT)
    return _guarded(command, rest)


def _guarded(command: str, words: Sequence[str]) -> int:
    """Run a command so that whatever a user can cause ends in a sentence instead of a traceback."""
    name = f"vmamba {command}"
    with noting_interrupts() as interrupted:
        try:
            return _run(command, words)
        except KeyboardInterrupt:
            return _complain(name, "interrupted", _INTERRUPTED)
        except Exception as error:
            # Ctrl-C in the middle of an import, or of another process's work, comes up as any error there is.
            return _complain(name, "interrupted", _INTERRUPTED) if interrupted else _explained(name, error)


def _explained(name: str, error: Exception) -> int:
    """Say what went wrong where the user can do something about it; raise the error where not."""
    if isinstance(error, BrokenPipeError):
        # The reader of a pipe, such as `head`, has seen enough; keep Python from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_PACKAGES:
            raise error
        extra = _EXTRAS.get(package, "train")
        return _complain(name, f"needs the package {error.name}: pip install 'vmamba[{extra}]'", _BAD_INPUT)
    told = isinstance(error, (ValueError, TypeError, OSError)) or _is_expected(error)
    if os.environ.get("VMAMBA_TRACEBACK") or not told:
        raise error
    return _complain(name, _sentence(error), _FAILED if isinstance(error, RuntimeError) else _BAD_INPUT)


def _run(command: str, words: Sequence[str]) -> int:
    try:
        status = import_module(f"vmamba.cli.{command}").run(words)
    except SystemExit as leaving:  # how --help and --print_config end
        status = leaving.code if isinstance(leaving.code, int) else 0
    sys.stdout.flush()  # here, where a pipe that nobody reads any more is dealt with
    return status


def _is_expected(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and type(error).__name__ in (
        "TrainingFailedError",
        "LoaderError",
        "OutOfMemoryError",
        "ExportFailedError",
    )


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _complain(name: str, message: str, status: int) -> int:
    lines = [line for line in message.splitlines() if line.strip()]
    shown = "\n".join(lines) if name != "vmamba" or len(lines) < 2 else lines[0]
    print(f"{name}: {shown}", file=sys.stderr)
    return status


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
    return (
        "usage: vmamba COMMAND [options]\n\n"
        "VMamba, the visual state-space backbone: train, evaluate, predict.\n\n"
        f"commands:\n{commands}\n\n"
        "`vmamba COMMAND --help` lists the options of a command; every one is also a key of the YAML file that\n"
        "--config reads. `vmamba quickstart` is the place to start."
    )
