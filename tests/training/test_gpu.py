"""Training on a GPU: every precision, compiled or not, learns; an interrupted run in float16 keeps its loss scale."""

from types import SimpleNamespace

import pytest
import torch
from runs import assert_same, quiet, recipe, state_of

from vmamba.models.registry import create_model
from vmamba.training import classification
from vmamba.training.agreement import Agreement
from vmamba.training.checkpointing import CheckpointFolder, read_checkpoint_folder
from vmamba.training.engine import train
from vmamba.training.guards import TrainingFailedError
from vmamba.training.recipe import AugmentationOptions, CheckpointOptions, GuardOptions, OptimizerOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # torch's advice when it compiles float32
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the compiler of torch 2.11 uses what torch deprecates
]


def run(data, folder, **options):
    plain, fast = AugmentationOptions(policy="none"), OptimizerOptions(lr=1e-2)
    return train(recipe(data, folder, device="cuda", augmentation=plain, optimizer=fast, **options), quiet())


# PyTorch opens its pool for graphs by capturing nothing, and warns of that itself.
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("compiled", [None, "default", "reduce-overhead"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(colours, tmp_path, precision, compiled):
    options = {"compile": True, "compile_mode": compiled} if compiled else {}
    result = run(colours, tmp_path / "run", epochs=4, precision=precision, **options)
    assert result.report.top1 == 1.0
    losses = [record["train_loss"] for record in result.folder.read_metrics() if record["kind"] == "epoch"]
    assert losses[-1] < losses[0]


def test_the_loss_scale_survives_a_resumed_run(colours, tmp_path):
    run(colours, tmp_path / "run", epochs=2, precision="fp16")
    _, parts = state_of(tmp_path / "run")
    scale = parts["scaler"]["scale"]
    assert scale > 0
    run(colours, tmp_path / "run", epochs=3, precision="fp16", resume=str(tmp_path / "run"))
    _, later = state_of(tmp_path / "run")
    assert later["scaler"]["_growth_tracker"] > parts["scaler"]["_growth_tracker"]
    assert later["scaler"]["scale"] == scale


@pytest.mark.parametrize("precision", ["bf16", "fp16"])  # in bfloat16 the optimiser's kernel skips the update itself
def test_no_number_changes_nothing(colours, tmp_path, precision, monkeypatch):
    original, made = classification.classification_loss, []

    def spoiled(*arguments):
        made.append(1)
        return original(*arguments) * (float("nan") if len(made) > 2 else 1.0)

    monkeypatch.setattr(classification, "classification_loss", spoiled)
    options = {"checkpoints": CheckpointOptions(every=1, keep=9), "guards": GuardOptions(nonfinite=2)}
    with pytest.raises(TrainingFailedError, match="update 4 is not finite, nor were the 1 before it"):
        run(colours, tmp_path / "run", epochs=3, precision=precision, **options)
    found = [read_checkpoint_folder(p) for p in CheckpointFolder(tmp_path / "run" / "checkpoints").paths()]
    before, last = next(c for c in found if c.position.updates == 2), found[-1]
    assert last.position.skipped == 2
    assert_same(before.weights("model"), last.weights("model"))
    assert_same(before.parts["optimizer"]["state"], last.parts["optimizer"]["state"])


def test_maps_that_a_compiled_model_keeps_have_their_channels_together():
    # Inductor takes whatever has four dimensions beside a convolution for (B, C, H, W), and writes what it keeps in the
    # order "channels last" of that: (B, W, C, H) of our maps, from which every kernel of the backward pass copies.
    model = create_model("vmamba_tiny", depths=(1, 1, 1, 1)).cuda().train()
    images, channels, kept = torch.randn(2, 3, 224, 224, device="cuda"), {48, 96, 192, 384, 768}, []
    with (
        torch.autocast("cuda", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        torch.compile(model)(images).sum().backward()
    maps = [t for t in kept if t.ndim == 4 and t.shape[0] == 2 and t.shape[1] != 3 and min(t.shape[1:]) > 1]
    assert maps
    assert not [(m.shape, m.stride()) for m in maps if m.shape[m.stride().index(1)] not in channels]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_gives_the_same_gradients(precision):
    model = create_model("vmamba_tiny", depths=(1, 1, 1, 1), drop_path_rate=0.0).cuda().train()
    images, found = torch.randn(2, 3, 64, 96, device="cuda"), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        logits.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        model.zero_grad()
    plain, checkpointed = found
    for name, grad in plain.items():
        assert (checkpointed[name] - grad).norm() <= 1e-3 * grad.norm(), name  # sums of scans come in any order


def test_what_is_read_does_not_wait_for_what_was_launched_later():
    alone = SimpleNamespace(device=torch.device("cuda"), process_index=0, num_processes=1)
    totals = Agreement(alone).adding([torch.full((), 3.0, device="cuda")], [4.0])
    torch.cuda._sleep(2_000_000_000)  # about a second
    later = torch.cuda.Event()
    later.record()
    assert totals.read() == [3.0, 4.0]
    assert not later.query()
