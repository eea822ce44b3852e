"""`vmamba serve`: an HTTP server that says what is in images."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vmamba.cli.arguments import parse

if TYPE_CHECKING:
    from vmamba.deployment.predictor import Predictor

TOKEN = "VMAMBA_TOKEN"


@dataclass(frozen=True)
class ServeOptions:
    """Answer HTTP requests with what is in their images; /docs describes how to ask.

    Args:
        source: Weights file, run folder, Hugging Face Hub id, name of a published variant, or a file of `vmamba
            export`; by default the newest run below runs/.
        host: Address to listen at; by default only this machine can ask.
        port: Port to listen at; 0 picks a free one.
        token: What clients must send as `Authorization: Bearer TOKEN`; by default the environment variable
            VMAMBA_TOKEN, and without it nothing.
        max_batch: Most images computed at once; 1 turns batching off.
        batch_wait_ms: Milliseconds to wait for more images after the first.
        max_bytes: Most bytes of a request.
        max_pixels: Most pixels of an image.
        max_images: Most images of a request.
        max_queue: Most images that wait; beyond, the answer is 429.
        read_seconds: Time for a request's body to arrive.
        answer_seconds: Time for the model to answer.
        shutdown_seconds: Time to answer what was accepted, once told to end.
        threads: Threads of the model; by default as many as it likes.
        device: cpu, cuda, or auto for the best there is. Exported files run on the processor, packages (.pt2) on the
            GPU with cuda.
    """

    source: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    max_batch: int = 16
    batch_wait_ms: float = 3.0
    max_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_images: int = 32
    max_queue: int = 256
    read_seconds: float = 20.0
    answer_seconds: float = 60.0
    shutdown_seconds: int = 60
    threads: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_images", "max_queue", "max_bytes", "max_pixels", "shutdown_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, not {self.port}")
        if self.batch_wait_ms < 0:
            raise ValueError(f"batch_wait_ms must not be negative, not {self.batch_wait_ms}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be 1 or more, not {self.threads}")


def run(argv: Sequence[str]) -> int:
    """Serve until told to end."""
    options = parse("serve", ServeOptions, argv, positionals=[("source", "?")])
    import uvicorn

    from vmamba.deployment.protocol import HEAD_BYTES, Protocol
    from vmamba.deployment.requests import Limits
    from vmamba.deployment.server import Server, make_app

    limits = Limits(
        options.max_bytes,
        options.max_pixels,
        options.max_images,
        options.max_queue,
        options.read_seconds,
        options.answer_seconds,
    )
    token = options.token or os.environ.get(TOKEN) or None
    predictor = open_predictor(options.source, options.device, options.threads)
    app = make_app(predictor, limits, max_batch=options.max_batch, batch_wait=options.batch_wait_ms / 1000, token=token)
    with _listen(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        print(f"serving {predictor.name} (version {predictor.version}) on http://{host}:{port}", flush=True)
        print(f"  curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' http://{host}:{port}/predict", flush=True)
        if token is None and host not in ("127.0.0.1", "::1"):
            print("vmamba serve: others can reach this server and there is no token (--token)", file=sys.stderr)
        config = uvicorn.Config(
            app,
            http=Protocol,
            h11_max_incomplete_event_size=HEAD_BYTES,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=options.shutdown_seconds,
            timeout_keep_alive=30,
            backlog=2048,
        )
        Server(config).run(sockets=[listener])
    return 0


def open_predictor(source: str | None, device: str, threads: int | None = None) -> Predictor:
    """Open whatever names a classifier.

    Raises:
        ValueError, FileNotFoundError: There is no such thing, or it cannot be read.
    """
    from vmamba.deployment.predictor import default_labels, predictor_of_file, predictor_of_model, version_of

    if source and source.endswith(".onnx") and device == "cuda":
        raise ValueError(
            f"--device cuda: {source} is run by onnxruntime, on the processor; for a GPU serve weights, or a package"
            " exported there with --format aoti"
        )
    import torch

    from vmamba.cli.opening import open_model, pick_device
    from vmamba.models.config import variant_name

    if source and source.endswith((".onnx", ".pt2")):
        return predictor_of_file(source, threads, "cpu" if device == "auto" else pick_device(device))
    if threads:
        torch.set_num_threads(threads)
    opened = open_model(source, device)
    file = Path(opened.name)
    return predictor_of_model(
        opened.model,
        opened.labels or default_labels(opened.model.config.num_classes),
        opened.preprocessing,
        name=variant_name(opened.model.config) or "vmamba",
        version=version_of(file) if file.is_file() else opened.name,
        device=opened.device,
    )


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen at {host}:{port}: {error.strerror}; choose another --host or --port") from None
    return listener
