import json

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from coco_samples import CATEGORIES, COLOURS, make_coco
from vmamba.data.coco import find_sets, read_coco
from vmamba.data.coco_loading import (
    Augmentation,
    DetectionDataset,
    View,
    collate,
    detection_evaluation_loader,
    detection_training_loader,
    draw_view,
    masks_in,
    whole,
)
from vmamba.data.reading import Draw, Share


def read(root, name="train", masks=True):
    return read_coco(root / f"{name}.json", root / "images", masks=masks)


def changed(root, change):
    """Write the file again after a change to its content."""
    path = root / "train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path):
    make_coco(tmp_path, 4)
    return tmp_path


def test_a_sound_file_is_read_without_a_word(root):
    images = read(root)
    assert images.classes == ("disc", "square", "triangle")  # ids 3, 7 and 11: gaps are closed
    assert (len(images), images.objects) == (4, 8)
    assert not images.problems.lines
    first = images.images[0]
    assert first.read().size == (first.width, first.height)


def test_objects_lie_where_they_were_painted(root):
    for image in read(root).images:
        pixels = np.asarray(image.read())
        masks = masks_in(image, range(len(image.labels)), whole(image)).astype(bool)
        for mask, label, box, area in zip(masks, image.labels, image.boxes, image.areas, strict=True):
            colour = COLOURS[list(CATEGORIES)[label]]
            assert (pixels[mask] == colour).all()
            assert mask.sum() == area
            rows, columns = np.nonzero(mask)
            assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == box.tolist()


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda a: a.update(bbox=[500, 5, 10, 10]), "box outside the image"),
        (lambda a: a.update(bbox=[5, 5, 0, 10]), "box of no area"),
        (lambda a: a.update(bbox=[5, 5, -3, 10]), "box of no area"),
        (lambda a: a.update(bbox=[5, 5, 10]), "box that is not four numbers"),
        (lambda a: a.update(bbox=[5, 5, 10, float("nan")]), "box that is not four numbers"),
        (lambda a: a.pop("bbox"), "box that is not four numbers"),
        (lambda a: a.update(category_id=4), "unknown category"),
        (lambda a: a.update(image_id=4711), "annotation of an image that is not there"),
        (lambda a: a.pop("segmentation"), "no mask"),
        (lambda a: a.update(segmentation=[[1, 2, 3, 4]]), "polygon without three corners"),
        (lambda a: a.update(segmentation=[[900, 900, 950, 900, 950, 950]]), "mask outside the image or of no area"),
        (lambda a: a.update(segmentation=[[5, 5, 9, 5, 7, 5]]), "mask outside the image or of no area"),
        (lambda a: a.update(segmentation={"size": [9, 9], "counts": [81]}), "mask of another size"),
        (
            lambda a: a.update(segmentation={"size": [80, 112], "counts": [5, 5]}),
            "run lengths that do not fill the image",
        ),
        (lambda a: a.update(segmentation={"size": [80, 112], "counts": [8960]}), "mask without a pixel"),
        (lambda a: a.update(segmentation={"size": [80, 112], "counts": "\x01ab"}), "run lengths that cannot be read"),
        (lambda a: a.update(segmentation={"size": [80, 112], "counts": "o"}), "run lengths that cannot be read"),
        (lambda a: a.update(segmentation="disc"), "mask of an unknown kind"),
    ],
)
def test_a_wrong_record_is_skipped_counted_and_named(root, change, kind):
    changed(root, lambda content: change(content["annotations"][2]))
    images = read(root)
    assert images.objects == 7
    assert dict(images.problems.counts) == {kind: 1}
    (line,) = images.problems.lines
    assert "train.json: annotation 3" in line
    assert kind in line


def test_a_record_that_is_no_object_is_skipped(root):
    changed(root, lambda content: content["annotations"].append("disc"))
    assert "annotation number 8" in read(root).problems.lines[0]


def test_an_image_record_without_id_or_name_is_told_what_it_lacks(root):
    changed(root, lambda content: content["images"].append({"id": 9, "width": 3, "height": 3}))
    assert "has no whole number as id, or no file_name" in read(root).problems.lines[0]


def test_categories_the_model_does_not_know_are_named(root):
    known = read_coco(root / "train.json", root / "images", masks=True, classes=["square", "tree"])
    assert "category_id 3, 'disc', which the model does not know" in "".join(known.problems.lines)
    with pytest.raises(
        ValueError, match=r"no category of .*train\.json \(disc, square, triangle, …\) is a class of the"
    ):
        read_coco(root / "train.json", root / "images", masks=True, classes=["tree", "car"])


def test_a_box_over_the_edge_is_cut_and_a_pixel_of_rounding_is_no_news(root):
    changed(root, lambda content: content["annotations"][0].update(bbox=[-20, 60.5, 40, 20]))
    images = read(root)
    assert images.images[0].boxes[0].tolist() == [0, 60.5, 20, 80]
    assert dict(images.problems.counts) == {"box cut at the edge": 1}
    assert (images.problems.skipped, images.problems.lines) == (0, [])
    assert "reaches 20 pixels out of the image, and was cut" in images.problems.mended[0]


