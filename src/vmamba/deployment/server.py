"""The HTTP server: images in, labels out, computed in shared batches.

One process serves one version of one model and names it in every answer. Everything a client can do wrong is answered
with a 4xx status and a sentence in `detail`. On SIGTERM the server stops to listen, answers what it has accepted, ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import prometheus_client as prometheus
import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from vmamba import __version__
from vmamba.deployment.batching import Batcher, QueueFullError
from vmamba.deployment.predictor import Predictor
from vmamba.deployment.requests import EncodedImages, Limits, decode, read_images

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Prediction(BaseModel):
    """A class an image may be of."""

    label: str
    index: int
    confidence: float


class Served(BaseModel):
    """The model that answers."""

    name: str
    version: str


class Answer(BaseModel):
    """What is in the images: `predictions` for a single one, `results` with one entry for each of several."""

    model: Served
    predictions: list[Prediction] | None = None
    results: list[list[Prediction]] | None = None


class Problem(BaseModel):
    """Why a request was not served."""

    detail: str


class Health(BaseModel):
    """Whether the server is ready."""

    status: str
    model: Served
    vmamba_version: str


class _Metrics:
    """What Prometheus is told, in a registry of its own."""

    def __init__(self, predictor: Predictor) -> None:
        self.registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "vmamba_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self.seconds = prometheus.Histogram(
            "vmamba_request_seconds", "From a request's head to its answer.", buckets=_BUCKETS, registry=self.registry
        )
        self.images = prometheus.Counter("vmamba_images", "Images classified.", registry=self.registry)
        self.batches = prometheus.Histogram(
            "vmamba_batch_size", "Images in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.queue = prometheus.Gauge("vmamba_queue_images", "Images that wait.", registry=self.registry)
        prometheus.Info("vmamba_model", "The model served.", registry=self.registry).info(
            {"name": predictor.name, "version": predictor.version}
        )


class Server(uvicorn.Server):
    """A server that ends without leaving anybody who asked unanswered.

    uvicorn closes idle connections at once, also those on which a client is just sending its next request. Here they
    have a moment more; every answer of that time says that its connection ends.
    """

    grace_seconds = 1.0

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop to listen, answer what still comes on open connections, then end."""
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        app: Any = self.config.app
        app.state.ending = True
        await asyncio.sleep(self.grace_seconds)
        await super().shutdown(sockets)


def make_app(
    predictor: Predictor,
    limits: Limits | None = None,
    *,
    max_batch: int = 16,
    batch_wait: float = 0.003,
    token: str | None = None,
) -> FastAPI:
    """Build the application.

    Args:
        predictor: The model to serve.
        limits: What to take on.
        max_batch: Most images computed at once; 1 turns batching off.
        batch_wait: Seconds to wait for more images after the first.
        token: What clients must send as `Authorization: Bearer TOKEN`; None lets everybody in.
    """
    limits = limits or Limits()
    metrics = _Metrics(predictor)
    batcher: list[Batcher] = []  # made inside the event loop
    served = {"name": predictor.name, "version": predictor.version}

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = Batcher(
            predictor.probabilities,
            max_batch=max_batch,
            wait=batch_wait if max_batch > 1 else 0.0,
            capacity=limits.queue,
            observe=metrics.batches.observe,
        )
        worker.start()
        batcher[:] = [worker]
        metrics.queue.set_function(lambda: len(worker))
        yield
        await worker.stop()

    app = FastAPI(
        title="vmamba",
        version=__version__,
        description=f"Says what is in images. Model: {predictor.name}, version {predictor.version}.",
        lifespan=lifespan,
    )
    app.state.served = served
    _add_errors(app, served)
    _add_middleware(app, metrics, token)

    @app.get("/health", response_model=Health, summary="Whether the server is ready")
    async def health() -> Any:
        return {"status": "ok", "model": served, "vmamba_version": __version__}

    @app.get("/metrics", summary="Counts and times for Prometheus", response_class=_PrometheusResponse)
    async def tell_metrics() -> Response:
        return _PrometheusResponse(prometheus.generate_latest(metrics.registry))

    @app.post(
        "/predict",
        response_model=Answer,
        response_model_exclude_none=True,
        summary="What is in one image or several",
        responses=_PROBLEMS,
        openapi_extra={"requestBody": _REQUEST_BODY},
    )
    async def predict(request: Request, top: Annotated[int, Query(ge=1, le=1000)] = 5) -> Any:
        encoded = await read_images(request, limits)
        answers = await _classify(predictor, batcher[0], encoded, limits)
        metrics.images.inc(len(answers))
        results = [predictor.top(answer, top) for answer in answers]
        return {"model": served, "predictions": results[0]} if encoded.single else {"model": served, "results": results}

    return app


