import numpy as np
import pytest
from PIL import Image

from vmamba.training.pictures import draw_confusion, draw_curves, draw_predictions


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def ink(path):
    """Share of pixels of a PNG that are not white."""
    pixels = pixels_of(path)
    assert min(pixels.shape[:2]) > 100
    return (pixels < 250).any(2).mean()


def test_curves_are_drawn_once_there_is_an_epoch(tmp_path):
    path = tmp_path / "curves.png"
    step = {"kind": "step", "epoch": 1, "step": 5, "loss": 2.0, "lr": 1e-3}
    draw_curves([step], path)
    assert not path.exists()
    epoch = {"kind": "epoch", "train_loss": 1.0, "train_top1": 0.5, "loss": 1.1, "top1": 0.6, "lr": 1e-3}
    draw_curves([step, *({**epoch, "epoch": number, "step": 10 * number} for number in (1, 2, 3))], path)
    assert ink(path) > 0.005


@pytest.mark.parametrize("number", [2, 10, 70])
def test_confusion_matrix_of_few_and_many_classes(tmp_path, number):
    path = tmp_path / "confusion.png"
    counts = np.eye(number, dtype=int) * 5
    counts[0, 1] = 3
    draw_confusion(counts.tolist(), [f"class {i}" for i in range(number)], path)
    assert ink(path) > 0.02


def test_mistakes_are_red_in_the_grid_of_predictions(tmp_path):
    pictures = [Image.new("RGB", (8, 8), "black")] * 3
    paths = tmp_path / "right.png", tmp_path / "wrong.png"
    draw_predictions(pictures, ["a"] * 3, ["a", "a", "a"], [0.9] * 3, paths[0])
    draw_predictions(pictures, ["a"] * 3, ["a", "b", "a"], [0.9] * 3, paths[1])
    red = []
    for path in paths:
        pixels = pixels_of(path)
        red.append(int((pixels[..., 0] - pixels[..., 1] > 80).sum()))
    assert red[0] == 0
    assert red[1] > 20
