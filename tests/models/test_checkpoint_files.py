"""Weight files: hostile, damaged, missing, remote, and written so that they are whole or absent."""

import argparse
import errno
import os
import pickle
import resource
import sys
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_samples import CfgNode, assert_same_weights, importable, save_as_authors, small_model, weights

from vmamba.models import checkpoint_files
from vmamba.models.checkpoint import CheckpointError, export_official, load_checkpoint, read_checkpoint, save_checkpoint
from vmamba.models.checkpoint_files import download, locate, read_file
from vmamba.models.pretrained import WEIGHTS_DIR, fetch_pretrained, models_with_weights


class Payload:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class HistoryBuffer:
    """Has the state that mmengine's class of this name keeps."""

    def __init__(self):
        self.max_length, self._log_history = 100, np.array([0.5, 0.25])


def payloads(marker: Path) -> dict[str, tuple[Payload, str]]:
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "system": (Payload(os.system, f"touch {marker}"), rf"{os.name}\.system"),
        "exec": (Payload(exec, code), r"(builtins\.)?exec"),
        "eval": (Payload(eval, code), r"(builtins\.)?eval"),
        "open": (Payload(open, str(marker), "w"), r"(_io|io|builtins)?\.?open"),
        "getattr": (Payload(getattr, Path(marker), "name"), r"getattr"),
    }


WRITERS = {
    "torch.save": lambda content, path: torch.save(content, path),
    "torch.save of old": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "torch.save, protocol 4": lambda content, path: torch.save(content, path, pickle_protocol=4),
    "pickle 0": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=0)),
    "pickle 2": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
    "pickle 5": lambda content, path: path.write_bytes(pickle.dumps(content, protocol=5)),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("payload", ["system", "exec", "eval", "open", "getattr"])
def test_a_pickle_that_would_run_code_is_refused_by_name_and_runs_nothing(payload, writer, tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    call, name = payloads(marker)[payload]
    WRITERS[writer]({"model": {"w": torch.zeros(1)}, "config": call}, path)

    with pytest.raises(
        CheckpointError, match=rf"evil\.pth' was refused: it refers to .*{name}.* could run code"
    ) as caught:
        read_checkpoint(path)

    assert not marker.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("payload", ["system", "exec", "eval", "open"])
def test_those_payloads_do_run_when_unpickled_carelessly(payload, tmp_path):
    marker = tmp_path / "ran"
    result = pickle.loads(pickle.dumps(payloads(marker)[payload][0]))
    getattr(result, "close", lambda: None)()
    assert marker.exists()


def test_a_call_through_a_stand_in_runs_nothing(tmp_path):
    # The stand-ins take the place of names; what the file calls them with is thrown away.
    np_scalar = np.float64(82.5).__reduce__()[0]
    torch.save({"model": {"w": torch.ones(2)}, "best": Payload(np_scalar, "anything", b"at all")}, tmp_path / "x.pth")
    content, _ = read_file(tmp_path / "x.pth")
    assert isinstance(content["best"], checkpoint_files.Ignored)
    assert vars(content["best"]) == {}


def test_authors_training_file_loads_without_yacs_and_keeps_its_configuration(tmp_path):
    source = small_model()
    save_as_authors(tmp_path / "ckpt_epoch_264.pth", source, SSM_ACT_LAYER="relu")
    assert b"yacs.config\nCfgNode" in zipfile.ZipFile(tmp_path / "ckpt_epoch_264.pth").read("ckpt_epoch_264/data.pkl")
    assert "yacs" not in sys.modules

    checkpoint = read_checkpoint(tmp_path / "ckpt_epoch_264.pth")
    content, _ = read_file(tmp_path / "ckpt_epoch_264.pth")

    assert_same_weights(dict(checkpoint.state_dict), weights(source))
    assert checkpoint.epoch == 264
    assert checkpoint.weights_key == "model"
    assert checkpoint.config is not None
    assert checkpoint.config.ssm_act == "relu"  # which no shape tells
    assert checkpoint.config.num_classes == 5  # the head's, not the stored 1000
    assert checkpoint.config.drop_path_rate == 0.3
    assert type(content["config"]) is OrderedDict
    assert content["config"]["MODEL"]["VSSM"]["DEPTHS"] == [1, 2]
    assert "yacs" not in sys.modules


def test_a_stored_configuration_of_another_model_is_not_believed(tmp_path):
    save_as_authors(tmp_path / "a.pth", small_model(), SSM_D_STATE=16)
    save_as_authors(tmp_path / "b.pth", small_model(), forward_type="v99")
    assert read_checkpoint(tmp_path / "a.pth").config is None
    assert read_checkpoint(tmp_path / "b.pth").config is None


def test_what_training_scripts_save_beside_the_weights_is_passed_over(tmp_path):
    content = {
        "state_dict": {f"backbone.{n}": v for n, v in weights(small_model()).items()},
        "args": argparse.Namespace(lr=0.1, output_dir=Path("/somewhere")),
        "max_accuracy": np.float64(82.5),
        "losses": np.arange(3.0),
        "meta": {"epoch": 12, "dataset_meta": {"classes": ("a", "b")}},
        "message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer())},
    }
    with importable("mmengine.logging.history_buffer.HistoryBuffer", HistoryBuffer):
        torch.save(content, tmp_path / "mm.pth")

    checkpoint = read_checkpoint(tmp_path / "mm.pth")

    assert_same_weights(dict(checkpoint.state_dict), weights(small_model()))
    assert checkpoint.epoch == 12


@pytest.mark.parametrize(
    "known", [[], [Payload], [(dict, "yacs.config.CfgNode")], [(OrderedDict, "yacs.config.CfgNode")]]
)
def test_the_allow_list_is_left_as_it_was(known, tmp_path):
    save_as_authors(tmp_path / "a.pth", small_model())
    with torch.serialization.safe_globals(known):
        before = set(torch.serialization.get_safe_globals())
        assert read_checkpoint(tmp_path / "a.pth").config is not None
        assert set(torch.serialization.get_safe_globals()) == before
        (tmp_path / "b.pth").write_bytes(b"damaged")
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "b.pth")
        assert set(torch.serialization.get_safe_globals()) == before


