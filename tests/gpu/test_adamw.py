"""AdamW in one kernel against PyTorch's: python -m pytest -m gpu tests/gpu"""

import pytest
import torch

from normfree.config import ModelConfig, OptimConfig
from normfree.model import Transformer, init_weights
from normfree.training.optimizer import OneKernelAdamW, build_optimizer

pytestmark = pytest.mark.gpu

SHAPES = [(1,), (3,), (1024,), (1025,), (7, 11), (513, 64)]


def pair(config=None):
    """Two copies of the same tensors, one with PyTorch's optimizer and one with ours."""
    found = []
    for fast in (False, True):
        generator = torch.Generator().manual_seed(0)
        draws = [torch.randn(shape, generator=generator) for shape in SHAPES]
        holder = torch.nn.ParameterList(draws).cuda()
        optimizer = build_optimizer(holder, config or OptimConfig(lr=1e-2, beta2=0.999, weight_decay=0.3), fast)
        optimizer.found_inf = torch.zeros((), device="cuda")
        found.append((list(holder), optimizer))
    return found


def give_gradients(sides, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for shape, *params in zip(SHAPES, *(side[0] for side in sides), strict=True):
        grad = scale * torch.randn(shape, generator=generator)
        for p in params:
            p.grad = grad.clone().cuda()


def state(optimizer, p):
    return {name: value.clone() for name, value in optimizer.state[p].items()}


def test_it_is_chosen_on_the_fast_path_alone():
    (_, plain), (_, fast) = pair()
    assert isinstance(fast, OneKernelAdamW)
    assert not isinstance(plain, OneKernelAdamW)


@pytest.mark.parametrize("divisor", [None, 3.0])
def test_steps_are_those_of_pytorch(divisor):
    sides = pair()
    for step in range(6):
        give_gradients(sides, step, scale=10.0 ** (step - 3))
        for _, optimizer in sides:
            if divisor:
                optimizer.grad_scale = torch.tensor(divisor, device="cuda")
            optimizer.step()
        (theirs, plain), (ours, fast) = sides
        for a, b in zip(theirs, ours, strict=True):
            torch.testing.assert_close(b, a, rtol=2e-6, atol=1e-7)
            for name, value in state(plain, a).items():  # a moment may be a small difference of large terms
                close = 1e-6 * value.abs().max().item()
                torch.testing.assert_close(fast.state[b][name], value, rtol=2e-6, atol=close)


def test_a_masked_step_changes_nothing():
    _, (ours, optimizer) = sides = pair()
    give_gradients(sides, 0)
    optimizer.step()
    before = [(p.detach().clone(), state(optimizer, p)) for p in ours]
    give_gradients(sides, 1, scale=float("nan"))
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
    sides = pair()
    give_gradients(sides, 0)
    for p in sides[1][0]:
        room = torch.zeros(*p.shape[:-1], 2 * p.size(-1) + 1, device="cuda")
        room[..., 1::2] = p.grad
        p.grad = room[..., 1::2]
    for _, optimizer in sides:
        optimizer.step()
    for a, b in zip(sides[0][0], sides[1][0], strict=True):
        torch.testing.assert_close(b, a, rtol=2e-6, atol=1e-7)


def test_a_run_may_go_on_with_the_other():
    """State is the same: what one has written the other takes."""
    sides = pair()
    give_gradients(sides, 0)
    for _, optimizer in sides:
        optimizer.step()
    (theirs, plain), (ours, fast) = sides
    for a, b in zip(theirs, ours, strict=True):
        kept = state(plain, a)
        plain.state[a] = state(fast, b)
        fast.state[b] = kept
    give_gradients(sides, 1)
    for _, optimizer in sides:
        optimizer.step()
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-6, atol=1e-7)


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