async def _classify(predictor: Predictor, batcher: Batcher, encoded: EncodedImages, limits: Limits) -> list[Any]:
    def prepare() -> list[Any]:
        places = ["the image"] if encoded.single else [f"image {i}" for i in range(len(encoded.files))]
        files = zip(encoded.files, places, strict=True)
        return [predictor.image_to_array(decode(content, limits, place)) for content, place in files]

    if len(batcher) + len(encoded.files) > limits.queue:
        raise _busy(limits)  # before the work of decoding
    arrays = await asyncio.get_running_loop().run_in_executor(None, prepare)
    try:
        return await asyncio.wait_for(batcher.submit(arrays), limits.answer_seconds)
    except QueueFullError:
        raise _busy(limits) from None
    except asyncio.TimeoutError:
        raise HTTPException(504, f"no answer within {limits.answer_seconds:g} seconds") from None


def _busy(limits: Limits) -> HTTPException:
    return HTTPException(
        429, f"too busy: the queue of {limits.queue} images is full; try again", headers={"Retry-After": "1"}
    )


class _PrometheusResponse(Response):
    media_type = "text/plain; version=0.0.4; charset=utf-8"


def _add_errors(app: FastAPI, served: dict[str, str]) -> None:
    """Answer every error in one form: a sentence, and the model."""

    def answer(status: int, detail: str, headers: Any = None) -> JSONResponse:
        return JSONResponse({"detail": detail, "model": served}, status, headers=headers)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        detail = str(error.detail)
        if error.status_code == 404:
            detail = f"there is no {request.url.path[:80]} here; there are /predict, /health, /metrics and /docs"
        elif error.status_code == 405:
            detail = f"{request.url.path[:80]} does not take {request.method[:20]}"
        return answer(error.status_code, detail, error.headers)

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return answer(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)


def _add_middleware(app: FastAPI, metrics: _Metrics, token: str | None) -> None:
    known = ("/predict", "/health", "/metrics")
    open_to_all = ("/health", "/docs", "/openapi.json")

    @app.middleware("http")
    async def count(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        start = time.perf_counter()
        path = request.url.path
        if token is not None and path not in open_to_all and not _authorised(request, token):
            response: Response = JSONResponse(
                {"detail": "send the server's token: Authorization: Bearer TOKEN"},
                401,
                headers={"WWW-Authenticate": "Bearer"},
            )
        else:
            response = await call_next(request)
        if getattr(app.state, "ending", False):
            response.headers["Connection"] = "close"
        metrics.requests.labels(path if path in known else "other", str(response.status_code)).inc()
        if path == "/predict":
            metrics.seconds.observe(time.perf_counter() - start)
        return response


def _authorised(request: Request, token: str) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": description}
    for status, description in {
        400: "The body is broken.",
        401: "The token is missing or wrong.",
        408: "The body took too long to arrive.",
        413: "Too many bytes, pixels or images.",
        415: "A content type that is not understood.",
        422: "No image, or one that cannot be decoded; a parameter out of range.",
        429: "The queue is full.",
        504: "The model took too long.",
    }.items()
}

_FILE = {"type": "string", "format": "binary"}
_TEXT = {"type": "string", "format": "byte", "description": "A file in base64."}
_REQUEST_BODY = {
    "required": True,
    "content": {
        "image/*": {"schema": _FILE},
        "application/octet-stream": {"schema": _FILE},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"images": {"type": "array", "items": _FILE}}}
        },
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {"image": _TEXT, "images": {"type": "array", "items": _TEXT, "minItems": 1}},
                "additionalProperties": False,
            }
        },
    },
}
