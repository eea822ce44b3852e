import json
import socket
import threading
import time

import pytest
import uvicorn
from fastapi import FastAPI

from vmamba.deployment import protocol
from vmamba.deployment.protocol import HEAD_BYTES, Protocol
from vmamba.deployment.server import Server


@pytest.fixture(scope="module")
def port():
    app = FastAPI()
    app.state.served = {"name": "m", "version": "v1"}

    @app.get("/")
    def hello():
        return "hello"

    config = uvicorn.Config(app, http=Protocol, h11_max_incomplete_event_size=HEAD_BYTES, log_level="critical")
    server = Server(config)
    server.grace_seconds = 0.0
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)


def talk(port, pieces, pause=0.0):
    """Send pieces, all of them, then read until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        for piece in pieces:
            client.sendall(piece)
            time.sleep(pause)
        answer = b""
        while block := client.recv(65536):
            answer += block
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_good_requests_are_answered(port):
    status, body = talk(port, [b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"])
    assert (status, body) == (200, b'"hello"')


def test_a_long_head_is_refused_in_an_answer_that_arrives(port):
    """The client sends ten times the limit before it listens; a server that closes at once would break it off."""
    pieces = [b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ", *[b"a" * HEAD_BYTES] * 10, b"\r\n\r\n"]
    status, body = talk(port, pieces, pause=0.02)
    assert status == 431
    assert json.loads(body) == {
        "detail": f"the head of the request has more than the {HEAD_BYTES} bytes that are allowed",
        "model": {"name": "m", "version": "v1"},
    }


@pytest.mark.parametrize("head", [b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"GET /\r\n\r\n"])
def test_what_is_not_http_is_told(port, head):
    status, body = talk(port, [head])
    assert status == 400
    assert json.loads(body)["detail"].startswith("the request is not HTTP: ")


def send_on(client, piece, count, pause):
    for _ in range(count):
        client.sendall(piece)
        time.sleep(pause)


def test_a_client_that_goes_on_sending_is_left(port, monkeypatch):
    monkeypatch.setattr(protocol, "_LINGER_BYTES", 1_000_000)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"\x00\r\n\r\n")
        with pytest.raises(ConnectionError):
            send_on(client, b"a" * HEAD_BYTES, 1000, 0.001)


def test_a_client_that_stays_is_left(port, monkeypatch):
    monkeypatch.setattr(protocol, "_LINGER_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"\x00\r\n\r\n")
        time.sleep(1)
        with pytest.raises(ConnectionError):
            send_on(client, b"a", 50, 0.02)
