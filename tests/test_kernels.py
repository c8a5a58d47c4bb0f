"What the fused pass promises beyond its numbers: no N x K array, any bank size, no graph break, nothing done for gradients that are absent."
import os
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ddcl_nb import kernels
from ddcl_nb.assign import THROUGH, ddcl
from ddcl_nb.kernels import Gradients, definition, finish, fused, merge, moments
from ddcl_nb.topk import Cells, ddcl_topk


def numbers(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def everything(form, through, inputs, which=range(6)):
    "Outputs, and gradients of a random combination of those named in `which`."
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = form(*inputs, through)
    task = sum((outputs[i] * numbers(*outputs[i].shape, seed=i)).sum() for i in which)
    return [*outputs[:6], *torch.autograd.grad(task, inputs, materialize_grads=True)], outputs[6]


# --- banks of any size

@pytest.mark.parametrize("tile, elements", [(1024, 1), (64, 2**21), (64, 1000), (128, 2**21)])
@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
@pytest.mark.parametrize("K", [1, 5, 64, 65, 200, 600])
def test_tiles_and_chunks_do_not_matter(monkeypatch, tile, elements, through, K):
    monkeypatch.setitem(kernels.PROTOTYPES_PER_TILE, "cpu", tile)
    monkeypatch.setitem(kernels.ELEMENTS_PER_CHUNK, "cpu", elements)
    inputs = numbers(2, 70, 3, seed=1), numbers(2, K, 3, seed=2), torch.tensor([0.3, 20.0]).double()
    (found, index), (exact, nearest) = everything(fused, through, inputs), everything(definition, through, inputs)
    for one, other in zip(found, exact):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    assert index.equal(nearest)


@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
@pytest.mark.parametrize("K", [2, 130, 320])
def test_banks_up_to_the_width_of_the_tokens(through, K):
    inputs = numbers(1, 90, 320, seed=1), numbers(1, K, 320, seed=2), torch.tensor([40.0]).double()
    assert kernels.is_small(inputs[1]) and not kernels.is_small(numbers(1, 321, 320))
    (found, index), (exact, nearest) = everything(fused, through, inputs), everything(definition, through, inputs)
    for one, other in zip(found, exact):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    assert index.equal(nearest)


@pytest.fixture
def three_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("K", [9, 600])
def test_cores_share_chunks_and_do_not_matter(three_cores, monkeypatch, K):
    monkeypatch.setitem(kernels.ELEMENTS_PER_CHUNK, "cpu", 2**14)
    inputs, through = (numbers(2, 2000, 12, seed=1), numbers(2, K, 12, seed=2), torch.tensor([0.5, 20.0]).double()), (True, True)
    (found, index), (again, _), (exact, nearest) = everything(fused, through, inputs), everything(fused, through, inputs), everything(definition, through, inputs)
    for one, same, other in zip(found, again, exact):
        assert one.equal(same)
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)
    assert index.equal(nearest) and torch.get_num_threads() == 3 and 3 in kernels._POOLS
    with torch.inference_mode():
        assert fused(*inputs, through)[1].equal(found[1])


def test_work_on_cores_keeps_its_order_and_its_errors(three_cores):
    chunks, cpu = kernels.even_chunks(5000, 400, torch.device("cpu")), torch.device("cpu")
    names = kernels.on_cores(lambda share: (threading.current_thread().name, kernels.cores(cpu), torch.is_grad_enabled(), [c.start for c in share]), chunks, cpu)
    assert len(chunks) % 3 == 0 and [own for *_, own in names] == [[c.start for c in chunks[i::3]] for i in range(3)]
    assert all(name.startswith("ddcl-core") and n == 1 and not grad for name, n, grad, _ in names)
    with pytest.raises(ZeroDivisionError):
        kernels.on_cores(lambda share: 1 / 0, chunks, cpu)
    with Watch() as seen:  # whoever watches this thread's operations sees all of them
        ddcl(numbers(3000, 4), numbers(300, 4), 1.0)
    assert "aten::exp2_" in seen.names


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists threads like this")
def test_waiting_workers_of_openmp_are_let_go(three_cores):
    if kernels._openmp().__name__ != "omp_pause_resource_all":
        pytest.skip("PyTorch uses another library for its threads here")
    working, numbered = lambda: len(os.listdir("/proc/self/task")), torch.ones(2**18)
    numbered.add_(1)
    with_workers = working()
    kernels._release()
    end = time.monotonic() + 5
    while working() >= with_workers and time.monotonic() < end:
        time.sleep(0.01)
    assert working() < with_workers
    assert numbered.add_(1).eq(3).all() and working() == with_workers


