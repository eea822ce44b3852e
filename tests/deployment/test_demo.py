import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vmamba
from vmamba.cli.demo import make_looker, write_examples
from vmamba.cli.opening import OpenedModel
from vmamba.data.transforms import Preprocessing
from vmamba.deployment.demo import enlarged, heat

LABELS = tuple(f"class {i}" for i in range(10))


@pytest.fixture(scope="module")
def demo_model():
    torch.manual_seed(0)
    return vmamba.create_model("vmamba_test").eval()


@pytest.fixture(scope="module")
def model_file(demo_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "weights.safetensors"
    metadata = {"labels": list(LABELS), **Preprocessing(img_size=64).to_dict()}
    vmamba.save_checkpoint(demo_model, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def looker(demo_model):
    opened = OpenedModel(demo_model, "x", LABELS, Preprocessing(img_size=64), {}, torch.device("cpu"))
    return make_looker(opened, None)


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def test_looker(looker, picture):
    classes = looker.classify(picture)
    assert len(classes) == 5
    assert list(classes.values()) == sorted(classes.values(), reverse=True)
    assert looker.view(picture).size == (64, 64)
    first, other = looker.activation(picture, (0, 0)), looker.activation(picture, (60, 60))
    assert first.shape == other.shape == (4, 4)
    assert first.min() >= 0
    assert not np.allclose(first, other)
    field = looker.receptive_field(picture)
    assert field.shape == (64, 64)
    assert field.max() > 0


def test_unknown_stage():
    model = vmamba.create_model("vmamba_test")
    with pytest.raises(ValueError, match="--stage must be from 0 to 3, not 9"):
        make_looker(OpenedModel(model, "x", None, Preprocessing(), {}, torch.device("cpu")), 9)


def test_heat_is_brightest_where_values_are_largest():
    values = np.zeros((4, 4))
    values[1, 2] = 5.0
    drawn = np.asarray(heat(values, Image.new("RGB", (80, 80), "grey"))).sum(axis=2)
    row, column = np.unravel_index(drawn.argmax(), drawn.shape)
    assert 20 <= row < 40
    assert 40 <= column < 60
    assert heat(np.zeros((3, 5))).size == (5, 3)  # nothing at all is drawn too
    assert enlarged(Image.new("RGB", (32, 64))).size == (448, 896)


@pytest.mark.parametrize(("img_size", "count"), [(32, 4), (224, 2)])
def test_examples(tmp_path, img_size, count):
    paths = write_examples(tmp_path, img_size)
    assert len(paths) == count
    for path in paths:
        with Image.open(path) as image:
            image.load()


@pytest.mark.slow  # starts the page and Chromium
def test_page_in_chromium(model_file, looker, picture, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    picture.save(tmp_path / "picture.png")
    words = [sys.executable, "-m", "vmamba", "demo", str(model_file), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        best = max(looker.classify(picture).items(), key=lambda pair: pair[1])[0]
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for width, height in ((1200, 900), (390, 844)):
                tab = browser.new_page(viewport={"width": width, "height": height})
                use_page(sync_api, tab, address, tmp_path / "picture.png", best)
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
            browser.close()
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def use_page(sync_api, tab, address, file, best):
    """Upload → result → click → another map."""
    problems = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.goto(address)
    tab.set_input_files("#given input[type=file]", str(file))
    tab.wait_for_selector("#field img", timeout=60_000)
    sync_api.expect(tab.locator("#classes")).to_contain_text(best)
    before = tab.get_attribute("#activation img", "src")
    tab.locator("#view img").click(position={"x": 20, "y": 60})
    changed = "before => document.querySelector('#activation img').src !== before"
    tab.wait_for_function(changed, arg=before, timeout=60_000)
    assert problems == []
