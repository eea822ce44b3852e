"""What depends on how many processes train and on what devices: accelerate's set-up, and state gathered from all."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DynamoBackend,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    TorchDynamoPlugin,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from vmamba.data.reading import Share
from vmamba.training.recipe import RunOptions

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
_FOR_EVER = 7 * 24 * 3600.0  # torch wants a number


def check_run(recipe: RunOptions) -> str:
    """Return the kind of device to train on: "cpu" or "cuda".

    Raises:
        ValueError: Device, precision or trackers are not to be had here.
    """
    device = pick_device(recipe.device)
    if recipe.precision == "fp16" and device != "cuda":
        raise ValueError("--precision fp16 needs a GPU; bf16 or fp32 would do here")
    if recipe.parallel == "fsdp" and (device == "cpu" or not is_launched()):
        raise ValueError("--parallel fsdp needs several GPUs: start it with torchrun or accelerate launch")
    available = [str(tracker.value) for tracker in get_available_trackers()]
    for tracker in recipe.trackers:
        if tracker not in available:
            raise ValueError(
                f"--trackers {tracker}: not installed or unknown; here are {', '.join(available) or 'none'}"
            )
    return device


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_speaker() -> bool:
    """Whether this process is the one to print: the first of those a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(recipe: RunOptions, device: str, blocks: tuple[str, ...] = ()) -> Accelerator:
    """Join the other processes, if a launcher started several, and take a device.

    Args:
        recipe: Precision, compilation, division of the work.
        device: What `check_run` returned.
        blocks: Names of the classes of modules that FSDP divides one by one.
    """
    plugin = None
    if recipe.parallel == "fsdp":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=list(blocks),
        )
    # The gradient of a depthwise weight (E, 1, 3, 3) lies in memory as DDP's buffer does; only the stride of the
    # dimension of size 1 differs.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    patience = timedelta(seconds=recipe.guards.stall or _FOR_EVER)
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="no" if recipe.precision == "fp32" else recipe.precision,
        log_with=list(recipe.trackers) or None,
        project_config=ProjectConfiguration(logging_dir="."),  # the run folder, as soon as there is one
        dynamo_plugin=TorchDynamoPlugin(
            backend=DynamoBackend.INDUCTOR if recipe.compile and recipe.compiles_whole else DynamoBackend.NO,
            mode=recipe.compile_mode,
        ),
        fsdp_plugin=plugin,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=patience),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )


@dataclass(frozen=True)
class EvaluationGroup:
    """The processes that share an evaluation.

    Attributes:
        device: This process's.
        share: Its part of the images.
        speaks: Whether it is the one to print.
    """

    device: torch.device
    share: Share
    speaks: bool

    def collected(self, items: list[str]) -> list[str]:
        """Return the items of all processes."""
        return gather_object(items) if self.share.processes > 1 else items


def evaluation_group(device: str) -> EvaluationGroup:
    """Join the processes a launcher started; alone, just take the device.

    Raises:
        ValueError: There is no such device.
    """
    name = pick_device(device)
    if not is_launched():
        return EvaluationGroup(torch.device(name), Share(), True)
    state = PartialState(cpu=name == "cpu")
    share = Share(state.process_index, state.num_processes)
    return EvaluationGroup(torch.device(state.device), share, state.is_main_process)


def pick_device(device: str) -> str:
    """Return "cpu" or "cuda" for what `--device` says.

    Raises:
        ValueError: There is no such device.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("--device cuda: this machine has no usable NVIDIA GPU; `vmamba doctor` tells more")
    return {"auto": "cuda" if has_cuda else "cpu"}.get(device, device)


def finish(accelerator: Accelerator) -> None:
    """Close the trackers. The group of processes stays, for another run in it; `leave` ends it."""
    for tracker in accelerator.trackers:
        tracker.finish()


def leave() -> None:
    """End the group of processes, if there is one: the last thing a program does."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def release() -> None:
    """Forget accelerate's state, of which it keeps one for the process; the next run may want another device."""
    AcceleratorState._reset_state(reset_partial_state=True)


def model_state(model: nn.Module, everywhere: bool = False) -> dict[str, Tensor]:
    """Return all weights of a model under their plain names; every process must call it.

    Args:
        model: The wrapped model.
        everywhere: Whether every process gets them, on its device; otherwise the main one alone does, on the CPU.
    """
    options = StateDictOptions(full_state_dict=True) if everywhere else _FULL
    return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return an optimiser's whole state by names of parameters, on the CPU, to the main process; all must call it."""
    inner = optimizer.optimizer
    if not inner.state:  # before its first step there is none, and torch would make a step to have one
        return {}
    return get_optimizer_state_dict(model, inner, options=_FULL)


def load_state(model: nn.Module, optimizer: Any, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Put back what `model_state` and `optimizer_state` returned, perhaps in another number of processes."""
    options = StateDictOptions(full_state_dict=True)
    if state:
        set_optimizer_state_dict(model, optimizer.optimizer, state, options=options)
    set_model_state_dict(model, dict[str, Any](weights), options=options)


def lost_process(error: RuntimeError) -> str:
    """Say in a sentence that another process is gone, if that is what an error of torch.distributed means."""
    text = str(error)
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Socket Timeout")
    if not is_launched() or not any(sign in text for sign in signs):
        return ""
    return (
        f"lost another process of the run ({text.strip().partition(chr(10))[0][:200]}); its own output says why;"
        " --resume goes on from the newest checkpoint"
    )
