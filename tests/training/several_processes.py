"""Run functions of the tests in several processes that form a torch.distributed group over gloo.

A fork server that has imported the engine once makes starting a process quick.
"""

import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["vmamba.training.engine", "torchmetrics.classification", "webdataset"])


class Group:
    """Processes that run the same function; `outcomes` are what they returned or raised, by rank."""

    def __init__(self, folder: Path, target, *args, processes: int = 2):
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in range(processes):
            environment = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": processes,
                "LOCAL_WORLD_SIZE": processes,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": 1,
            }
            if processes == 1:
                environment = {"OMP_NUM_THREADS": 1}
            log = folder / f"process-{rank}.log"
            self.processes.append(_CONTEXT.Process(target=_run, args=(environment, log, target, args)))
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 240.0) -> list[int]:
        """Return the exit codes; kill what is still running after so many seconds."""
        for process in self.processes:
            process.join(seconds)
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
            process.join()
        assert not hanging, f"processes hung:\n{self.logs()}"
        return [process.exitcode for process in self.processes]

    def finish(self) -> None:
        """Wait for all to end well."""
        codes = self.wait()
        assert codes == [0] * len(codes), f"exit codes {codes}:\n{self.logs()}"

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self._folder.glob("process-*.log")))


def _run(environment, log, target, args):
    import torch

    from vmamba.training.engine import TrainingInterruptedError

    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    try:
        target(*args)
        status = 0
    except TrainingInterruptedError as interrupted:
        print(interrupted)
        status = interrupted.exit_status
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)
