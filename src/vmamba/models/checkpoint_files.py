"""Weight files on disk: where a source lives, reading it without running code, writing it atomically."""

import os
import pickle
import pickletools
import re
import threading
import uuid
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

HUB_PREFIXES = ("hf-hub:", "hf_hub:")
HUB_FILE = "model.safetensors"


class CheckpointError(ValueError):
    """A weight file that cannot be read, written, or fitted to a model; the message names the file."""


class Ignored:
    """Stands for an object no weight depends on: accepts any arguments and state, keeps nothing, runs nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Ignored":
        """Drop all arguments."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


# Global names that training files hold beside their weights -> what stands for them. The named modules are never
# imported: torch's restricted unpickler is handed the stand-in.
STAND_INS: dict[str, Any] = {
    # The authors' whole training configuration: a dict subclass. Kept, because it tells the exact architecture.
    "yacs.config.CfgNode": OrderedDict,
    # Command-line arguments, as DeiT- and timm-style scripts save them, and the paths among them.
    "argparse.Namespace": Ignored,
    "pathlib.PosixPath": Ignored,
    "pathlib.WindowsPath": Ignored,
    "pathlib._local.PosixPath": Ignored,
    "pathlib._local.WindowsPath": Ignored,
    # Accuracies and losses that were numpy numbers when saved; the second spelling is numpy 2's.
    "numpy.core.multiarray.scalar": Ignored,
    "numpy._core.multiarray.scalar": Ignored,
    "numpy.core.multiarray._reconstruct": Ignored,
    "numpy._core.multiarray._reconstruct": Ignored,
    "numpy.ndarray": Ignored,
    "numpy.dtype": Ignored,
    # The loss curves in every file mmdetection and mmsegmentation write.
    "mmengine.logging.history_buffer.HistoryBuffer": Ignored,
}

# torch keeps one process-wide allow-list; two loads at once would take each other's entries away.
_ALLOW_LIST_LOCK = threading.Lock()


def locate(source: str | os.PathLike[str]) -> Path:
    """Return the local file for a path, a Hugging Face Hub id or an http(s) address, downloading where needed.

    Hub ids: `hf-hub:org/name`, optionally `hf-hub:org/name/file.pth` and a `@revision` at the end.

    Raises:
        CheckpointError: the file does not exist, or could not be downloaded.
    """
    text = os.fspath(source)
    if text.startswith(HUB_PREFIXES):
        return _from_hub(text)
    if text.startswith(("http://", "https://")):
        return download(text)
    path = Path(text).expanduser()
    try:
        if path.is_dir():
            inside = path / HUB_FILE
            hint = f"; did you mean '{inside}'?" if inside.is_file() else "; name the weight file inside it"
            raise CheckpointError(f"'{path}' is a folder{hint}")
        size = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"there is no file '{path}'") from None
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}") from error
    if size == 0:
        raise CheckpointError(f"'{path}' is empty (0 bytes): the copy or download that made it did not finish")
    return path


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    name, _, revision = source.split(":", 1)[1].partition("@")
    parts = name.split("/")
    if len(parts) < 2 or not all(parts):
        raise CheckpointError(
            f"'{source}' is not a Hub id; it has the form hf-hub:org/name or hf-hub:org/name/file.pth"
        )
    repository, filename = "/".join(parts[:2]), "/".join(parts[2:]) or HUB_FILE
    try:
        return Path(hf_hub_download(repository, filename, revision=revision or None))
    except Exception as error:  # the hub's own errors, its HTTP library's and the operating system's share no base
        raise CheckpointError(
            f"could not fetch {filename} of '{repository}' from the Hugging Face Hub "
            f"({type(error).__name__}: {_first_line(error)}); without a connection, download the file elsewhere and "
            "give its path"
        ) from error


