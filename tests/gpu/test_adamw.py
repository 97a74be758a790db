"""AdamW in one kernel against float64, and beside PyTorch's: python -m pytest -m gpu tests/gpu"""

import pytest
import torch

from normfree.config import ModelConfig, OptimConfig
from normfree.model import Transformer, init_weights
from normfree.training.optimizer import OneKernelAdamW, build_optimizer

pytestmark = pytest.mark.gpu

SHAPES = [(1,), (3,), (1024,), (1025,), (7, 11), (513, 64)]


def held(fast, dtype=torch.float32, device="cuda", betas=(0.9, 0.999)):
    """Tensors, and an optimizer of them: ours, PyTorch's fused one, or float64 on the CPU, which is what both mean."""
    generator = torch.Generator().manual_seed(0)
    holder = torch.nn.ParameterList([torch.randn(shape, generator=generator) for shape in SHAPES]).to(device, dtype)
    config = OptimConfig(lr=1e-2, beta1=betas[0], beta2=betas[1], weight_decay=0.3)
    optimizer = build_optimizer(holder, config, fast)
    if device == "cuda":
        optimizer.found_inf = torch.zeros((), device=device)
    return list(holder), optimizer


def exact(**more):
    return held(False, torch.float64, "cpu", **more)


def give_gradients(seed, *sides, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for i, shape in enumerate(SHAPES):
        grad = scale * torch.randn(shape, generator=generator)
        for params, _ in sides:
            params[i].grad = grad.to(params[i])  # a copy, as either device or precision differs from the draw's


def assert_close(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs.double(), rtol=2e-6, atol=1e-7)


def state(optimizer, p):
    return {name: value.clone() for name, value in optimizer.state[p].items()}


def test_it_is_chosen_on_the_fast_path_alone():
    assert isinstance(held(True)[1], OneKernelAdamW)
    assert not isinstance(held(False)[1], OneKernelAdamW)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95), (0.0, 0.0)])
@pytest.mark.parametrize("divisor", [None, 4.0])
def test_steps_are_those_of_exact_arithmetic(divisor, betas):
    (ours, optimizer), (wanted, reference) = sides = held(True, betas=betas), exact(betas=betas)
    if divisor:
        optimizer.grad_scale = torch.tensor(divisor, device="cuda")
    for step in range(6):
        give_gradients(step, *sides, scale=10.0 ** (step - 3))
        for p in wanted:
            p.grad /= divisor or 1.0
        for _, each in sides:
            each.step()
        assert_close(ours, wanted)
        for p, exact_p in zip(ours, wanted, strict=True):
            found = state(optimizer, p)
            for name, value in state(reference, exact_p).items():  # a moment may be a small difference of large terms
                close = 1e-6 * value.abs().max().item()
                torch.testing.assert_close(found[name].cpu().double(), value.double(), rtol=2e-6, atol=close)


def test_a_masked_step_changes_nothing():
    ours, optimizer = side = held(True)
    give_gradients(0, side)
    optimizer.step()
    before = [(p.detach().clone(), state(optimizer, p)) for p in ours]
    give_gradients(1, side, scale=float("nan"))
    optimizer.found_inf.fill_(1.0)
    optimizer.step()
    for p, (value, kept) in zip(ours, before, strict=True):
        assert torch.equal(p, value)
        assert all(torch.equal(optimizer.state[p][name], x) for name, x in kept.items())
    optimizer.found_inf.fill_(0.0)
    optimizer.step()
    assert all(p.isnan().all() for p in ours), "the control: the mask was what kept them"


def test_gradients_may_be_parts_of_a_tensor():
    """Those of the biases of queries, keys and values are: they begin anywhere, and need not be contiguous."""
    (ours, _), (wanted, _) = sides = held(True), exact()
    give_gradients(0, *sides)
    for p in ours:
        room = torch.zeros(*p.shape[:-1], 2 * p.size(-1) + 1, device="cuda")
        room[..., 1::2] = p.grad
        p.grad = room[..., 1::2]
    for _, optimizer in sides:
        optimizer.step()
    assert_close(ours, wanted)


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_run_may_go_on_with_the_other(ours_first):
    """State is the same: what one has written the other takes."""
    first, second, (wanted, reference) = held(ours_first), held(not ours_first), exact()
    give_gradients(0, first, (wanted, reference))
    first[1].step()
    reference.step()
    for before, after in zip(first[0], second[0], strict=True):
        after.data.copy_(before.data)
        second[1].state[after] = state(first[1], before)
    give_gradients(1, second, (wanted, reference))
    second[1].step()
    reference.step()
    for ours, theirs in zip(second[0], wanted, strict=True):  # looser than above, for PyTorch's
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=2e-6, atol=1e-6)


def test_a_models_parameters_are_all_taken():
    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=96)).cuda()
    init_weights(model, 0)
    optimizer = build_optimizer(model, OptimConfig(), fast=True)
    optimizer.found_inf = torch.zeros((), device="cuda")
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.arange(16, device="cuda")[None]).square().mean().backward()
    optimizer.step()
    changed = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    moved = [bool(p.grad.any()) for p in model.parameters()]
    assert all(c for c, m in zip(changed, moved, strict=True) if m)
    assert sum(moved) > len(moved) // 2
