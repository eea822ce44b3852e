"""Pairs of pictures and masks: what is found, what a mask may be, and what is done to both."""

import numpy as np
import pytest
import torch
from PIL import Image

from mask_samples import CLASSES, write_pairs
from vmamba.data.images import DamagedImageError
from vmamba.data.segmentation import NO_CLASS, MaskFormat, open_segmentation_source, read_mask
from vmamba.data.segmentation_loaders import (
    SegmentationAugmentation,
    SegmentationPreprocessing,
    evaluation_pairs,
    training_pairs,
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), 10)


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def test_plain_folders_are_divided_the_same_way_every_time(pairs):
    one, two = (open_segmentation_source(str(pairs), 0.3) for _ in range(2))
    assert one == two
    assert one.classes == CLASSES
    assert (len(one.train), len(one.held_out)) == (7, 3)
    assert not set(one.train.images) & set(one.held_out.images)
    picture, mask = one.train.read(0)
    assert picture.size == mask.shape[::-1] == (72, 64)
    assert set(np.unique(mask)) <= set(range(4))


@pytest.mark.parametrize("inner", [("train/images", "train/masks"), ("images/train", "masks/train")])
def test_a_split_of_the_data_set_is_kept(tmp_path, inner):
    for part, number in (("train", 3), ("val", 2)):
        for index in range(number):
            for kind, values in zip(
                inner, (np.zeros((4, 4, 3), np.uint8), np.full((4, 4), index, np.uint8)), strict=True
            ):
                save(tmp_path / kind.replace("train", part) / f"{index}.png", values)
    source = open_segmentation_source(str(tmp_path))
    assert (len(source.train), len(source.held_out)) == (3, 2)
    assert source.classes == ("class 0", "class 1", "class 2")  # the largest value tells, where nobody names them


def test_ade20k_counts_from_one_and_reads_names(tmp_path):
    for part in ("training", "validation"):
        save(tmp_path / "images" / part / "a.jpg", np.zeros((2, 3, 3), np.uint8))
        save(tmp_path / "annotations" / part / "a.png", np.array([[0, 1, 150], [2, 0, 1]], np.uint8))
    lines = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t0.1\t1\t1\tthing{i}, other" for i in range(1, 151))]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines))
    source = open_segmentation_source(f"ade20k:{tmp_path}")
    assert source.classes[:2] == ("thing1", "thing2")
    assert source.held_out.read(0)[1].tolist() == [[NO_CLASS, 0, 149], [1, NO_CLASS, 0]]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines[:9]))
    with pytest.raises(ValueError, match="names 8 classes"):
        open_segmentation_source(f"ade20k:{tmp_path}")


def test_masks_of_many_kinds_mean_the_same(tmp_path):
    values = np.array([[0, 1], [2, 255]], np.uint8)
    indexed = Image.fromarray(values).convert("L")
    palette = Image.frombytes("P", (2, 2), values.tobytes())
    palette.putpalette([7, 7, 7, 200, 10, 10, 1, 2, 3] + [0] * 759)
    grey = np.repeat(values[..., None], 3, axis=2)
    for name, image in (
        ("l.png", indexed),
        ("p.png", palette),
        ("rgb.png", Image.fromarray(grey)),
        ("i16.png", Image.fromarray(values.astype(np.uint16))),
        ("l.tif", indexed),
    ):
        image.save(tmp_path / name)
        assert read_mask(tmp_path / name, MaskFormat(3)).tolist() == values.tolist(), name
    painted = np.array([[[255, 0, 0], [0, 255, 0]], [[255, 255, 255], [255, 0, 0]]], np.uint8)
    path = save(tmp_path / "painted.png", painted)
    assert read_mask(path, MaskFormat(2, colours=(0xFF0000, 0x00FF00))).tolist() == [[0, 1], [255, 0]]
    with pytest.raises(DamagedImageError, match="#00ff00"):
        read_mask(path, MaskFormat(2, colours=(0xFF0000, 0x0000FF)))
    with pytest.raises(DamagedImageError, match="painted"):
        read_mask(path, MaskFormat(2))
    with pytest.raises(DamagedImageError, match=r"no class \(2\); classes are 0 to 1"):
        read_mask(tmp_path / "l.png", MaskFormat(2))
    real = tmp_path / "real.tif"
    Image.fromarray(values.astype(np.float32)).save(real)
    assert read_mask(real, MaskFormat(3)).tolist() == values.tolist()
    for wrong in (0.5, float("nan"), float("inf")):
        Image.fromarray(np.array([[0, wrong]], np.float32)).save(real)
        with pytest.raises(DamagedImageError, match="no whole numbers"):
            read_mask(real, MaskFormat(3))


