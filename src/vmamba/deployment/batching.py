"""Requests that arrive together are computed together: dynamic batching over one worker thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np


class QueueFullError(RuntimeError):
    """More images wait than the queue may hold."""


class _Waiting(NamedTuple):
    image: np.ndarray
    answer: asyncio.Future[np.ndarray]


class Batcher:
    """Collects images and runs them through a model in batches.

    Args:
        run: Maps a batch (B, C, H, W) to outputs (B, ·); called in one thread, one batch at a time.
        max_batch: Most images in a batch.
        wait: Seconds to wait for more images after the first.
        capacity: Most images that may wait.
        observe: Told the size of every batch.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray], np.ndarray],
        *,
        max_batch: int,
        wait: float,
        capacity: int,
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._run, self._max_batch, self._wait, self._capacity = run, max_batch, wait, capacity
        self._observe = observe
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._stopping = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vmamba-model")
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Return how many images wait."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to work; call it inside the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Finish what was accepted, then end."""
        self._stopping = True
        self._arrived.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def submit(self, images: list[np.ndarray]) -> list[np.ndarray]:
        """Compute some images (C, H, W), which may share batches with those of others.

        Raises:
            QueueFullError: They would not fit the queue; none of them was taken.
        """
        if len(self._waiting) + len(images) > self._capacity:
            raise QueueFullError(f"{len(self._waiting)} images wait already, and {self._capacity} may")
        loop = asyncio.get_running_loop()
        entries = [_Waiting(image, loop.create_future()) for image in images]
        self._waiting.extend(entries)
        self._arrived.set()
        try:
            return await asyncio.gather(*(entry.answer for entry in entries))
        finally:
            for entry in entries:
                entry.answer.cancel()  # of a request that was given up: _take passes over them

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if self._waiting and len(self._waiting) < self._max_batch and self._wait and not self._stopping:
                await asyncio.sleep(self._wait)
            batch = self._take()
            if not self._waiting:
                if self._stopping and not batch:
                    return
                if not self._stopping:
                    self._arrived.clear()
            if not batch:
                continue
            self._observe(len(batch))
            try:
                outputs = await loop.run_in_executor(self._thread, self._run, np.stack([e.image for e in batch]))
                for entry, output in zip(batch, outputs, strict=True):
                    if not entry.answer.done():
                        entry.answer.set_result(output)
            except Exception as error:  # whatever the model meets is the answer to those who asked
                for entry in batch:
                    if not entry.answer.done():
                        entry.answer.set_exception(error)

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < self._max_batch:
            entry = self._waiting.popleft()
            if not entry.answer.done():
                batch.append(entry)
        return batch
