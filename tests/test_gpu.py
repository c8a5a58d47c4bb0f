"The Triton kernels against the definition: in the interpreter everywhere, and on a GPU where there is one."
import json
import os
import subprocess
import sys

import pytest
import torch

from ddcl_nb.assign import THROUGH, ddcl
from ddcl_nb.kernels import fused

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRET = """
import json, sys, torch
from ddcl_nb import gpu, kernels

worst, calls = 0.0, []
counted = {name: lambda *a, name=name: calls.append(name) or getattr(gpu, name)(*a) for name in ("forward", "backward")}
kernels.PASSES["cpu"] = lambda z, bank: z.dtype == torch.float32, counted["forward"], counted["backward"]
for seed, (H, N, K, m) in enumerate([(1, 40, 70, 5), (2, 33, 20, 17), (1, 70, 3, 16), (1, 5, 1, 2), (1, 0, 4, 3)]):
    torch.manual_seed(seed + int(sys.argv[1]))
    inputs = torch.randn(H, N, m), torch.randn(H, K, m), 0.5 + 5 * torch.rand(H)
    for through in ((True, True), (True, False), (False, False)):
        for which in (range(6), (0, 1)):
            results = []
            for form, dtype in ((kernels._Fused.apply, torch.float32), (kernels.definition, torch.float64)):
                leaves = [x.to(dtype).requires_grad_() for x in inputs]
                out, gen = form(*leaves, through), torch.Generator().manual_seed(seed)
                task = sum((o * torch.randn(o.shape, generator=gen)).sum() for i, o in enumerate(out[:6]) if i in which)
                results.append([*out, *torch.autograd.grad(task, leaves, materialize_grads=True)])
            for one, other in zip(*results):
                assert one.shape == other.shape
                if other.numel(): worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp_min(1)))
print(json.dumps([worst, sorted(set(calls))]))
"""


@pytest.mark.parametrize("seed", [0])
def test_in_the_interpreter_values_and_gradients_are_those_of_the_definition(seed):
    run = subprocess.run([sys.executable, "-c", INTERPRET, str(seed)], env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    worst, calls = json.loads(run.stdout.splitlines()[-1])
    assert worst < 1e-4 and calls == ["backward", "forward"]


def test_tokens_on_cpu_do_not_meet_the_kernels():
    from ddcl_nb import gpu
    assert not gpu.INTERPRETED and not gpu.available(torch.randn(1, 4, 3), torch.randn(1, 2, 3))


def test_without_triton_the_module_is_there_and_says_no():
    code = ("import sys; sys.modules['triton'] = None; import torch; from ddcl_nb import gpu; "
            "assert gpu.triton is None and not gpu.available(torch.randn(1, 4, 3), torch.randn(1, 2, 3)); from ddcl_nb.assign import ddcl; ddcl(torch.randn(4, 3), torch.randn(2, 3), 1.0)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("grad", THROUGH)
@pytest.mark.parametrize("shape", [(3000, 64, 64), (1000, 128, 700), (257, 20, 5000)])
def test_on_a_gpu_values_and_gradients_are_those_of_the_chunked_pass(shape, grad):
    (N, m, K), found = shape, []
    z, p = torch.randn(N, m), torch.randn(K, m)
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        leaves = [x.to(device, dtype).requires_grad_() for x in (z, p)]
        out = ddcl(*leaves, 10.0, grad=grad)
        found.append([*out, *torch.autograd.grad(out.centroids.sum() + out.loss.sum() + out.free_energy.sum(), leaves)])
    for one, other in zip(*found):
        torch.testing.assert_close(one.cpu(), other.to(one.dtype), rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_double_precision_takes_the_chunked_pass():
    z, p, T = torch.randn(1, 50, 4).double(), torch.randn(1, 6, 4).double(), torch.ones(1).double()
    for one, other in zip(fused(*(x.cuda() for x in (z, p, T)), (True, True)), fused(z, p, T, (True, True))):
        torch.testing.assert_close(one.cpu(), other)