def download(url: str, target_hint: str = "") -> Path:
    """Fetch an address into timm's cache (once) and return the file.

    Args:
        url: http(s) address of a weight file.
        target_hint: appended to the error, to say what else the user can do.

    Raises:
        CheckpointError: names the address, the file in the cache, and how to do without the connection.
    """
    from timm.models._hub import download_cached_file, get_cache_dir

    cached = Path(get_cache_dir()) / url.rsplit("/", 1)[-1].split("?")[0]
    known = cached.exists()
    try:
        path = Path(download_cached_file(url, check_hash=True, progress=not known))
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"could not download {url} ({type(error).__name__}: {_first_line(error)}); put the file at '{cached}' "
            f"yourself{target_hint}"
        ) from error
    if path.suffix in (".pth", ".pt", ".bin") and not _looks_complete(path):
        if not known:
            path.unlink(missing_ok=True)
        advice = f"delete '{path}' to fetch it again" if known else "try again"
        raise CheckpointError(f"what came from {url} is incomplete or is no weight file; {advice}{target_hint}")
    return path


def _looks_complete(path: Path) -> bool:
    # A zip archive has its directory at the end, so a download that broke off has none. Older files start with \x80.
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == b"\x80"


def read_file(path: Path) -> tuple[Any, dict[str, str] | None]:
    """Read a weight file, whatever its extension, without running code from it.

    Returns:
        what the file holds (a dict of tensors, or what `torch.save` was given), and the metadata of a safetensors
        file, None for a pickle.

    Raises:
        CheckpointError: the file is damaged, is something else, or is a pickle that refers to anything but tensors,
            plain values and `STAND_INS`.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}") from error
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(f"'{path}' is a web page, not weights: the download got an error or a login page instead")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"'{path}' is a Git LFS pointer, not weights: run `git lfs pull` to fetch the file itself"
        )
    header = int.from_bytes(head[:8], "little")
    if path.suffix == ".safetensors" or (head[8:9] == b"{" and 0 < header < path.stat().st_size):
        return _read_safetensors(path)
    return _read_pickle(path), None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read as safetensors; it is truncated or corrupt ({_first_line(error)})"
        ) from error


def _read_pickle(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        _check_zip(path)
    with _ALLOW_LIST_LOCK, warnings.catch_warnings():
        # torch warns of pickle protocols other than its own; whether the file can be read is decided below.
        warnings.simplefilter("ignore")
        try:
            with _stand_ins():
                return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything, from KeyError to UnicodeDecodeError
            raise _explain(path, error) from error


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Allow the stand-ins in place of what the process may allow under their names (yacs' own class, say)."""
    from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

    def name_of(entry: Any) -> str:
        return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"

    ours = {(stand_in, name) for name, stand_in in STAND_INS.items()}
    displaced = [entry for entry in get_safe_globals() if name_of(entry) in STAND_INS]

    def exchange(out: Collection[Any], into: Collection[Any]) -> None:
        kept = [entry for entry in get_safe_globals() if entry not in out]
        clear_safe_globals()
        add_safe_globals([*kept, *into])

    exchange(displaced, ours)
    try:
        yield
    finally:
        exchange(ours, displaced)


