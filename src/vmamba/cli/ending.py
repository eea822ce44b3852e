"""What a command does when it is told to end."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


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
