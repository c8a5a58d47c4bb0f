"The fused pass against the plain definition, written here a second time, over shapes, precisions, temperatures and masks."
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, strategies as st
from torch.autograd.functional import hvp
from torch.func import grad, hessian, jvp, vmap

from ddcl_nb import assign
from ddcl_nb.assign import BACKENDS, THROUGH, assignments, ddcl, decompose

TERMS = ("centroids", "loss", "recon", "variance", "entropy", "free_energy")
DISTINCT = [b for b in BACKENDS if b != "auto"]


@dataclass
class Case:
    "Random tokens (..., N, m) or (..., H, N, m), a bank (K, m) or (H, K, m), and one temperature a head, in float64."
    z: torch.Tensor
    p: torch.Tensor
    T: torch.Tensor

    def to(self, dtype):
        return Case(self.z.to(dtype), self.p.to(dtype), self.T.to(torch.promote_types(dtype, torch.float32)))

    def double(self):
        return Case(*(x.detach().double() for x in (self.z, self.p, self.T)))


@st.composite
def cases(draw, coldest=-2, hottest=6, widest=9, empty=False):
    lead = draw(st.lists(st.integers(1, 3), max_size=3))
    heads = draw(st.sampled_from([(), (1,), (2,), (3,)]))
    N, K, m = draw(st.integers(0 if empty else 1, 12)), draw(st.integers(1, 9)), draw(st.integers(1, widest))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    exponent = draw(st.floats(coldest, hottest))
    T = 10.0 ** (exponent + 0.3 * torch.rand(heads, generator=gen, dtype=torch.float64))
    return Case(torch.randn(*lead, *heads, N, m, generator=gen, dtype=torch.float64),
                torch.randn(*heads, K, m, generator=gen, dtype=torch.float64), T)


def definition(z, p, T, grad="full"):
    "Eqs. 2-4 of the paper as they stand: all six differentiable outputs, by name."
    T = torch.as_tensor(T, dtype=z.dtype)[..., None, None]
    d = (z.unsqueeze(-2) - p.unsqueeze(-3)).pow(2).sum(-1)
    log_q = (-d / T).log_softmax(-1)
    q_out = log_q.exp().detach() if grad == "stop" else log_q.exp()
    log_q = log_q if grad == "full" else log_q.detach()
    q = log_q.exp()
    mean = q @ p
    V = (q.unsqueeze(-1) * (p.unsqueeze(-3) - mean.unsqueeze(-2)).pow(2)).sum((-1, -2))
    free = -T[..., 0] * (-d / T).logsumexp(-1)
    return dict(zip(TERMS, (q_out @ p, (q * d).sum(-1), (z - mean).pow(2).sum(-1), V, -(q * log_q).sum(-1), free)))


def inputs_of(case):
    return [x.detach().clone().requires_grad_() for x in (case.z, case.p, case.T)]


def gradients(output, inputs):
    "Gradients of a fixed random combination, zero where there is none."
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(output.dtype)
    if not output.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return torch.autograd.grad((output * weights).sum(), inputs, retain_graph=True, materialize_grads=True)


def assert_near(found, exact, tolerance, what="", floor=0.0):
    "Largest difference, relative to the largest exact value (and at least to `floor`)."
    found, exact = found.detach().double(), exact.detach().double()
    assert found.shape == exact.shape and found.isfinite().all(), what
    if exact.numel():
        error, size = (found - exact).abs().max(), max(float(exact.abs().max()), floor)
        assert error <= tolerance * size + 1e-13, f"{what}: off by {error:.1e} where the largest value is {size:.1e}"


def decided(K, m, seed, dtype=torch.float64, spread=0.05):
    "Tokens close to one prototype each: at small temperatures every answer is known to the last digit."
    gen = torch.Generator().manual_seed(seed)
    p = 2 * torch.randn(K, m, generator=gen, dtype=dtype)
    return p.repeat(10, 1) + spread * torch.randn(10 * K, m, generator=gen, dtype=dtype), p


# --- values and gradients