@given(N=st.integers(0, 10_000), rows=st.integers(1, 5000))
def test_even_chunks_cover_every_row_once(N, rows):
    chunks = kernels.even_chunks(N, rows, torch.device("cpu"))
    sizes = [c.stop - c.start for c in chunks]
    assert [chunks[0].start, *(c.stop for c in chunks)] == [*(c.start for c in chunks), N] and max(sizes) <= rows and max(sizes) - min(sizes) <= 1


@given(cuts=st.lists(st.integers(1, 99), max_size=4, unique=True), order=st.randoms(), T=st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_moments_of_slices_merge_in_any_order(cuts, order, T):
    x, p = numbers(20, 4, seed=3), numbers(100, 4, seed=4)
    p[57] = p[3]
    edges = [0, *sorted(cuts), 100]
    parts = [moments(x, p[a:b], T, start=a) for a, b in zip(edges, edges[1:])]
    order.shuffle(parts)
    total = parts[0]
    for part in parts[1:]:
        total = merge(total, part)
    whole = moments(x, p, T)
    assert total.index.equal(whole.index)
    for one, other in zip(finish(x, total, torch.tensor(T).double(), 100), finish(x, whole, torch.tensor(T).double(), 100)):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("K", [2, 64, 300, 512, 513, 1000, 1100])
def test_of_several_nearest_prototypes_the_first_counts(K):
    p = numbers(K, 3, dtype=torch.float32)
    p[K // 2] = p[0]
    p[-1] = p[0]
    assert ddcl(p[:1].repeat(40, 1), p, 1.0).indices.eq(0).all()


# --- nothing of size N x K, nothing that nobody asked for

class Watch(TorchDispatchMode):
    "Names of all operations, and the largest storage that one of them returned, in bytes."

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function._schema.name)
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
def test_no_array_has_one_number_per_token_and_prototype(monkeypatch, through):
    monkeypatch.setitem(kernels.ELEMENTS_PER_CHUNK, "cpu", 2**17)
    inputs = numbers(1, 2000, 4, dtype=torch.float32), numbers(1, 5000, 4, dtype=torch.float32), torch.tensor([3.0])
    with Watch() as seen:
        everything(fused, through, inputs)
    assert seen.largest <= 8 * 64 * 1100 * 2 < 4 * 2000 * 5000 / 20


def products(inputs, which, grad):
    "How many matrix products one backward pass makes."
    out = ddcl(*inputs, grad=grad)
    with Watch() as seen:
        torch.autograd.grad(sum(out[i].sum() for i in which), [x for x in inputs[:2] if x.requires_grad], allow_unused=True)
    return sum(name.split("::")[1] in ("mm", "addmm_", "addmm") for name in seen.names)


@pytest.mark.parametrize("of, which, grad, expected", [
    ("zp", (0, 1), "full", 3),  # logits and wishes in one, to the bank in one, to the tokens
    ("p", (0, 1), "full", 2),
    ("zp", (0, 1), "stop", 2),
    ("zp", (5,), "full", 2),
])
def test_a_backward_pass_has_no_more_products_than_it_needs(of, which, grad, expected):
    z, p = (numbers(50, 4, dtype=torch.float32).requires_grad_(name in of) for name in "zp")  # K > m: not the form of small banks
    assert products((z, p, 2.0), which, grad) == expected


@pytest.mark.parametrize("K", [3, 9])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (3,), (4,), (5,), (0, 1), (2, 5)])
@pytest.mark.parametrize("through", THROUGH.values(), ids=THROUGH)
def test_absent_gradients_are_zeros(which, through, K):
    inputs = numbers(1, 30, 3, seed=5), numbers(1, K, 3, seed=6), torch.tensor([1.5]).double()
    if which == (4,) and not through[1]:
        assert not definition(*(x.clone().requires_grad_() for x in inputs), through)[4].requires_grad
        return
    for one, other in zip(everything(fused, through, inputs, which)[0], everything(definition, through, inputs, which)[0]):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


# --- compiled and exported

