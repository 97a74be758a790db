"""The loss that never holds all logits equals the one that does."""

import pytest
import torch
import torch.nn.functional as F

from normfree.kernels import loss
from normfree.model.losses import IGNORED, CrossEntropy, head_logits


def plain(hidden, weight, targets, used):
    logits = head_logits(hidden, weight, used)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 100, 333, 1 << 21])
@pytest.mark.parametrize("used", [64, 61])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_chunks_change_neither_value_nor_gradient(monkeypatch, chunk, used, scale):
    monkeypatch.setattr(loss, "CPU_LOGITS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = (scale * torch.randn(3, 7, 16, generator=generator)).requires_grad_()
    weight = torch.randn(64, 16, generator=generator).requires_grad_()
    targets = torch.randint(0, used, (3, 7), generator=generator)
    targets[1, 2] = IGNORED
    out = CrossEntropy()(hidden, weight, targets, used)
    expected = plain(hidden, weight, targets, used)
    assert out.count == 20
    assert out.sum.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.autograd.grad(3 * out.sum, (hidden, weight))
    theirs = torch.autograd.grad(3 * expected, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    assert ours[1][used:].abs().sum() == 0


def test_a_frozen_head_and_no_gradient_at_all():
    hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(32, 8)
    targets = torch.randint(0, 32, (2, 3))
    (grad,) = torch.autograd.grad(CrossEntropy()(hidden, weight, targets, 32).sum, hidden)
    assert torch.allclose(grad, torch.autograd.grad(plain(hidden, weight, targets, 32), hidden)[0], atol=1e-5)
    with torch.no_grad():
        assert CrossEntropy()(hidden, weight, targets, 32).sum.item() == pytest.approx(
            plain(hidden, weight, targets, 32).item(), rel=1e-5
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_hidden_state_makes_a_bad_loss(value):
    hidden = torch.randn(2, 3, 8)
    hidden[0, 1, 2] = value
    assert not CrossEntropy()(hidden, torch.randn(32, 8), torch.zeros(2, 3, dtype=torch.long), 32).sum.isfinite()
