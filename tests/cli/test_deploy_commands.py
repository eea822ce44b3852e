import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import vmamba as package
from vmamba.data.transforms import Preprocessing
from vmamba.deployment.files import load_exported


@pytest.fixture
def weights(tmp_path):
    metadata = {"labels": [str(i) for i in range(10)], **Preprocessing.for_style("glyphs", 32).to_dict()}
    path = tmp_path / "weights.safetensors"
    package.save_checkpoint(package.create_model("vmamba_test", depths=(1, 1)), path, metadata=metadata)
    return path


def test_export_and_what_the_file_says(vmamba, weights, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    outcome = vmamba("export", weights, "out.onnx", "--data", "digits")
    assert outcome.status == 0, outcome.err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "largest difference from the model in PyTorch" in outcome.out
    assert "accuracy on 359 held-out images" in outcome.out
    told = load_exported(tmp_path / "out.onnx").description
    assert told.labels[9] == "9"
    assert len(told.source_sha256) == 64
    assert vmamba("export", weights, "out.onnx").status == 2
    served = vmamba("serve", "out.onnx", "--host", "no such host")
    assert served.status == 2
    assert "cannot listen at no such host" in served.err
    assert "is run by onnxruntime, on the processor" in vmamba("serve", "out.onnx", "--device", "cuda").err
    assert "out.onnx' is not a weight file; a model that" in vmamba("demo", "out.onnx").err


def test_damaged_packages_and_shards(vmamba, weights, tmp_path):
    (tmp_path / "bad.pt2").write_bytes(b"x" * 99)
    assert "bad.pt2 is no exported model, or is truncated" in vmamba("serve", "bad.pt2").err
    (tmp_path / "bad.tar").write_bytes(b"x" * 999)
    outcome = vmamba("embed", "wds:bad.tar", "x.npz", "--checkpoint", weights)
    assert outcome.status == 2
    assert outcome.err.strip().endswith("bad.tar is damaged: file could not be opened successfully")
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is told without a GPU")
def test_a_package_for_a_gpu_that_is_not_there(vmamba, weights):
    outcome = vmamba("export", weights, "x.pt2", "--format", "aoti", "--device", "cuda")
    assert outcome.status == 2
    assert "there is none here" in outcome.err


@pytest.mark.slow  # a process of its own
def test_export_told_to_end_leaves_nothing(tmp_path):
    words = [sys.executable, "-m", "vmamba", "export", "vmamba_tiny", str(tmp_path / "x.onnx"), "--pretrained", "false"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.iterdir()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert "told to end" in process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # a server in a process of its own
@pytest.mark.parametrize(
    ("number", "status", "message"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "told to end")]
)
def test_demo_told_to_end_leaves_nothing(weights, tmp_path, number, status, message):
    (tmp_path / "temporary").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "vmamba", "demo", str(weights), "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
    )
    assert process.stdout is not None
    assert "the page is at" in process.stdout.readline()
    assert list((tmp_path / "temporary").glob("vmamba-demo-*"))
    process.send_signal(number)
    assert message in process.communicate(timeout=60)[1]
    assert process.returncode == status
    assert not list((tmp_path / "temporary").glob("vmamba-demo-*"))


def test_export_of_a_segmentation_model(vmamba, tmp_path):
    from vmamba.tasks.segmentation import create_segmenter
    from vmamba.tasks.segmentation_checkpoint import save_segmentation_checkpoint

    model = create_segmenter(package.VMambaConfig(depths=(1, 1, 1, 1), dims=8), 3, hidden=8, auxiliary=4)
    save_segmentation_checkpoint(model, tmp_path / "s.safetensors", metadata={"labels": ["a", "b", "c"]})
    outcome = vmamba("export", "s.safetensors", "s.onnx")
    assert outcome.status == 0, outcome.err
    told = load_exported(tmp_path / "s.onnx").description
    assert (told.task, told.labels, told.dynamic_size) == ("segmentation", ("a", "b", "c"), True)
    refused = vmamba("export", "s.safetensors", "c.onnx", "--task", "classification")
    assert refused.status == 2
    assert "holds a segmentation model" in refused.err
    measured = vmamba("export", "s.safetensors", "c.onnx", "--data", "digits")
    assert measured.status == 2
    assert "--task classification" in measured.err
    assert "gives segmentation; a classifier is needed" in vmamba("serve", "s.onnx").err