def test_files_load_from_several_threads_at_once(tmp_path):
    save_as_authors(tmp_path / "a.pth", small_model())
    failures = []

    def work():
        try:
            for _ in range(15):
                read_checkpoint(tmp_path / "a.pth")
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.fixture(params=["pth", "old.pth", "safetensors"])
def good_file(request, tmp_path):
    path = tmp_path / f"weights.{request.param}"
    if request.param == "safetensors":
        save_checkpoint(small_model(), path)
    else:
        zipped = request.param == "pth"
        torch.save({"model": small_model().state_dict()}, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_one_clear_error_and_the_model_is_untouched(good_file, kept):
    data = good_file.read_bytes()
    good_file.write_bytes(data[: int(len(data) * kept)])
    model = small_model(seed=7)
    before = weights(model)

    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, good_file)

    assert str(good_file) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert any(word in str(caught.value) for word in ("truncated", "corrupt", "empty"))
    assert_same_weights(weights(model), before)


def test_a_flipped_bit_in_the_weights_is_found(tmp_path):
    path = tmp_path / "w.pth"
    export_official(small_model(), path)
    data = bytearray(path.read_bytes())
    value = small_model().layers[1].blocks[0].op.x_proj_weight.detach().numpy().tobytes()
    data[data.index(value) + 5] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # torch's reader does not notice

    with pytest.raises(CheckpointError, match=r"w\.pth' is corrupt: its record .* checksum"):
        read_checkpoint(path)