def test_the_default_backend_is_the_fused_one():
    z, p = torch.randn(30, 4), torch.randn(9, 4)
    for one, other in zip(ddcl(z, p, 1.0), ddcl(z, p, 1.0, backend="fused")):
        assert one.equal(other)


@pytest.mark.parametrize("backend", DISTINCT)
@pytest.mark.parametrize("grad", THROUGH)
@given(case=cases())
def test_values_and_gradients_are_those_of_the_definition(backend, grad, case):
    found_in, exact_in = inputs_of(case), inputs_of(case)
    found, exact = ddcl(*found_in, grad=grad, backend=backend), definition(*exact_in, grad)
    for name in TERMS:
        one, other = getattr(found, name), exact[name]
        assert_near(one, other, 1e-9, name)
        for which, a, b in zip("zpT", gradients(one, found_in), gradients(other, exact_in)):
            natural = 1e-13 * (1 + 1 / float(case.T.min()) ** 2) * case.z.numel()
            assert (a - b).abs().max() <= 1e-8 * b.abs().max() + natural, f"d {name} / d {which}"


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2e-5), (torch.bfloat16, 5e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("grad", THROUGH)
@given(case=cases(coldest=0))
def test_lower_precision_is_computed_in_float32(dtype, rounding, grad, case):
    low = case.to(dtype)
    found_in, exact_in = inputs_of(low), inputs_of(low.double())
    found, exact = ddcl(*found_in, grad=grad), definition(*exact_in, grad)
    for name in TERMS:
        assert getattr(found, name).dtype == torch.float32
        assert_near(getattr(found, name), exact[name], 2e-5, name, floor=1.0)
    task = [(o["centroids"].pow(2).sum() + o["loss"].sum()) for o in (found._asdict(), exact)]
    for leaf, a, b in zip(found_in, *(torch.autograd.grad(t, i, materialize_grads=True) for t, i in zip(task, (found_in, exact_in)))):
        assert a.dtype == leaf.dtype
        assert_near(a, b, rounding if leaf is not found_in[2] else 1e-3, floor=0.1)


@pytest.mark.parametrize("grad", THROUGH)
@pytest.mark.parametrize("backend", ["fused", "matmul"])
@given(exponent=st.floats(-6, -1), K=st.integers(1, 12), m=st.sampled_from([8, 64]), seed=st.integers(0, 2**16))
def test_cold_float32_gradients_stay_those_of_hard_assignment(grad, backend, exponent, K, m, seed):
    z, p = decided(K, m, seed, torch.float32)
    case, T = [], 10.0**exponent
    for form, dtype in ((lambda *a: ddcl(*a, grad=grad, backend=backend)._asdict(), torch.float32), (lambda *a: definition(*a, grad), torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in (z, p)]
        out = form(*leaves, T)
        case.append(torch.autograd.grad(out["loss"].sum() + 0.1 * out["centroids"].sum() + out["free_energy"].sum(), leaves))
    for which, found, exact in zip(("tokens", "prototypes"), *case):
        assert_near(found, exact, 1e-3, which)


@given(case=cases(coldest=-6))
def test_every_temperature_gives_finite_numbers_and_loss_is_recon_plus_variance(case):
    leaves = inputs_of(case)
    out = ddcl(*leaves)
    size = out.loss.abs().max()
    assert (out.loss - out.recon - out.variance).abs().max() <= 1e-12 * size
    assert decompose(*case.__dict__.values()).gap <= 1e-12
    for x in (*out[:6], *torch.autograd.grad(sum(t.sum() for t in out[:6]), leaves)):
        assert x.isfinite().all()
    assert (out.variance >= 0).all() and (out.entropy >= 0).all()
    assert (out.entropy <= math.log(case.p.shape[-2]) + 1e-12).all()


@given(case=cases(coldest=-6, empty=True), backend=st.sampled_from(list(BACKENDS)))
def test_shapes_and_indices(case, backend):
    out = ddcl(case.z, case.p, case.T, backend=backend)
    assert out.centroids.shape == case.z.shape and assignments(case.z, case.p, case.T).shape == (*case.z.shape[:-1], case.p.shape[-2])
    assert all(v.shape == case.z.shape[:-1] for v in out[1:])
    nearest = (case.z.unsqueeze(-2) - case.p.unsqueeze(-3)).pow(2).sum(-1).argmin(-1)
    assert out.indices.dtype == torch.int64 and out.indices.equal(nearest)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (3, 2, 0, 4)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_rows_and_zero_gradient(shape, backend):
    p = torch.randn(*([] if len(shape) == 3 else [2]), 6, 4, requires_grad=True)
    z = torch.randn(shape, requires_grad=True)
    out = ddcl(z, p, 1.0, backend=backend)
    assert out.centroids.shape == shape and out.loss.shape == shape[:-1]
    out.loss.sum().backward()
    assert z.grad.shape == shape and p.grad.eq(0).all()


# --- exactness in float32

@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("K", [2, 10, 100])
@pytest.mark.parametrize("T", [0.3, 1.0, 8.0, 100.0])
@pytest.mark.parametrize("placed", ["free", "decided"])
def test_variance_keeps_its_digits_at_offset_ten_thousand(placed, T, K, m):
    gen = torch.Generator().manual_seed(K * m)
    z, p = torch.randn(200, m, generator=gen), torch.randn(K, m, generator=gen)
    z = z if placed == "free" else p[torch.arange(200) % K] + 0.1 * z
    z, p = z + 1e4, p + 1e4
    exact = definition(z.double(), p.double(), T)["variance"]
    enough = exact > 1e-12
    error = ((ddcl(z, p, T).variance - exact).abs() / exact)[enough]
    assert enough.any() or placed == "decided"
    assert not len(error) or error.max() <= 1e-3


@pytest.mark.parametrize("T", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("grad", THROUGH)
def test_gradients_keep_their_digits_at_offset_ten_thousand(grad, T):
    gen = torch.Generator().manual_seed(0)
    z, p = torch.randn(200, 16, generator=gen) + 1e4, torch.randn(10, 16, generator=gen) + 1e4
    found_in, exact_in = [[x.to(d).requires_grad_() for x in (z, p)] for d in (torch.float32, torch.float64)]
    found = torch.autograd.grad(ddcl(*found_in, T, grad=grad).loss.sum(), found_in)
    exact = torch.autograd.grad(definition(*exact_in, T, grad)["loss"].sum(), exact_in)
    for a, b in zip(found, exact):
        assert_near(a, b, 1e-3)


# --- laws

@given(case=cases(coldest=-1, hottest=2), c=st.floats(0.1, 10), shift=st.floats(-100, 100))
def test_scaling_and_translation(case, c, shift):
    plain, moved = ddcl(case.z, case.p, case.T), ddcl(case.z + shift, case.p + shift, case.T)
    scaled = ddcl(c * case.z, c * case.p, c**2 * case.T)
    assert_near(assignments(c * case.z, c * case.p, c**2 * case.T), assignments(case.z, case.p, case.T), 1e-9)
    assert_near(moved.centroids - shift, plain.centroids, 1e-9)
    for name, power in (("loss", 2), ("recon", 2), ("variance", 2), ("free_energy", 2), ("entropy", 0)):
        assert_near(getattr(moved, name), getattr(plain, name), 1e-8, name)
        assert_near(getattr(scaled, name), c**power * getattr(plain, name), 1e-9, name)


@given(case=cases(), seed=st.integers(0, 99))
def test_the_order_of_tokens_and_prototypes_does_not_matter(case, seed):
    gen = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(case.z.shape[-2], generator=gen), torch.randperm(case.p.shape[-2], generator=gen)
    plain, shuffled = ddcl(case.z, case.p, case.T), ddcl(case.z[..., rows, :], case.p[..., columns, :], case.T)
    assert_near(shuffled.centroids, plain.centroids[..., rows, :], 1e-9)
    for name in TERMS[1:]:
        assert_near(getattr(shuffled, name), getattr(plain, name)[..., rows], 1e-9, name)
    assert columns[shuffled.indices].equal(plain.indices[..., rows])


@pytest.mark.parametrize("backend", DISTINCT)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
@given(case=cases(), seed=st.integers(0, 99))
def test_masked_tokens_may_hold_anything(backend, junk, case, seed):
    single = case.p.dim() == 2
    keep = torch.rand(*(case.z.shape[:-1] if single else (*case.z.shape[:-3], case.z.shape[-2])), generator=torch.Generator().manual_seed(seed)) < 0.6
    wide = (keep if single else keep.unsqueeze(-2).expand(case.z.shape[:-1]))
    clean, dirty = inputs_of(case), inputs_of(Case(case.z.masked_fill(~wide[..., None], junk), case.p, case.T))
    expected, found = ddcl(*clean, backend=backend), ddcl(*dirty, mask=keep, backend=backend)
    for name in TERMS:
        one, other = getattr(found, name), getattr(expected, name)
        assert one[~wide].eq(0).all()
        torch.testing.assert_close(one[wide], other[wide])
        for a, b in zip(gradients(one, dirty), gradients(other * (wide if other.dim() == wide.dim() else wide[..., None]), clean)):
            torch.testing.assert_close(a, b)
    assert found.indices[~wide].eq(-1).all() and found.indices[wide].equal(expected.indices[wide])
    assert assignments(dirty[0], case.p, case.T, mask=keep)[~wide].eq(0).all()


def test_integer_masks_mean_the_same_as_boolean_ones():
    z, p, keep = torch.randn(2, 5, 3), torch.randn(4, 3), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    for a, b in zip(ddcl(z, p, 1.0, mask=keep), ddcl(z, p, 1.0, mask=keep.bool())):
        assert a.equal(b)


def test_everything_masked_is_zero_with_zero_gradient():
    z, p = torch.full((2, 3, 4), float("nan")), torch.randn(5, 4, requires_grad=True)
    out = ddcl(z, p, 1.0, mask=torch.zeros(2, 3, dtype=torch.bool))
    (out.loss.sum() + out.centroids.sum()).backward()
    assert all(v.eq(0).all() for v in out[:6]) and p.grad.eq(0).all()


@given(case=cases())
def test_heads_are_separate_banks(case):
    if case.p.dim() == 2:
        return
    together = ddcl(case.z, case.p, case.T)
    for h in range(len(case.p)):
        alone = ddcl(case.z[..., h, :, :], case.p[h], case.T[h])
        assert_near(together.centroids[..., h, :, :], alone.centroids, 1e-12)
        assert_near(together.loss[..., h, :], alone.loss, 1e-12)


@pytest.mark.parametrize("grad", THROUGH)
def test_where_chunks_end_does_not_matter(monkeypatch, grad):
    gen = torch.Generator().manual_seed(0)
    case = Case(torch.randn(2, 700, 6, generator=gen).double(), torch.randn(5, 6, generator=gen).double(), torch.tensor(2.0).double())

    def everything():
        leaves = inputs_of(case)
        out = ddcl(*leaves, grad=grad)
        return [*out[:6], *gradients(out.centroids, leaves), *gradients(out.loss, leaves)]

    whole = everything()
    monkeypatch.setitem(assign.ELEMENTS_PER_CHUNK, "cpu", 1)
    assert len(list(assign._chunks(1400, 5, 6, torch.device("cpu")))) == 6
    for a, b in zip(everything(), whole):
        assert_near(a, b, 1e-12)


# --- autograd

@pytest.mark.parametrize("term", TERMS)
def test_second_derivatives_are_those_of_the_definition(term):
    gen = torch.Generator().manual_seed(1)
    inputs = (torch.randn(6, 3, generator=gen).double(), torch.randn(4, 3, generator=gen).double(), torch.tensor(1.3).double())
    directions = tuple(torch.randn(x.shape, generator=gen).double() for x in inputs)
    found = hvp(lambda *a: getattr(ddcl(*a), term).sin().sum(), inputs, directions)[1]
    for a, b in zip(found, hvp(lambda *a: definition(*a)[term].sin().sum(), inputs, directions)[1]):
        assert_near(a, b, 1e-8)


def test_gradcheck_and_gradgradcheck():
    gen = torch.Generator().manual_seed(2)
    inputs = [torch.randn(s, generator=gen).double().requires_grad_() for s in ((2, 3, 2), (2, 3, 2))] + [torch.tensor([0.7, 2.0]).double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda *a: ddcl(*a)[:6], inputs)
    assert torch.autograd.gradgradcheck(lambda *a: ddcl(*a)[:6], inputs)


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("grad", ["full", "stop-loss"])
def test_a_gradient_can_be_asked_of_one_input_alone(wanted, grad):
    gen = torch.Generator().manual_seed(4)
    case = Case(torch.randn(7, 3, generator=gen).double(), torch.randn(4, 3, generator=gen).double(), torch.tensor(1.0).double())
    alone, together = [x.clone() for x in (case.z, case.p, case.T)], inputs_of(case)
    alone[wanted].requires_grad_()
    ones = [sum(v.sum() for v in ddcl(*leaves, grad=grad)[:6]) for leaves in (alone, together)]
    assert_near(torch.autograd.grad(ones[0], alone[wanted])[0], torch.autograd.grad(ones[1], together)[wanted], 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs(backend):
    gen = torch.Generator().manual_seed(5)
    z, p = torch.randn(4, 9, 3, generator=gen).double(), torch.randn(3, 5, generator=gen).double()
    views = {"transposed": z.mT.contiguous().mT, "strided": torch.stack([z, z], -1)[..., 0], "expanded": z[:1].expand(4, -1, -1)}
    for name, view in views.items():
        view, copy = view.requires_grad_(), view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        one, other = ddcl(view, p.mT, 2.0, backend=backend), ddcl(copy, p.mT.contiguous(), 2.0, backend=backend)
        assert_near(one.loss, other.loss, 1e-12, name)
        assert_near(gradients(one.loss, [view])[0], gradients(other.loss, [copy])[0], 1e-12, name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(mode):
    z, p = torch.randn(6, 3), torch.randn(4, 3, requires_grad=True)
    with mode():
        quiet = ddcl(z, p, 1.0)
    assert not quiet.loss.requires_grad
    for a, b in zip(quiet, ddcl(z, p, 1.0)):
        assert a.equal(b.detach())


def test_autocast_does_not_touch_precision():
    z, p = (torch.randn(6, 3) + 50).requires_grad_(), torch.randn(4, 3) + 50
    plain = ddcl(z, p, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        cast, q = ddcl(z, p, 1.0), assignments(z, p, 1.0)
        grads = torch.autograd.grad(cast.loss.sum(), z)[0]
    assert cast.loss.equal(plain.loss) and q.dtype == torch.float32
    assert grads.equal(torch.autograd.grad(plain.loss.sum(), z)[0])


# --- bad input

def good():
    return torch.randn(2, 5, 3), torch.randn(4, 3), 1.0


@pytest.mark.parametrize("change, error, message", [
    (dict(tokens=torch.ones(2, 5, 3, dtype=torch.int64)), TypeError, "tokens must be floating point, got torch.int64"),
    (dict(tokens=[[1.0]]), TypeError, "tokens must be a torch.Tensor, got list"),
    (dict(tokens=torch.randn(3)), ValueError, "tokens must be"),
    (dict(tokens=torch.randn(2, 5, 7)), ValueError, "tokens have width 7, prototypes have width 3"),
    (dict(tokens=torch.randn(2, 5, 3).double()), TypeError, "tokens are torch.float64, prototypes torch.float32"),
    (dict(tokens=torch.randn(5, 3), prototypes=torch.randn(2, 4, 3)), ValueError, r"tokens must be \(..., H, N, m\)"),
    (dict(prototypes=torch.randn(2, 4, 3), tokens=torch.randn(3, 5, 3)), ValueError, "tokens have 3 heads .* prototypes have 2"),
    (dict(prototypes=torch.randn(0, 3)), ValueError, r"K >= 1, got \(0, 3\)"),
    (dict(prototypes=torch.randn(3)), ValueError, "prototypes must be"),
    (dict(prototypes=torch.full((4, 3), float("nan"))), ValueError, "prototypes hold 12 NaN"),
    (dict(temperature=0.0), ValueError, "temperature must be positive and finite, got 0"),
    (dict(temperature=-1.0), ValueError, "temperature must be positive and finite, got -1"),
    (dict(temperature=float("inf")), ValueError, "temperature must be positive and finite, got inf"),
    (dict(temperature=float("nan")), ValueError, "temperature must be positive and finite, got nan"),
    (dict(temperature=1e-50), ValueError, "temperature"),
    (dict(temperature=torch.ones(3)), ValueError, "temperature must be a number or one per head"),
    (dict(temperature=[1.0, 2.0]), (TypeError, ValueError), "temperature must be"),
    (dict(temperature="1"), (TypeError, ValueError), "temperature must be"),
    (dict(mask=torch.ones(2, 4)), ValueError, r"mask must have shape \(2, 5\), got \(2, 4\)"),
    (dict(mask=[True] * 5), TypeError, "mask must be"),
    (dict(grad="half"), ValueError, "grad must be one of .* got 'half'"),
    (dict(backend="fast"), ValueError, "backend must be one of .* got 'fast'"),
])
def test_bad_input_is_named(change, error, message):
    arguments = dict(zip(("tokens", "prototypes", "temperature"), good())) | change
    with pytest.raises(error, match=message):
        ddcl(arguments.pop("tokens"), arguments.pop("prototypes"), arguments.pop("temperature"), **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_is_found_where_it_is(value):
    z, p, T = good()
    z[1, 3, 2] = value
    with pytest.raises(ValueError, match=r"tokens hold 1 NaN or infinite values, the first at \(1, 3, 2\)"):
        ddcl(z, p, T)


def test_large_but_finite_tokens_are_not_called_infinite():
    z = torch.full((4, 3), 3e38)
    assert ddcl(z.double(), torch.zeros(2, 3).double(), 1.0).loss.isfinite().all()


@pytest.mark.parametrize("weights, message", [(torch.full((4, 2), float("nan")), "simplex"), (torch.full((4, 2), 2.0), "simplex"),
                                              (torch.tensor([[1.5, -0.5]] * 4), "simplex"), (torch.full((4, 5), 0.2), "weights")])
@pytest.mark.parametrize("mask", [None, torch.ones(4, dtype=torch.bool)])
def test_weights_off_the_simplex_are_refused(weights, message, mask):
    with pytest.raises(ValueError, match=message):
        decompose(torch.randn(4, 3), torch.randn(2, 3), weights=weights, mask=mask)


def test_decompose_wants_exactly_one_of_temperature_and_weights():
    for both in (dict(), dict(temperature=1.0, weights=torch.full((4, 2), 0.5))):
        with pytest.raises(ValueError, match="either temperature or weights"):
            decompose(torch.randn(4, 3), torch.randn(2, 3), **both)


@given(case=cases(), seed=st.integers(0, 99))
def test_the_identity_holds_for_any_weights(case, seed):
    gen = torch.Generator().manual_seed(seed)
    weights = torch.rand(*case.z.shape[:-1], case.p.shape[-2], generator=gen, dtype=torch.float64) + 1e-3
    terms = decompose(case.z, case.p, weights=weights / weights.sum(-1, keepdim=True))
    assert terms.gap <= 1e-12 and (terms.variance >= 0).all()


def test_transforms_of_torch_func_see_the_definition():
    z, p = torch.randn(3, 6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    total = lambda backend: lambda p, z: sum(x.sum() for x in ddcl(z, p, 2.0, backend=backend)[:6])
    ours, reference = total("auto"), total("reference")
    inputs = p.clone().requires_grad_(), z
    by_sample = vmap(grad(ours), (None, 0))(p, z)
    torch.testing.assert_close(by_sample, torch.stack([grad(reference)(p, x) for x in z]))
    torch.testing.assert_close(by_sample.sum(0), torch.autograd.grad(ours(*inputs), inputs[0])[0])
    torch.testing.assert_close(hessian(ours)(p, z), hessian(reference)(p, z))
    torch.testing.assert_close(jvp(lambda p: ours(p, z), (p,), (p,))[1], (grad(reference)(p, z) * p).sum())