def test_a_variant_without_published_weights_is_exported_untrained_or_told_how(vmamba):
    outcome = vmamba("export", "vmamba_test", "v.onnx")
    assert outcome.status == 2
    assert "no weights were published for 'vmamba_test'" in outcome.err
    assert "--pretrained false exports it untrained" in outcome.err


def test_export_of_a_detector(vmamba, tmp_path):
    from vmamba.tasks.detection import DetectorConfig, make_vmamba_detector
    from vmamba.tasks.detection_checkpoint import save_detector

    config = package.VMambaConfig(depths=(1, 1, 1, 1), dims=8)
    detector = make_vmamba_detector(config, DetectorConfig(2, channels=8))
    save_detector(detector, tmp_path / "d.safetensors", metadata={"labels": ["a", "b"]})
    refused = vmamba("export", "d.safetensors", "d.onnx")
    assert refused.status == 2
    assert "cannot be exported whole" in refused.err
    assert "--task features" in refused.err
    outcome = vmamba("export", "d.safetensors", "d.onnx", "--task", "features")
    assert outcome.status == 0, outcome.err
    exported = load_exported(tmp_path / "d.onnx")
    assert exported.description.outputs == ("p2", "p3", "p4", "p5", "p6")
    shapes = [output.shape for output in exported(np.zeros((1, 3, 64, 96), np.float32))]
    assert shapes == [(1, 8, 16, 24), (1, 8, 8, 12), (1, 8, 4, 6), (1, 8, 2, 3), (1, 8, 1, 2)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export"], "name what to export"),
        (["export", "vmamba_tset", "x.onnx"], "vmamba_tset"),
        (["export", "vmamba_test", "x.txt", "--pretrained", "false"], "must end in .onnx"),
        (["export", "vmamba_test", "--img_size", "3"], "img_size must be 32 or more"),
        (["export", "vmamba_test", "--task", "features", "--data", "digits"], "--task classification"),
        (["export", "vmamba_test", "--pretrained", "false", "--data", "nope"], "names no known data set"),
        (["export", "vmamba_test", "--pretrained", "false", "--images", "nope.png"], "match for nope.png"),
        (["serve", "missing.onnx"], "there is no file"),
        (["serve", "--port", "99999"], "port must be"),
        (["serve", "--max_batch", "0"], "max_batch must be 1 or more"),
        (["embed", "images"], "name the images and the file"),
        (["embed", "nowhere", "x.npz"], "no images at nowhere"),
        (["embed", "nowhere", "no/x.npz"], "there is no folder"),
        (["demo", "--port", "-1"], "port must be"),
    ],
)
def test_what_cannot_be(vmamba, words, message):
    outcome = vmamba(*words)
    assert outcome.status == 2
    assert message in outcome.err


def test_embed(vmamba, weights, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "images" / "red.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"x")
    outcome = vmamba("embed", "images", "out.npz", "--checkpoint", weights, "--normalize", "true")
    assert outcome.status == 1
    assert "skipped" in outcome.err
    with np.load(tmp_path / "out.npz") as written:
        assert written["embeddings"].shape == (1, 16)
        assert np.linalg.norm(written["embeddings"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow  # a server in a process of its own
def test_serve_answers_what_it_accepted_when_told_to_end(weights, tmp_path):
    words = [sys.executable, "-m", "vmamba", "serve", str(weights), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found
        url = found.group(0)
        Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
        content = (tmp_path / "red.png").read_bytes()
        statuses, lost = [], []

        def client():
            with httpx.Client(timeout=60) as session:
                while True:
                    try:
                        answer = session.post(f"{url}/predict", content=content, headers={"Content-Type": "image/png"})
                    except httpx.ConnectError:
                        return  # not accepted any more
                    except httpx.HTTPError as error:
                        lost.append(error)
                        return
                    statuses.append(answer.status_code)

        threads = [threading.Thread(target=client) for _ in range(8)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while len(statuses) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert set(statuses) == {200}
        assert lost == []
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