def test_boxes_alone_need_no_masks(root):
    changed(root, lambda content: [a.pop("segmentation") for a in content["annotations"]])
    assert read(root, masks=False).objects == 8
    with pytest.raises(ValueError, match=r"no usable annotation among 8.*no mask"):
        read(root)


def test_a_missing_image_file_is_named_with_its_annotations(root):
    (root / "images" / "train-1.png").unlink()
    images = read(root)
    assert len(images) == 3
    assert images.problems.counts == {"missing image file": 1, "annotation of an image that is not there": 2}
    assert "train-1.png" in images.problems.lines[0]


def test_an_image_of_another_size_or_cut_short_is_damaged_when_it_is_read(root):
    Image.new("RGB", (112, 79)).save(root / "images" / "train-0.png")
    whole_file = (root / "images" / "train-1.png").read_bytes()
    (root / "images" / "train-1.png").write_bytes(whole_file[: len(whole_file) // 2])
    (batch,) = detection_evaluation_loader(read(root), 8)
    assert len(batch) == 2
    assert "112×79 pixels when upright, annotated as 112×80" in batch.damaged[0]
    assert "train-1.png" in batch.damaged[1]
    (parts,) = list(detection_training_loader(read(root), Augmentation((64,), 100), 4, masks=True, seed=0).epoch(0, 0))
    (training,) = parts
    assert len(training) == 2
    assert training.images.shape[0] == 4  # stand-ins keep the batch's size
    assert len(training.targets()) == 4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not readable JSON"),
        ('{"images": [{"id": 1', "seems to be cut short"),
        ("[]", "has no list 'images'"),
        ('{"images": [], "annotations": []}', "has no list 'categories'"),
        ('{"images": [], "annotations": [], "categories": []}', "has no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no usable annotation"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}, {"id": 1}]}', "two categories with the id 1"),
        ('{"images": [], "annotations": [], "categories": [{"name": "a"}]}', "without a whole number as id"),
    ],
)
def test_a_file_that_means_nothing_is_refused(root, text, sentence):
    (root / "train.json").write_text(text)
    with pytest.raises(ValueError, match=sentence) as caught:
        read(root)
    assert "train.json" in str(caught.value)


def test_two_images_of_one_id_and_a_missing_folder_are_refused(root):
    changed(root, lambda content: content["images"].append({**content["images"][0], "file_name": "other.png"}))
    with pytest.raises(ValueError, match="two images with the id 5"):
        read(root)
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_coco(root / "train.json", root / "nowhere", masks=True)
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        read_coco(root / "none.json", root, masks=True)


def test_a_crowd_is_neither_learnt_nor_lost(root):
    def crowded(content):
        runs = [0, 40, 80 * 112 - 40]
        content["annotations"][0].update(iscrowd=1, segmentation={"size": [80, 112], "counts": runs})

    changed(root, crowded)
    images = read(root)
    assert images.images[0].crowd.tolist() == [True, False]
    sample = DetectionDataset(images, True, Augmentation((80,), 200, flip=0))[Draw(0, 1)]
    assert len(sample.labels) == 1


@pytest.mark.parametrize("seed", range(6))
def test_a_view_moves_picture_boxes_and_masks_together(root, seed):
    """In every view, the objects' pixels have the objects' colours, and the boxes close around the masks."""
    images = read(root)
    how = Augmentation((60, 90, 120), 200, flip=0.5, crop=0.5)
    for position in range(len(images)):
        sample = DetectionDataset(images, True, how)[Draw(position, seed)]
        for box, label, mask in zip(sample.boxes, sample.labels.tolist(), sample.masks.bool(), strict=True):
            colour = torch.tensor(COLOURS[list(CATEGORIES)[label - 1]]).float()
            inner = torch.nn.functional.max_pool2d((~mask)[None].float(), 5, 1, 2)[0] == 0  # away from the edge
            if inner.any():
                assert (sample.image[:, inner].float().mean(1) - colour).abs().max() < 12
            rows, columns = np.nonzero(mask.numpy())
            around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert np.abs(np.array(around) - box.numpy()).max() <= 2.5


def test_cutting_a_mask_is_drawing_the_cut_polygon(root):
    image = read(root).images[0]
    view = View(10, 5, 60, 50, 60, 50, False)
    every = range(len(image.labels))
    np.testing.assert_array_equal(masks_in(image, every, view), masks_in(image, every, whole(image))[:, 5:55, 10:70])


