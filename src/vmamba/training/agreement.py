"""How the processes of a run agree: on sums, on errors, on what only one of them may do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

T = TypeVar("T")


class Totals:
    """Sums over all processes; on a GPU they are on their way to the host as soon as this is made.

    Attributes:
        on_device: Those of the scalars given on the device come first.
        on_host: What follows them, where that never left the host.
    """

    def __init__(self, on_device: Tensor | None, on_host: tuple[float, ...] = ()) -> None:
        self.on_device, self.on_host = on_device, on_host
        self._copied, self._arrived = on_device, None
        if on_device is not None and on_device.is_cuda:
            self._copied = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self._copied.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(on_device.device))

    def read(self) -> list[float]:
        """Return them all; waits for the device, but not for what it was given to do after them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [*([] if self._copied is None else self._copied.tolist()), *self.on_host]


class Agreement:
    """Collective decisions; with one process, none of them communicates.

    Every method must be called by all processes, in the same order.
    """

    def __init__(self, accelerator: Accelerator):
        self.device = accelerator.device
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def adding(self, on_device: Sequence[Tensor], on_host: Sequence[float] = ()) -> Totals:
        """Begin to add up some scalars over all processes, without waiting for the device."""
        values = [torch.stack([tensor.double() for tensor in on_device])] if on_device else []
        if on_host and self.processes == 1:
            return Totals(values[0] if values else None, tuple(on_host))
        if on_host:
            # From pinned memory: else the copy might wait for all that the device has been given.
            pinned = torch.tensor(on_host, dtype=torch.float64, pin_memory=self.device.type == "cuda")
            values.append(pinned.to(self.device, non_blocking=True))
        vector = torch.cat(values)
        if self.processes > 1:
            distributed.all_reduce(vector)
        return Totals(vector)

    def totals(self, on_device: Sequence[Tensor], on_host: Sequence[float] = ()) -> list[float]:
        """Return the sums over all processes of some scalars; waits for the device once."""
        return self.adding(on_device, on_host).read()

    def collected(self, items: list[T]) -> list[T]:
        """Return the items of all processes, in order of rank."""
        return gather_object(items) if self.processes > 1 else items

    def everywhere(self, act: Callable[[], T], main_first: bool = False) -> T:
        """Do something in every process; if it fails in one, fail in all.

        Args:
            act: What to do.
            main_first: Whether the others wait until the main process has done it, such as downloading a file.

        Raises:
            Exception: What `act` raised here; elsewhere a ValueError with the same message.
        """
        result: T | None = None
        for turn in (True, False) if main_first and self.processes > 1 else (None,):
            error: Exception | None = None
            if turn in (None, self.is_main):
                try:
                    result = act()
                except Exception as caught:
                    error = caught
            self._fail_together(error)
        return result  # type: ignore[return-value]

    def on_main(self, act: Callable[[], T]) -> T:
        """Do something in the main process alone; return its result, or fail, in all."""
        result, error = [None], None
        if self.is_main:
            try:
                result = [act()]  # type: ignore[list-item]
            except Exception as caught:
                error = caught
        self._fail_together(error)
        if self.processes > 1:
            broadcast_object_list(result)
        return result[0]  # type: ignore[return-value]

    def _fail_together(self, error: Exception | None) -> None:
        if self.processes > 1:
            messages = [message for message in gather_object([str(error) if error else None]) if message]
            if messages and error is None:
                raise ValueError(f"another process failed: {messages[0]}")
        if error is not None:
            raise error