def test_every_fault_of_a_pair_is_named_and_counted(tmp_path):
    root = write_pairs(tmp_path / "set", 8)
    images, masks = root / "images", root / "masks"
    (masks / "000.png").write_bytes(b"")
    (masks / "001.png").write_bytes((masks / "001.png").read_bytes()[:60])
    save(masks / "002.png", np.zeros((5, 5), np.uint8))
    save(masks / "003.png", np.full((64, 72), 9, np.uint8))
    (masks / "004.png").unlink()
    (images / "005.jpg").unlink()
    (images / "006.jpg").write_text("no picture")
    source = open_segmentation_source(str(root), 0.2)
    every = source.train.subset(range(len(source.train)))
    for part, place in ((source.held_out, "held out"), (every, "train")):
        loader = evaluation_pairs(part, SegmentationPreprocessing(64), workers=0)
        assert len(list(loader)) == len(part), place
    lines = "\n".join(
        line
        for part in (source.train, source.held_out)
        for batch in evaluation_pairs(part, SegmentationPreprocessing(64), workers=0)
        for line in batch.damaged
    )
    for expected in (
        "000.png: the file is empty",
        "001.png: cannot be decoded",
        "002.png: the mask has 5×5 pixels, its picture",
        "003.png: the mask has values that stand for no class (9)",
        "004.jpg: there is no mask of this name",
        "005.png: there is no picture of this name",
        "006.jpg: not an image",
    ):
        assert expected in lines
    assert len(lines.splitlines()) == 7

    good = [i for i in range(len(source.train)) if "007" in source.train.name(i)] or [0]
    mixed = source.train.subset([*good, *(i for i in range(len(source.train)) if i not in good)])
    augmentation = SegmentationAugmentation(SegmentationPreprocessing(64), 32)
    (batch,) = next(training_pairs(mixed, augmentation, len(mixed), seed=0, workers=0).epoch(0))
    assert batch.images.shape == (len(mixed), 3, 32, 32)  # the shape stays
    assert len(batch) + len(batch.damaged) == len(mixed)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\n", "names 1 classes"),
        ("a\na\n", "same name"),
        ("a #ff0000\nb\n", "all or none"),
        (b"\xff\xfe\xfa", "UTF-8"),
    ],
)
def test_class_lists_that_cannot_be_are_refused(tmp_path, content, message):
    root = write_pairs(tmp_path / "set", 2)
    path = root / "classes.txt"
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    with pytest.raises(ValueError, match=message):
        open_segmentation_source(str(root))


def test_folders_that_hold_no_pairs_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="ade20k:FOLDER"):
        open_segmentation_source(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="images and masks"):
        open_segmentation_source(str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    with pytest.raises(ValueError, match="of the same name"):
        open_segmentation_source(str(tmp_path))


def test_pictures_are_resized_as_published():
    preprocessing = SegmentationPreprocessing(512, 2048)
    assert preprocessing.size(480, 640) == (512, 683)
    assert preprocessing.size(100, 1000) == (205, 2048)  # the longer side wins
    assert preprocessing.size(480, 640, 0.5) == (256, 341)
    assert SegmentationPreprocessing(0).size(33, 77) == (33, 77)
    image = preprocessing(Image.new("RGB", (64, 64), (124, 116, 104)))
    assert image.shape == (3, 512, 512)
    assert image.abs().max() < 0.02


def test_picture_and_mask_go_through_augmentation_together():
    """A picture painted with its own classes still shows them after resizing, cutting, mirroring and padding."""
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)
    mask = np.kron(np.random.default_rng(0).integers(0, 3, (6, 8)), np.ones((16, 16), np.int64)).astype(np.uint8)
    preprocessing = SegmentationPreprocessing(96, mean=(0.0,) * 3, std=(1.0,) * 3)
    augmentation = SegmentationAugmentation(preprocessing, 80, photometric=False)
    padded = 0
    for _ in range(20):
        image, target = augmentation(Image.fromarray(colours[mask]), mask)
        assert image.shape == (3, 80, 80)
        assert target.shape == (80, 80)
        known = target != NO_CLASS
        padded += int((~known).any())
        assert (image[:, ~known] == 0).all()
        agree = image.argmax(0)[known] == target[known]
        assert agree.float().mean() > 0.95  # but for the blurred borders
    assert 0 < padded < 20


def test_cuts_that_one_class_fills_are_drawn_again():
    mask = np.zeros((64, 640), np.uint8)
    mask[:, 600:] = 1
    augmentation = SegmentationAugmentation(SegmentationPreprocessing(0), 64, (1.0, 1.0), flip=0, photometric=False)
    picture = Image.new("RGB", (640, 64))
    both = sum(augmentation(picture, mask)[1].unique().numel() == 2 for _ in range(300))
    # Of 577 places 40 show both classes, 25 so that neither fills more than three quarters: 7 % by chance; in ten
    # tries 36 %, and some more because the last cut is taken as it comes.
    assert 0.28 < both / 300 < 0.48


def test_an_epoch_of_updates_draws_from_whole_passes_and_can_begin_anywhere(pairs):
    source = open_segmentation_source(str(pairs), 0.3)
    augmentation = SegmentationAugmentation(SegmentationPreprocessing(64), 32)
    loader = training_pairs(source.train, augmentation, 4, seed=3, updates=7, parts=2, workers=0)
    assert loader.steps == 7
    batches = list(loader.epoch(1))
    positions = torch.cat([part.indices for parts in batches for part in parts])
    assert torch.bincount(positions).tolist() == [4] * 7
    later = list(loader.epoch(1, first=5))
    assert torch.equal(later[0][1].images, batches[5][1].images)
    assert torch.equal(later[1][0].masks, batches[6][0].masks)
    with pytest.raises(ValueError, match="cannot be divided"):
        training_pairs(source.train, augmentation, 5, seed=0, parts=2)
