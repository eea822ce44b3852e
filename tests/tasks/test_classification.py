import pytest
import torch
from torch import nn

from vmamba.tasks.classification import classification_loss, evaluate, make_mixup

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


class Lookup(nn.Module):
    """Gives stored logits for images that hold their own position."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        assert not self.training
        return self.logits[images[:, 0, 0, 0].long()]


def batches(targets, size=4):
    positions = torch.arange(len(targets)).float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return zip(positions.split(size), targets.split(size), strict=True)


def test_report_counts_what_a_plain_loop_counts():
    logits, targets = torch.randn(30, 7), torch.randint(0, 6, (30,))  # no image of the last class
    model = Lookup(logits).train()
    report = evaluate(model, batches(targets), CLASSES)
    order = logits.argsort(1, descending=True)
    hits = order[:, 0] == targets
    assert report.count == 30
    assert report.top1 == pytest.approx(hits.float().mean().item())
    assert report.top5 == pytest.approx((order[:, :5] == targets[:, None]).any(1).float().mean().item())
    assert report.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), rel=1e-6)
    for index in range(6):
        assert report.per_class[index] == pytest.approx(hits[targets == index].float().mean().item())
    assert report.per_class[6] is None
    expected = torch.zeros(7, 7, dtype=torch.long)
    for target, said in zip(targets, order[:, 0], strict=True):
        expected[target, said] += 1
    assert report.confusion == tuple(tuple(row) for row in expected.tolist())
    assert model.training


def test_most_confused_names_the_most_frequent_mistakes():
    logits = nn.functional.one_hot(torch.tensor([1, 1, 1, 2, 0, 0]), 7).float()
    report = evaluate(Lookup(logits), batches(torch.tensor([0, 0, 1, 1, 1, 0])), CLASSES)
    assert report.most_confused(2) == [("ant", "bee", 2), ("bee", "ant", 1)]


def test_fewer_classes_than_five_and_empty_batches():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    empty = (torch.empty(0), torch.empty(0, dtype=torch.long))
    report = evaluate(Lookup(logits), [empty, *batches(torch.tensor([1, 1]))], ("no", "yes"))
    assert (report.count, report.top1, report.top5) == (2, 0.5, 1.0)
    with pytest.raises(ValueError, match="no readable image"):
        evaluate(Lookup(logits), [empty], ("no", "yes"))


def test_loss_smooths_indices_but_not_what_mixup_smoothed():
    logits, targets = torch.randn(4, 7), torch.randint(0, 7, (4,))
    soft = nn.functional.one_hot(targets, 7) * 0.9 + 0.1 / 7
    smoothed = classification_loss(logits, targets, 0.1)
    assert torch.allclose(smoothed, classification_loss(logits, soft, 0.1))
    assert not torch.allclose(smoothed, classification_loss(logits, targets, 0.0))
    assert classification_loss(logits.bfloat16(), targets, 0.0).dtype == torch.float32


def test_mixup_mixes_images_and_labels_alike():
    assert make_mixup(7, 0.0, 0.0, 0.1) is None
    mixup = make_mixup(7, mixup=1.0, cutmix=0.0, label_smoothing=0.0)
    targets = torch.tensor([0, 1])
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    mixed, labels = mixup(images.clone(), targets)
    share = mixed[0, 0, 0, 0]
    assert 0 < share < 1
    assert labels[0, 1] == pytest.approx(share.item(), abs=1e-5)
    assert labels[0].sum() == pytest.approx(1.0)
