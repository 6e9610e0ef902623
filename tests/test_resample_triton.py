"""Images of half or twice the size for CUDA: right under Triton's interpreter (or on a GPU), sound as code.

As in test_nearest_triton.py, what launches the kernel runs in a second pytest with TRITON_INTERPRET=1.
"""
import pytest
import torch

from kernels.plain import plain_resample

pytest.importorskip("triton")
import interpreter
from kernels.resample_triton import resample
from test_norm_triton import GPU, INTERPRETED, compiles, draw, launches, near


@pytest.mark.skipif(GPU or INTERPRETED, reason="this is the second process, or a GPU runs them here")
def test_under_the_interpreter():
    interpreter.check_tests(__file__)


@launches
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 4, 6, 4), (3, 128, 8, 8), (2, 20, 10, 14)], ids=str)
def test_right(shape, dtype, up):
    """Beside the plain form in float64, and so its gradient and the gradient of that."""
    found = []
    for kind, function in ((dtype, lambda x: resample(x, up, 0.5)),
                           (torch.float64, lambda x: 0.5 * plain_resample(x, up))):
        x = draw(*shape, dtype=dtype).to(kind).requires_grad_()
        y = function(x)
        g = draw(*y.shape, seed=1, dtype=dtype).to(kind).requires_grad_()
        gradient, = torch.autograd.grad(y, x, g, create_graph=True)
        again, = torch.autograd.grad(gradient, g, draw(*shape, seed=2, dtype=dtype).to(kind))
        found.append([y.detach(), gradient.detach(), again])
    assert all(near(a, b) for a, b in zip(*found))
    assert found[0][0].is_contiguous(memory_format=torch.channels_last)


@launches
def test_any_layout():
    x = draw(2, 3, 4, 4)
    assert torch.equal(resample(x.contiguous(), False), resample(x, False))


@compiles
@pytest.mark.parametrize("capability", (80, 90, 100, 120))
@pytest.mark.parametrize("element", ["fp32", "bf16"])
def test_machine_code(capability, element):
    from bench.aot import compile_resample
    for up in (False, True):
        report = compile_resample(capability, element, up)
        assert report.spills == 0 and report.stack_bytes == 0 and report.fills <= {"0"}
