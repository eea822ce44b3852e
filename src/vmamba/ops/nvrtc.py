"""CUDA C++ compiled at run time: NVRTC and the CUDA driver through ctypes, a disk cache, launches on torch's stream.

Nothing is compiled at install and no header is needed at run time; both libraries are ones that a CUDA build of torch
already depends on.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

Argument: TypeAlias = "torch.Tensor | int | float | Numbers | ctypes.Structure | None"
Define = tuple[str, int | str]

_OPTIONS = ("--std=c++17", "--ftz=true", "--extra-device-vectorization", "-default-device")
_ERROR_INVALID_CONTEXT = 201
_ATTRIBUTE_MAX_DYNAMIC_SHARED = 8
_ATTRIBUTE_NON_PORTABLE_CLUSTER = 14
_ATTRIBUTE_REGISTERS = 4
_ATTRIBUTE_LOCAL_BYTES = 3
_LAUNCH_CLUSTER_DIMENSION = 4
_PORTABLE_CLUSTER = 8
_DEFAULT_SHARED_LIMIT = 48 * 1024
_lock = threading.RLock()


def aligned(tensor: torch.Tensor, multiple: int = 16) -> torch.Tensor:
    """Make contiguous and, where a view starts off a multiple of the bytes that a kernel loads at once, copy."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % multiple == 0 else tensor.clone()


def device_unfit(device: torch.device) -> str | None:
    """Say why a GPU is too old for the CUDA kernels, or return None when it is not."""
    # Compilers warn of cached functions, and find a constant in this one anyway.
    compiling = torch.compiler.is_compiling()
    capability = torch.cuda.get_device_capability(device) if compiling else _capability(device)
    if capability < (8, 0):
        return f"the CUDA kernels need compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}."
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class CompilationError(RuntimeError):
    """NVRTC rejected a source; the message carries its log."""


def _nvrtc_candidates() -> list[str]:
    major = (torch.version.cuda or "").split(".")[0]
    names = [f"libnvrtc.so.{major}", "libnvrtc.so"]
    # The wheels put the library where the dynamic linker does not look unless torch has loaded it already.
    folders = [Path(entry) / "nvidia" for entry in sys.path if entry]
    wheels = [str(path) for folder in folders for path in sorted(folder.glob(f"*/lib/libnvrtc.so.{major}"))]
    return wheels + names


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    failures = []
    for name in _nvrtc_candidates():
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            failures.append(str(error))
    raise OSError("; ".join(failures))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def compiler_unavailable() -> str | None:
    """Say why CUDA sources cannot be compiled here, or return None when they can (no GPU is needed to compile)."""
    if torch.version.cuda is None:
        return "this torch is not built for CUDA, so it brings no NVRTC; install a CUDA build of torch"
    if not sys.platform.startswith("linux"):
        return f"run-time compilation of CUDA is supported on Linux, and this is {sys.platform}"
    try:
        _nvrtc()
    except OSError as error:
        return f"the NVRTC library of CUDA {torch.version.cuda} cannot be loaded ({error})"
    return None


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Return the (major, minor) version of the NVRTC library in use."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check_nvrtc(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _check_nvrtc(status: int) -> None:
    if status:
        describe = _nvrtc().nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        raise CompilationError(f"NVRTC failed: {describe(status).decode()}")