def test_a_file_saved_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(small_model().state_dict(), tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same_weights(dict(read_checkpoint(tmp_path / "w.pth").state_dict), weights(small_model()))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html><body>Not Found</body></html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "Git LFS pointer"),
        (b"just some text", "is a text file and no checkpoint"),
        (b"checkpoints:\n  every: 0\n", "is a text file and no checkpoint"),  # as opcodes: the global named heckpoints
        ("Größe: 3\n".encode() * 1000, "is a text file and no checkpoint"),
        (bytes(range(256)) * 40, "is not a weight file"),
        (pickle.dumps([1, 2, 3], protocol=2), "is not a weight file"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_other_files_are_told_for_what_they_are(content, says, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_missing_files_and_folders_are_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no file '.*nowhere\.pth'"):
        read_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match=r"is a folder; name the weight file"):
        read_checkpoint(tmp_path)
    save_checkpoint(small_model(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is a folder; did you mean '.*model\.safetensors'"):
        read_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot be read|no file"):
        read_checkpoint(tmp_path / "model.safetensors" / "inside.pth")


def test_safetensors_are_known_by_content(tmp_path):
    save_checkpoint(small_model(), tmp_path / "weights.bin")
    assert_same_weights(dict(read_checkpoint(tmp_path / "weights.bin").state_dict), weights(small_model()))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"epoch": 3, "model": None}, "holds no weights under 'model_ema', .* it holds 'epoch', 'model'"),
        ({"model": {}}, "holds no weights"),
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({}, "it holds nothing"),
    ],
)
def test_files_without_a_state_dict_say_what_they_hold(content, says, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_and_the_model_is_untouched(value, tmp_path):
    tensors = weights(small_model())
    tensors["layers.1.blocks.1.op.A_logs"][3] = value
    tensors["layers.1.blocks.0.op.A_logs"][0] = value
    torch.save(tensors, tmp_path / "nan.pth")
    model = small_model(seed=1)
    before = weights(model)

    with pytest.raises(CheckpointError, match=r"nan\.pth' holds NaN or infinity in 2 of \d+ .*op\.A_logs ×2"):
        load_checkpoint(model, tmp_path / "nan.pth")
    assert_same_weights(weights(model), before)


def test_sparse_and_meta_tensors_are_refused(tmp_path):
    for bad in (torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta")):
        torch.save({**weights(small_model()), "pos_embed": bad}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=r"without plain values .*'pos_embed'"):
            read_checkpoint(tmp_path / "x.pth")


# Writing


@pytest.mark.parametrize("write", [save_checkpoint, export_official])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(write, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"the old file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not write '.*weights\.bin' .*nothing was left behind"):
            write(small_model(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"the old file"
    assert os.listdir(tmp_path) == ["weights.bin"]


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
def test_a_failure_at_the_last_moment_leaves_nothing_behind(error, tmp_path, monkeypatch):
    def replace(*_):
        raise error

    monkeypatch.setattr(checkpoint_files.os, "replace", replace)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected):
        save_checkpoint(small_model(), tmp_path / "weights.safetensors")
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written_are_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"it is a folder; name a file"):
        save_checkpoint(small_model(), tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no folder '.*absent'"):
        save_checkpoint(small_model(), tmp_path / "absent" / "weights.safetensors")


def test_written_files_are_readable_by_others_as_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    for write, name in ((save_checkpoint, "w.safetensors"), (export_official, "w.pth")):
        write(small_model(), tmp_path / name)
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_weights_that_share_memory_are_written_apart(tmp_path):
    model = small_model()
    model.layers[1].blocks[1].norm.weight = model.layers[1].blocks[0].norm.weight
    with torch.no_grad():
        model.layers[0].blocks[0].norm.weight.set_(torch.arange(1.0, 17.0)[::2])
    save_checkpoint(model, tmp_path / "w.safetensors")
    assert_same_weights(dict(read_checkpoint(tmp_path / "w.safetensors").state_dict), weights(model))


# Fetching


def test_hub_ids_name_repository_file_and_revision(tmp_path, monkeypatch):
    save_checkpoint(small_model(), tmp_path / "model.safetensors")
    asked = []

    def hf_hub_download(repository, filename, revision=None):
        asked.append((repository, filename, revision))
        return str(tmp_path / "model.safetensors")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    for source in ("hf-hub:me/vmamba", "hf_hub:me/vmamba@v2", "hf-hub:me/vmamba/old/tiny.pth@main"):
        assert_same_weights(dict(read_checkpoint(source).state_dict), weights(small_model()))
    assert asked == [
        ("me/vmamba", "model.safetensors", None),
        ("me/vmamba", "model.safetensors", "v2"),
        ("me/vmamba", "old/tiny.pth", "main"),
    ]
    for source in ("hf-hub:", "hf-hub:name", "hf-hub:me/"):
        with pytest.raises(CheckpointError, match="is not a Hub id"):
            read_checkpoint(source)


def test_the_hub_out_of_reach_is_one_clear_error(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def hf_hub_download(*_, **__):
        raise LocalEntryNotFoundError("Cannot find the requested files\nin the cache")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    with pytest.raises(CheckpointError, match=r"could not fetch model\.safetensors of 'me/vmamba' .*give its path"):
        read_checkpoint("hf-hub:me/vmamba")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(WEIGHTS_DIR, raising=False)
    return tmp_path / "cache" / "hub" / "checkpoints"


def test_a_download_is_kept_and_a_partial_one_is_not(cache, tmp_path, capsys):
    export_official(small_model(), tmp_path / "remote.pth")
    address = (tmp_path / "remote.pth").as_uri()
    assert download(address) == cache / "remote.pth"
    (tmp_path / "remote.pth").unlink()
    assert_same_weights(dict(read_checkpoint(download(address)).state_dict), weights(small_model()))

    data = (cache / "remote.pth").read_bytes()
    (tmp_path / "partial.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"is incomplete or is no weight file; try again"):
        download((tmp_path / "partial.pth").as_uri())
    assert not (cache / "partial.pth").exists()

    (cache / "remote.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"delete '.*remote\.pth' to fetch it again"):
        download(address)
    assert (cache / "remote.pth").exists()


def test_without_a_connection_the_error_names_address_cache_and_local_ways(cache, monkeypatch):
    class Unreachable:
        url = "http://127.0.0.1:9/vssm1_tiny_0230s_ckpt_epoch_264.pth"

    monkeypatch.setattr("vmamba.models.pretrained.published_info", lambda name: Unreachable)
    with pytest.raises(CheckpointError) as caught:
        fetch_pretrained("vmamba_tiny")
    message = str(caught.value)
    assert Unreachable.url in message
    assert str(cache / "vssm1_tiny_0230s_ckpt_epoch_264.pth") in message
    assert WEIGHTS_DIR in message
    assert "checkpoint_path" in message
    with pytest.raises(CheckpointError, match=r"could not download http://127\.0\.0\.1:9/x\.pth"):
        locate("http://127.0.0.1:9/x.pth")


@pytest.mark.parametrize("name", ["vmamba_tiny.pth", "vmamba_tiny.safetensors", "vssm1_tiny_0230s_ckpt_epoch_264.pth"])
def test_a_local_file_stands_in_for_the_published_one(name, tmp_path, monkeypatch):
    monkeypatch.setenv(WEIGHTS_DIR, str(tmp_path))
    (tmp_path / name).touch()
    assert fetch_pretrained("vmamba_tiny") == tmp_path / name
    monkeypatch.setenv(WEIGHTS_DIR, str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_DIR} names '.*absent', which is not a folder"):
        fetch_pretrained("vmamba_tiny")


def test_names_without_published_weights_are_told(monkeypatch):
    monkeypatch.delenv(WEIGHTS_DIR, raising=False)
    with pytest.raises(
        ValueError, match=r"no weights were published for 'vmamba_nano'; there are some for vmamba_tiny,"
    ):
        fetch_pretrained("vmamba_nano")
    with pytest.raises(ValueError, match="did you mean"):
        fetch_pretrained("vmamba_tinny")
    assert "vmambav2v_tiny_224" in models_with_weights()
    assert "vmambav2_tiny_224_relu" not in models_with_weights()


def test_samples_pickle_as_yacs_does():
    with importable("yacs.config.CfgNode", CfgNode):
        data = pickle.dumps(CfgNode({"A": CfgNode({"B": [1]})}), protocol=2)
    # What yacs 0.1.8 writes: NEWOBJ of the class without arguments, items, then BUILD with the instance's state.
    assert data.startswith(b"\x80\x02cyacs.config\nCfgNode\nq\x00)\x81")
    assert data.count(b"__immutable__") == 1
    assert data.endswith(b"b.")