class Model(torch.nn.Module):
    def __init__(self, grad="full", n_heads=None, K=5):
        super().__init__()
        self.encode, self.grad = torch.nn.Linear(6, 6), grad
        self.bank = torch.nn.Parameter(torch.randn(*([] if n_heads is None else [n_heads]), K, 6))

    def forward(self, x, mask=None):
        out = ddcl(self.encode(x), self.bank, 2.0, grad=self.grad, mask=mask)
        return out.centroids.square().sum() + out.loss.sum() + out.entropy.sum(), out.indices


@pytest.mark.parametrize("grad, heads, K", [("full", None, 5), ("stop", None, 9), ("stop-loss", 3, 9)])
def test_a_compiled_model_has_no_graph_break_and_the_same_numbers(grad, heads, K):
    torch.manual_seed(0)
    torch.compiler.reset()
    model, x, mask = Model(grad, heads, K), torch.randn(2, 3, 20, 6), torch.rand(2, 20) < 0.7
    mask = mask if heads else mask[:, None].expand(2, 3, 20)
    found = []
    for form in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        value, index = form(x, mask)
        value.backward()
        found.append([value.detach(), index, *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def test_an_exported_program_needs_no_operator_of_this_package():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 20, 6)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("B"), 1: torch.export.Dim("N")},))
    assert "ddcl_nb" not in str(program.graph) + "".join(str(getattr(m, "graph", "")) for m in program.graph_module.modules())
    for shape in ((3, 20, 6), (2, 33, 6)):
        x = torch.randn(*shape)
        for one, other in zip(program.module()(x), model(x)):
            torch.testing.assert_close(one, other)


# --- a look at few cells

@given(probes=st.sampled_from([1, 2, 5, 12]), T=st.floats(0.02, 20), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_what_few_cells_miss_is_bounded(probes, T, seed):
    p = 3 * numbers(12, 4, seed=seed).repeat_interleave(20, 0) + numbers(240, 4, seed=seed + 1)
    z = numbers(2, 40, 4, seed=seed + 2) * 3
    cells = Cells(p, 12, seed=seed)
    found, exact = ddcl_topk(z, p, T, cells=cells, probes=probes), ddcl(z, p, T)
    assert ((found.output.centroids - exact.centroids).norm(dim=-1) <= found.centroid_error + 1e-9).all()
    assert found.output.indices[found.exact].equal(exact.indices[found.exact])
    assert ((found.neglected >= 0) & (found.neglected <= 1)).all()
    if probes == 12:
        for one, other in zip(found.output, exact):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_the_neglected_share_is_an_upper_bound():
    p, z = 2 * numbers(300, 3, seed=7), numbers(60, 3, seed=8)
    cells = Cells(p, 30)
    found = ddcl_topk(z, p, 0.5, cells=cells, probes=3)
    exact, kept = ddcl(z, p, 0.5), found.output
    share = 1 - torch.exp((exact.free_energy - kept.free_energy) / 0.5)  # Z of the probed cells over Z of all
    assert (share > 1e-6).any() and (share <= found.neglected + 1e-9).all()


def test_topk_with_a_mask_and_bad_arguments():
    p, z = numbers(50, 3, dtype=torch.float32), numbers(2, 6, 3, dtype=torch.float32)
    keep = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    z[0, 4:] = float("nan")
    found = ddcl_topk(z, p, 1.0, probes=7, mask=keep)
    assert found.output.indices[~keep].eq(-1).all() and found.output.loss[~keep].eq(0).all()
    torch.testing.assert_close(found.output.centroids[keep], ddcl(z, p, 1.0, mask=keep).centroids[keep])
    for arguments, message in ((dict(probes=0), "probes must be from 1 to the number of cells 7, got 0"), (dict(cells=Cells(p[:9])), "cells were built for a bank")):
        with pytest.raises(ValueError, match=message):
            ddcl_topk(numbers(4, 3, dtype=torch.float32), p, 1.0, **arguments)
    with pytest.raises(ValueError, match="n_cells must be from 1 to the number of prototypes 50, got 51"):
        Cells(p, 51)
    with pytest.raises(ValueError, match="one head"):
        ddcl_topk(numbers(2, 4, 3), numbers(2, 5, 3), 1.0)


def test_gradients_is_cut_by_rows():
    g = Gradients(numbers(8, 2), numbers(8), None, None, None, None).part(slice(2, 5))
    assert g.centroids.shape == (3, 2) and g.loss.shape == (3,) and g.recon is None