def _check_driver(status: int, action: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown error"
        raise RuntimeError(f"the CUDA driver could not {action}: {reason} (code {status})")


def cache_folder() -> Path:
    """Return the folder of compiled kernels: in `$VMAMBA_CACHE_DIR`, else `$XDG_CACHE_HOME` or `~/.cache`."""
    explicit = os.environ.get("VMAMBA_CACHE_DIR")
    if explicit:
        return Path(explicit) / "cubin"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "vmamba" / "cubin"


def _with_defines(source: str, defines: Sequence[Define]) -> str:
    # As text rather than as -D, which would also rewrite NVRTC's built-in header.
    return "".join(f"#define {name} {value}\n" for name, value in defines) + source


def compile_cubin(
    source: str, capability: tuple[int, int], defines: Sequence[Define] = (), use_cache: bool = True
) -> bytes:
    """Compile CUDA C++ to machine code for one compute capability, through the disk cache.

    Args:
        source: the translation unit; kernels are `extern "C"`, so that they are found under their own names.
        capability: for example (9, 0). The GPU need not be present.
        defines: preprocessor definitions, the compile-time parameters of a kernel.
        use_cache: read and write the cache in `$VMAMBA_CACHE_DIR`, else `$XDG_CACHE_HOME/vmamba`, else
            `~/.cache/vmamba`.

    Raises:
        CompilationError: with the compiler's log.
    """
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", *_OPTIONS]
    source = _with_defines(source, defines)
    key = hashlib.sha256("\0".join([source, *options, str(nvrtc_version())]).encode()).hexdigest()
    path = cache_folder() / f"{key}.cubin"
    if use_cache:
        try:
            return path.read_bytes()
        except OSError:
            pass  # absent or unreadable: compile
    cubin = _compile(source, options)
    if use_cache:
        _write_atomically(path, cubin)
    return cubin


def _compile(source: str, options: Sequence[str]) -> bytes:
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    _check_nvrtc(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"vmamba.cu", 0, None, None))
    try:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), encoded)
        if status:
            size = ctypes.c_size_t()
            _check_nvrtc(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _check_nvrtc(nvrtc.nvrtcGetProgramLog(program, log))
            raise CompilationError(f"NVRTC rejected the source with {' '.join(options)}:\n{log.value.decode()}")
        size = ctypes.c_size_t()
        _check_nvrtc(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check_nvrtc(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _write_atomically(path: Path, content: bytes) -> None:
    """Write beside the target and rename, so that processes starting together never read half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        return  # a read-only home only costs the next process its own compilation


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Numbers:
    """Integers of 32 bits, arguments one after the other, that a kernel is launched with again and again."""

    def __init__(self, *values: int) -> None:
        self.layout, self.values = "i" * len(values), values


class _Arguments(threading.local):
    """Where a thread lays out what it launches with: the driver copies it before a launch returns."""

    def __init__(self) -> None:
        self._layouts: dict[str, tuple[struct.Struct, Any, Any]] = {}
        self.attribute = _LaunchAttribute(id=_LAUNCH_CLUSTER_DIMENSION)
        self.attribute.value[1] = self.attribute.value[2] = 1
        self.config = _LaunchConfig(attributes=ctypes.pointer(self.attribute), attribute_count=1)
        self.config.block[1] = self.config.block[2] = 1

    def lay_out(self, arguments: Sequence[Argument]) -> Any:
        """Give an array of pointers to the arguments, valid until the next call."""
        # This is most of what a launch costs the host: kinds in the order of how often they come, and told by identity.
        layout, values, structures = "", [], []
        for argument in arguments:
            kind = type(argument)
            if kind is torch.Tensor or kind is torch.nn.Parameter:
                layout += "Q"
                values.append(argument.data_ptr())  # type: ignore[union-attr]
            elif isinstance(argument, Numbers):
                layout += argument.layout
                values += argument.values
            elif argument is None:
                layout += "Q"
                values.append(0)
            elif isinstance(argument, int):
                layout += "i"
                values.append(argument)
            elif isinstance(argument, float):
                layout += "f"
                values.append(argument)
            elif isinstance(argument, ctypes.Structure):
                structures.append((len(layout), ctypes.addressof(argument)))  # it stays where it is
                layout += "s"
            else:
                raise TypeError(f"a kernel takes tensors, numbers and structures, not {argument!r}")
        if layout not in self._layouts:
            self._layouts[layout] = self._make(layout)
        packer, space, pointers = self._layouts[layout]
        try:
            packer.pack_into(space, 0, *values)
        except struct.error:
            raise ValueError(f"an integer among {values} does not fit in 32 bits; pass it in a structure") from None
        for i, address in structures:
            pointers[i] = address
        return pointers

    @staticmethod
    def _make(layout: str) -> tuple[struct.Struct, Any, Any]:
        eight_bytes = {"Q": "Q", "i": "i4x", "f": "f4x", "s": "8x"}
        packer = struct.Struct("=" + "".join(eight_bytes[kind] for kind in layout))
        space = ctypes.create_string_buffer(max(packer.size, 8))
        start = ctypes.addressof(space)
        return packer, space, (ctypes.c_void_p * len(layout))(*range(start, start + packer.size, 8))


_arguments = _Arguments()


class Kernel:
    """One kernel of a loaded module, bound to the device it was loaded on."""

    def __init__(self, function: ctypes.c_void_p, device: int, name: str):
        self._function = function
        self._device = device
        self._shared_limit = _DEFAULT_SHARED_LIMIT
        self._non_portable = False
        self.name = name

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        _check_driver(
            _driver().cuFuncGetAttribute(ctypes.byref(value), attribute, self._function), f"inspect kernel {self.name}"
        )
        return value.value

    @property
    def registers(self) -> int:
        """Registers a thread."""
        return self._attribute(_ATTRIBUTE_REGISTERS)

    @property
    def spilled_bytes(self) -> int:
        """Bytes of local memory a thread."""
        return self._attribute(_ATTRIBUTE_LOCAL_BYTES)

    def _set(self, attribute: int, value: int) -> None:
        status = _driver().cuFuncSetAttribute(self._function, attribute, value)
        _check_driver(status, f"set attribute {attribute} of kernel {self.name} to {value}")

    def launch(
        self,
        grid: tuple[int, int, int],
        block: int,
        arguments: Sequence[Argument],
        *,
        shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:
        """Launch on torch's current stream of the kernel's device; asynchronous, and capturable in a CUDA graph.

        Args:
            grid: blocks along x, y, z; with a cluster, x is a multiple of it.
            block: threads a block.
            arguments: in the kernel's order. Tensors pass as pointers (on this device; the caller keeps them alive as
                torch's allocator asks), None as a null pointer, int and float in 32 bits, structures by value.
                `Numbers` stand for as many arguments as they are.
            shared_bytes: dynamic shared memory; the limit above 48 KiB is raised as needed.
            cluster: blocks a thread-block cluster along x (capability 9.0 and newer).

        Raises:
            RuntimeError: when the driver refuses the launch.
        """
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                self.launch(grid, block, arguments, shared_bytes=shared_bytes, cluster=cluster)
            return
        if shared_bytes > self._shared_limit:
            self._set(_ATTRIBUTE_MAX_DYNAMIC_SHARED, shared_bytes)
            self._shared_limit = shared_bytes
        if cluster > _PORTABLE_CLUSTER and not self._non_portable:
            self._set(_ATTRIBUTE_NON_PORTABLE_CLUSTER, 1)
            self._non_portable = True
        pointers = _arguments.lay_out(arguments)
        status = self._submit(grid, block, shared_bytes, cluster, pointers)
        if status == _ERROR_INVALID_CONTEXT:  # a thread that has not used CUDA yet, such as one of autograd's
            _make_context_current(self._device)
            status = self._submit(grid, block, shared_bytes, cluster, pointers)
        if status:
            what = f"launch kernel {self.name} with grid {grid}, block {block}, {shared_bytes} B shared"
            _check_driver(status, what)

    def _submit(self, grid: tuple[int, int, int], block: int, shared_bytes: int, cluster: int, pointers: Any) -> int:
        # What torch.cuda.current_stream() looks up, without making an object of it at every launch.
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._device))
        if cluster == 1:
            simple: int = _driver().cuLaunchKernel(
                self._function, *grid, block, 1, 1, shared_bytes, stream, pointers, None
            )
            return simple
        config = _arguments.config
        config.grid[0], config.grid[1], config.grid[2] = grid
        config.block[0], config.shared_bytes, config.stream = block, shared_bytes, stream
        _arguments.attribute.value[0] = cluster
        status: int = _driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None)
        return status


def _make_context_current(device: int) -> None:
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check_driver(_driver().cuDeviceGet(ctypes.byref(handle), device), "find the device")
    _check_driver(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "retain the primary context")
    _check_driver(_driver().cuCtxSetCurrent(context), "make the primary context current")


@functools.cache
def _load_module(source: str, defines: tuple[Define, ...], device: int) -> ctypes.c_void_p:
    cubin = compile_cubin(source, torch.cuda.get_device_capability(device), defines)
    module = ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        status = _driver().cuModuleLoadData(ctypes.byref(module), cubin)
        if status == _ERROR_INVALID_CONTEXT:
            _make_context_current(device)
            status = _driver().cuModuleLoadData(ctypes.byref(module), cubin)
    _check_driver(status, "load the compiled module")
    return module


@functools.cache
def _find_kernel(source: str, defines: tuple[Define, ...], device: int, name: str) -> Kernel:
    module = _load_module(source, defines, device)
    function = ctypes.c_void_p()
    status = _driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode())
    _check_driver(status, f"find kernel {name}")
    return Kernel(function, device, name)


def get_kernel(source: str, name: str, defines: tuple[Define, ...], device: torch.device) -> Kernel:
    """Return the kernel compiled from `source` for `device`, compiling and loading it on first use.

    Args:
        source: CUDA C++ with `extern "C"` kernels.
        name: the kernel's name.
        defines: preprocessor definitions as a tuple of (name, value); a new tuple is a new compilation.
        device: a CUDA device; handles are kept per device.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        return _find_kernel(source, defines, index, name)