def test_views_follow_the_published_rule():
    chance = np.random.default_rng(0)
    plain = Augmentation((480, 800), 1333, flip=0.0)
    sides = {(view.rows, view.columns) for view in (draw_view(480, 640, plain, chance) for _ in range(50))}
    assert sides == {(480, 640), (800, 1067)}
    assert draw_view(100, 1000, Augmentation((800,), 1333), chance)[4:6] == (1333, 133)
    for _ in range(200):
        view = draw_view(480, 640, Augmentation((800,), 1333, crop=1.0), chance)
        assert 0 <= view.x <= 640 - view.width
        assert 0 <= view.y <= 480 - view.height
        assert 384 / (600 / 480) - 1 <= view.height <= 480  # smallest where the short side has 600 pixels
    tall = draw_view(300, 20, Augmentation((64,), 128, crop=1.0), chance)
    assert min(tall.rows, tall.columns) >= 1


def test_batches_are_the_same_for_any_number_of_processes_and_give_no_image_twice(root):
    images = read(root)
    alone = [
        b for (b,) in detection_training_loader(images, Augmentation((64,), 96), 4, masks=True, seed=3).epoch(2, 0)
    ]
    shared = [
        [b for (b,) in detection_training_loader(
            images, Augmentation((64,), 96), 4, masks=True, seed=3, share=Share(rank, 2)
        ).epoch(2, 0)]
        for rank in (0, 1)
    ]  # fmt: skip
    for one, *parts in zip(alone, *shared, strict=True):
        assert torch.equal(one.keys, torch.cat([part.keys for part in parts]))
        assert torch.equal(one.boxes, torch.cat([part.boxes for part in parts]))
    keys = [
        k for r in (0, 1) for b in detection_evaluation_loader(images, 1, share=Share(r, 2)) for k in b.keys.tolist()
    ]
    assert sorted(keys) == [5, 15, 25, 35]
    with pytest.raises(ValueError, match="cannot be divided among 3 processes"):
        detection_training_loader(images, Augmentation(), 4, masks=True, seed=0, share=Share(0, 3))


def test_a_batch_comes_apart_as_it_was_put_together(root):
    dataset = DetectionDataset(read(root), True, Augmentation((48, 80), 200))
    samples = [dataset[Draw(i, i)] for i in range(4)]
    batch = collate(samples, masks=True)
    for sample, image, target in zip(samples, batch.pictures(), batch.targets(), strict=True):
        assert torch.equal(sample.image, (image * 255).round().byte())
        assert torch.equal(sample.masks, target["masks"])
        assert torch.equal(sample.boxes, target["boxes"])
    half = batch.first(2)
    assert (len(half), len(half.targets())) == (2, 2)
    assert torch.equal(half.targets()[1]["masks"], samples[1].masks)


def test_a_batch_without_a_readable_image_counts_none(root):
    for path in (root / "images").iterdir():
        path.write_bytes(b"rubbish")
    ((batch,),) = detection_training_loader(read(root), Augmentation((64,), 96), 4, masks=True, seed=0).epoch(0, 0)
    assert len(batch) == 0
    assert len(batch.damaged) == 4
    assert [len(target["labels"]) for target in batch.targets()] == [0] * 4


def test_sets_are_found_in_the_usual_layouts(tmp_path, root):
    assert find_sets(root) == [(root / "train.json", root / "images")]
    assert find_sets(root / "train.json") == find_sets(root)
    coco = tmp_path / "coco"
    for part in ("annotations", "train2017", "val2017"):
        (coco / part).mkdir(parents=True)
    for part in ("train", "val"):
        (coco / f"annotations/instances_{part}2017.json").write_text("{}")
    assert [file.name for file, _ in find_sets(coco)] == ["instances_train2017.json", "instances_val2017.json"]
    assert find_sets(coco)[1][1] == coco / "val2017"
    with pytest.raises(FileNotFoundError, match="holds no annotations in COCO's format"):
        find_sets(coco / "train2017")
    with pytest.raises(FileNotFoundError, match="no folder or annotation file"):
        find_sets(tmp_path / "none")


def test_the_split_is_the_same_every_time_and_shares_nothing(root):
    images = read(root)
    kept, out = images.split(0.25)
    again = images.split(0.25)
    assert [i.key for i in kept.images] == [i.key for i in again[0].images]
    assert {i.key for i in kept.images} | {i.key for i in out.images} == {5, 15, 25, 35}
    assert len(out) == 1
    with pytest.raises(ValueError, match="too few to hold"):
        images.split(0.01)


def test_our_reading_of_compressed_run_lengths_is_cocos():
    from vmamba.data.coco import _decoded_runs

    chance = np.random.default_rng(0)
    for _ in range(50):
        mask = (chance.random((37, 53)) < chance.random()).astype(np.uint8)
        text = coco_mask.encode(np.asfortranarray(mask))["counts"]
        flat = np.concatenate([[0], mask.T.ravel(), [2]])
        edges = np.flatnonzero(np.diff(flat[1:-1]) != 0) + 1
        runs = np.diff([0, *edges, mask.size]).tolist()
        expected = runs if mask[0, 0] == 0 else [0, *runs]
        assert list(_decoded_runs(text.decode() if isinstance(text, bytes) else text)) == expected
