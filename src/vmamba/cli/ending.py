"""What a command does when it is told to end."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

_interrupts: list[int] = []  # that came while a command ran


@contextmanager
def noting_interrupts() -> Iterator[list[int]]:
    """Let Ctrl-C raise KeyboardInterrupt as always, and note it: imports of other packages may swallow that."""

    def note(number: int, frame: object) -> NoReturn:
        _interrupts.append(number)
        raise KeyboardInterrupt

    _interrupts.clear()
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield _interrupts
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield _interrupts
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def heed_interrupts() -> None:
    """Raise KeyboardInterrupt if Ctrl-C came and was swallowed."""
    if _interrupts:
        raise KeyboardInterrupt


@contextmanager
def leaving_on_sigterm(command: str) -> Iterator[None]:
    """Let SIGTERM end the block as an exception does, so that temporary folders are taken away; the status is 143."""

    def leave(number: int, frame: object) -> NoReturn:
        print(f"vmamba {command}: told to end", file=sys.stderr)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
