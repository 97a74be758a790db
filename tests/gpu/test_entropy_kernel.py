"""The Triton kernels against float64 and against the PyTorch path: python -m pytest -m gpu -n 0 tests/gpu"""

import pytest
import torch

from normfree.diagnostics.census import Census, count_non_finite
from normfree.diagnostics.entropy import attention_entropy, attention_rows

pytestmark = pytest.mark.gpu
HALF = [torch.bfloat16, torch.float16]


def inputs(shape, dtype, largest=None, keys=None):
    """Random q and k, strided as the model's are; `largest` score if given."""
    B, H, T, D = shape
    S = keys or T
    q, k = (torch.randn(B, n, H, D, device="cuda").transpose(1, 2) for n in (T, S))
    if largest is not None:
        q = q * (largest / (q @ k.transpose(-1, -2) * D**-0.5).abs().max())
    return q.to(dtype), k.to(dtype)


def reference(q, k, offset=0):
    """Entropy, log-sum-exp, maximum and probability of key 0, in float64, of the same rounded inputs."""
    scores = q.double() @ k.double().transpose(-1, -2) * q.size(-1) ** -0.5
    hidden = ~torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril(offset)
    scores = scores.masked_fill(hidden, float("-inf"))
    log_p = scores.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    return entropy, scores.logsumexp(-1), scores.amax(-1), p[..., 0]


@pytest.mark.parametrize("largest", [1, 50, 500])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("T", [1, 17, 128, 1000, 4096])
def test_error_against_float64(T, dtype, largest):
    q, k = inputs((1, 2, T, 64), dtype, largest)
    found, right = attention_rows(q, k), reference(q, k)
    assert (found.entropy - right[0]).abs().max() < 1e-4
    for ours, theirs in zip(found[1:3], right[1:3], strict=True):
        assert (ours - theirs).abs().max() < 1e-6 * max(largest, 10)
    assert (found.sink - right[3]).abs().max() < 1e-6 * max(largest, 10)
    assert (found.sink <= 1).all()


@pytest.mark.parametrize("D", [16, 24, 40, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_head_size(D, dtype):
    q, k = inputs((2, 3, 200, D), dtype, 20)
    assert (attention_entropy(q, k) - reference(q, k)[0]).abs().max() < 1e-4


def test_a_query_offset():
    q, k = inputs((2, 3, 30, 64), torch.bfloat16, 20, keys=100)
    found, right = attention_rows(q, k, q_offset=70), reference(q, k, 70)
    for ours, theirs in zip(found, right, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


def test_nan_and_infinity_are_what_the_pytorch_path_says():
    q, k = inputs((2, 2, 100, 64), torch.float32)
    k[0, 0, 50, 3], k[0, 0, 80, 3], q[1, 1, 7, 0] = float("inf"), float("nan"), float("nan")
    for ours, cpu in zip(attention_rows(q, k), attention_rows(q.cpu(), k.cpu()), strict=True):
        assert torch.equal(ours.isnan().cpu(), cpu.isnan())
        assert torch.equal(ours.isinf().cpu(), cpu.isinf())


def test_strided_inputs_are_not_copied_and_memory_is_linear_in_t():
    """The extra memory is the four results; a copy of q alone would be ten times that."""
    for T in (1024, 8192):
        q, k, _ = torch.randn(1, T, 3, 12, 64, device="cuda", dtype=torch.bfloat16).permute(2, 0, 3, 1, 4)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        attention_rows(q, k)
        assert torch.cuda.max_memory_allocated() - before <= 4 * 12 * T * 4 + 4096


@pytest.mark.parametrize("D", [16, 24, 64, 128, 256])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (257, 257), (30, 100)])
def test_gradients_against_the_pytorch_path(T, S, dtype, limit, D):
    q, k = inputs((2, 3, T, D), dtype, 10, keys=S)
    g_entropy, g_lse = torch.randn(2, 2, 3, T, device="cuda")
    grads = []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        a, b = (t.detach().to(device, kind).requires_grad_() for t in (q, k))
        rows = attention_rows(a, b, q_offset=S - T)
        ((rows.entropy * g_entropy.to(device)).sum() + (rows.lse * g_lse.to(device)).sum()).backward()
        grads.append((a.grad.double().cpu(), b.grad.double().cpu()))
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - theirs).norm() <= limit * theirs.norm() + 1e-12


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize(("T", "dtype"), [(1, torch.float32), (100, torch.bfloat16), (300, torch.float16)])
def test_the_census_is_what_the_cpu_says(T, dtype, bad):
    q, k = inputs((5, 3, T, 24), dtype, 20)
    if bad is not None:
        k[2, 1, T // 2, 3] = bad
    ours, cpu = (Census.take(a, b, 0.2, True) for a, b in ((q, k), (q.cpu(), k.cpu())))
    for name, value in ours.summary._asdict().items():
        assert torch.allclose(value.cpu(), getattr(cpu.summary, name), rtol=1e-4, atol=1e-5, equal_nan=True), name
    assert torch.allclose(ours.entropy.cpu(), cpu.entropy, atol=1e-4, equal_nan=True)


def test_counting_looks_only_behind_a_gate_that_is_not_finite():
    x = torch.randn(4, 50, 3, 24, device="cuda").transpose(1, 2)
    x[0, 1, 2, 3], x[3, 2, 49, 23], x[1, 0, 0, 0] = float("nan"), float("inf"), float("-inf")
    for view in (x, x[:, 0], x[0, 1], x.flatten()):
        found = count_non_finite(view, view.abs().amax())
        assert found.sum(0).tolist() == [int(view.isnan().sum()), int(view.isinf().sum())]
    assert count_non_finite(x, torch.ones((), device="cuda")).sum(0).tolist() == [0, 0]


def test_inside_a_compiled_graph_with_gradients():
    def loss(q, k):
        return attention_entropy(q, k).mean()

    q, k = (t.requires_grad_() for t in inputs((2, 2, 64, 32), torch.float32, 5))
    eager = torch.autograd.grad(loss(q, k), (q, k))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k), (q, k))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-7)
