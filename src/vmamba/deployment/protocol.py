"""HTTP/1.1 for the server: uvicorn's, with refusals that arrive and that say what was wrong."""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_BYTES = 65_536
_LINGER_SECONDS = 5.0
_LINGER_BYTES = 50_000_000


class Protocol(H11Protocol):
    """A connection that reads on for a while after it refused a broken head.

    uvicorn closes at once. What the client is still sending then meets a closed socket, the client's system throws the
    answer away, and all the client hears is that the connection broke.
    """

    _discarding: asyncio.TimerHandle | None = None
    _discarded = 0

    def data_received(self, data: bytes) -> None:
        """Take bytes of the client, or throw them away once it was refused."""
        if self._discarding is None:
            super().data_received(data)
            return
        self._discarded += len(data)
        if self._discarded > _LINGER_BYTES:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if self._discarding is not None:
            self._discarding.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong with a head: 431 for one that is too long, 400 for any other."""
        error = sys.exc_info()[1]  # h11's, which the caller is handling
        status = 400
        if isinstance(error, h11.RemoteProtocolError):
            status, msg = error.error_status_hint, f"the request is not HTTP: {error}"
        if status == 431:
            msg = f"the head of the request has more than the {HEAD_BYTES} bytes that are allowed"
        told: dict[str, Any] = {"detail": msg}
        served = getattr(getattr(self.config.app, "state", None), "served", None)
        body = json.dumps(told | ({"model": served} if served else {})).encode()
        head = h11.Response(
            status_code=status,
            reason=HTTPStatus(status).phrase.encode(),
            headers=[
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ],
        )
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._discarding = self.loop.call_later(_LINGER_SECONDS, self.transport.close)