def _check_zip(path: Path) -> None:
    """Compare each record with its checksum, which torch's reader does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.serialization.set_crc32_options(False) writes zeros: such a file has nothing to compare with.
            checked = any(record.CRC for record in archive.infolist())
            damaged = archive.testzip() if checked else None
    except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"'{path}' is truncated or corrupt ({_first_line(error)})") from error
    if damaged is not None:
        raise CheckpointError(f"'{path}' is corrupt: its record {damaged} does not match its checksum; fetch it again")


def _explain(path: Path, error: Exception) -> CheckpointError:
    if _is_text(path):
        return CheckpointError(
            f"'{path}' is a text file and no checkpoint; name a file of weights (.safetensors, .pth)"
        )
    text = str(error)
    found = re.search(r"GLOBAL (\S+) was not an allowed|GLOBAL (\S+) whose module", text)
    stopped_at = [next(group for group in found.groups() if group)] if found else []
    names = _foreign_globals(path) if found or isinstance(error, pickle.UnpicklingError) else []
    if names := list(dict.fromkeys([*names, *(name for name in stopped_at if f"builtins.{name}" not in names)])):
        return CheckpointError(
            f"'{path}' was refused: it refers to {', '.join(names[:3])}, which is no part of weights and could run "
            "code; nothing in it was run. Ask its author for safetensors, or for a file that holds the state dict alone"
        )
    if path.suffix in (".onnx", ".pt2"):
        return CheckpointError(
            f"'{path}' is not a weight file; a model that `vmamba export` wrote goes to `vmamba serve`, and to "
            "vmamba.deployment.files.load_exported"
        )
    if "TorchScript" in text:
        return CheckpointError(f"'{path}' is a TorchScript program, not weights; save its state_dict() instead")
    # What the unpickler stumbled over says nothing to a user, and torch's own words advise to switch its safety off.
    detail = f" ({_first_line(error)})" if isinstance(error, (OSError, RuntimeError)) else ""
    return CheckpointError(f"'{path}' is not a weight file, or is truncated or corrupt{detail}")


def _is_text(path: Path) -> bool:
    """Tell text from pickles, which in protocol 0 are printable too but can be taken apart to their end."""
    with path.open("rb") as file:
        head = file.read(4096)
    # The last character may be cut in two.
    words = head.decode("utf-8", errors="ignore")
    if len(words.encode()) < len(head) - 3 or not all(char.isprintable() or char.isspace() for char in words):
        return False
    try:
        for _ in pickletools.genops(path.read_bytes()):
            pass
    except Exception:  # text taken for opcodes can raise anything
        return True
    return False


def _foreign_globals(path: Path) -> list[str]:
    """List the names a pickle refers to outside torch and the stand-ins, by disassembly alone."""
    names: list[str] = []
    with suppress(Exception):  # the file is already known to be bad: what can be told of it is told
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                record = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                names += _globals_in(archive.read(record))
        else:
            names += _globals_in(path.read_bytes())
    known = {*STAND_INS, "collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set"}
    return [name for name in dict.fromkeys(names) if name not in known and not name.startswith("torch.")]


def _globals_in(data: bytes) -> Iterator[str]:
    strings: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            # Protocols below 3 write Python 2's name of the module.
            yield str(argument).replace(" ", ".", 1).replace("__builtin__.", "builtins.", 1)
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(map(str, strings[-2:]))
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else None
        elif opcode.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
            strings.append(memo.get(argument))
        elif isinstance(argument, str):
            strings.append(argument)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file in the same folder; flush it to disk and move it to `path` when the block succeeds.

    A failure or an interrupt leaves what was at `path` as it was, and no temporary file.

    Raises:
        CheckpointError: the file cannot be written (missing or read-only folder, disk full).
    """
    target = Path(path).expanduser()
    if target.is_dir():
        raise CheckpointError(f"cannot write '{target}': it is a folder; name a file")
    if not target.parent.is_dir():
        raise CheckpointError(f"cannot write '{target}': there is no folder '{target.parent}'")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private; a weight file is as readable as any other
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        flush_folder(target.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, SafetensorError, RuntimeError)):
            raise CheckpointError(
                f"could not write '{target}' ({_first_line(error)}); nothing was left behind"
            ) from error
        raise


def flush_folder(folder: Path) -> None:
    """Make what was renamed in a folder last through a crash."""
    # The rename itself must reach the disk; Windows cannot open folders, and does not need it.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_safetensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: dict[str, str]) -> None:
    """Write tensors and string metadata atomically; tensors that share memory are written apart."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    seen: set[int] = set()
    for name, tensor in plain.items():
        start = tensor.untyped_storage().data_ptr()
        if start in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            plain[name] = tensor.clone()
        seen.add(start)
    _write(path, lambda temporary: save_file(plain, str(temporary), metadata))


def write_pickle(content: Any, path: str | os.PathLike[str]) -> None:
    """Write what `torch.save` takes, atomically."""
    _write(path, lambda temporary: torch.save(content, temporary))


def _write(path: str | os.PathLike[str], writer: Callable[[Path], None]) -> None:
    with replacing(path) as temporary:
        writer(temporary)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
