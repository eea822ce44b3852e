"""From the body of an HTTP request to images, or to the status and the sentence that say why not."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import warnings
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from PIL import Image
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from vmamba.data.images import DamagedImageError, decode_image

_LONGEST_RATIO = 100


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        bytes: Most bytes of a request's body.
        pixels: Most pixels of an image.
        images: Most images of a request.
        queue: Most images that wait for the model.
        read_seconds: Time for a request's body to arrive.
        answer_seconds: Time for the model to answer.
    """

    bytes: int = 20_000_000
    pixels: int = 50_000_000
    images: int = 32
    queue: int = 256
    read_seconds: float = 20.0
    answer_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, not {value}")


@dataclass(frozen=True)
class EncodedImages:
    """The files of a request.

    Attributes:
        files: Their bytes.
        single: Whether the request was for one image, whose answer is not a list.
    """

    files: list[bytes]
    single: bool


async def read_images(request: Request, limits: Limits) -> EncodedImages:
    """Read the images of a request: its body itself, the files of a form, or base64 in JSON.

    Raises:
        HTTPException: 400, 408, 413, 415 or 422, with a sentence.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (
        kind.startswith("image/") or kind in ("application/octet-stream", "multipart/form-data", "application/json")
    ):
        raise HTTPException(
            415,
            f"the content type {kind[:60]!r} is not understood; send image/*, application/octet-stream, "
            "multipart/form-data or application/json",
        )
    body = await _read_body(request, limits)
    if kind == "multipart/form-data":
        found = await _from_form(request, body, limits)
    elif kind == "application/json":
        found = _from_json(body)
    else:
        found = EncodedImages([body], True)
    if not found.files:
        raise HTTPException(422, "the request holds no image")
    if len(found.files) > limits.images:
        raise HTTPException(413, f"{len(found.files)} images in one request; {limits.images} are allowed")
    return found


def decode(content: bytes, limits: Limits, place: str = "the image") -> Image.Image:
    """Decode an image, its size looked at before its pixels are.

    Raises:
        HTTPException: 413 for too many pixels, 422 for what is no image.
    """
    if not content:
        raise HTTPException(422, f"{place} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        raise HTTPException(413, f"{place} has more pixels than the {limits.pixels} that are allowed") from None
    except Exception:  # decoders meet corrupt headers in many ways
        raise HTTPException(422, f"{place} is not in a known image format") from None
    if width * height > limits.pixels:
        raise HTTPException(413, f"{place} has {width}×{height} pixels; {limits.pixels} are allowed")
    if max(width, height) > _LONGEST_RATIO * min(width, height):
        # Resizing by the short side would blow such an image up without bound.
        raise HTTPException(
            422, f"{place} has {width}×{height} pixels; no side may be {_LONGEST_RATIO} times the other"
        )
    try:
        return decode_image(content, place)
    except DamagedImageError as error:
        raise HTTPException(422, f"{place}: {error.reason}") from None


async def _read_body(request: Request, limits: Limits) -> bytes:
    too_large = HTTPException(413, f"the body has more than the {limits.bytes} bytes that are allowed")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.bytes:
        raise too_large

    async def collect() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limits.bytes:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(collect(), limits.read_seconds)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {limits.read_seconds:g} seconds") from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection ended before the body did") from None


async def _from_form(request: Request, body: bytes, limits: Limits) -> EncodedImages:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        # Some more than are allowed, so that the count is what the answer tells.
        parser = MultiPartParser(request.headers, stream(), max_files=limits.images + 100, max_fields=100)
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, UnicodeDecodeError) as error:
        reason = getattr(error, "message", "") or "it has no boundary, or another than it says"
        raise HTTPException(400, f"the form cannot be read: {reason}") from None
    try:
        uploads = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not uploads:
            raise HTTPException(422, "the form holds no file; send images as files")
        return EncodedImages([await upload.read() for upload in uploads], len(uploads) == 1)
    finally:
        await form.close()


def _from_json(body: bytes) -> EncodedImages:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is not JSON") from None
    if not isinstance(content, dict):
        raise HTTPException(422, "the JSON must be an object with `image` or `images`")
    if ("image" in content) == ("images" in content):
        raise HTTPException(422, "the JSON must hold either `image` or `images`")
    unknown = sorted(set(content) - {"image", "images"})
    if unknown:
        raise HTTPException(422, f"the JSON holds {unknown[0][:60]!r}, which is not known; `image` or `images` are")
    single = "image" in content
    texts = [content["image"]] if single else content["images"]
    if not isinstance(texts, list):
        raise HTTPException(422, "`images` must be a list of texts in base64")
    return EncodedImages([_from_base64(text, i, single) for i, text in enumerate(texts)], single)


def _from_base64(text: object, index: int, single: bool) -> bytes:
    place = "`image`" if single else f"`images[{index}]`"
    if not isinstance(text, str):
        raise HTTPException(422, f"{place} must be a text in base64")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise HTTPException(422, f"{place} is not base64") from None
