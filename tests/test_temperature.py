"Critical and split temperatures against numpy, the collapse that they predict, and the schedules."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from ddcl_nb.assign import assignments, ddcl
from ddcl_nb.temperature import CURVATURE, SHAPES, Anneal, critical_temperature, largest_variance, split_temperatures


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def cloud(N, m, seed=0, offset=0.0):
    "An anisotropic Gaussian cloud, float64."
    gen = seeded(seed)
    return torch.randn(N, m, generator=gen, dtype=torch.float64) @ torch.randn(m, m, generator=gen, dtype=torch.float64) + offset


def by_numpy(z):
    "Largest eigenvalue of the covariance, by the definition in numpy."
    z = np.atleast_2d(np.asarray(z, dtype=np.float64))
    return np.linalg.eigvalsh(np.atleast_2d(np.cov(z, rowvar=False, ddof=0)))[-1]


# --- the critical temperature

@given(N=st.integers(1, 30), m=st.integers(1, 12), lead=st.sampled_from([(), (1,), (3,), (2, 3)]), seed=st.integers(0, 2**16))
def test_critical_temperature_is_that_of_numpy(N, m, lead, seed):
    z = torch.randn(*lead, N, m, generator=seeded(seed), dtype=torch.float64) * torch.arange(1, m + 1)
    expected = by_numpy(z.reshape(-1, m))
    for grad, factor in (("stop", 2), ("full", 4), ("stop-loss", 2)):
        assert float(critical_temperature(z, grad=grad)) == pytest.approx(factor * expected, rel=1e-10, abs=1e-12)


@given(N=st.integers(1, 12), m=st.integers(1, 20), seed=st.integers(0, 2**16))
def test_weights_mean_repetition(N, m, seed):
    z, times = cloud(N, m, seed), torch.randint(0, 4, (N,), generator=seeded(seed))
    times[0] += 1
    repeated = critical_temperature(z.repeat_interleave(times, 0))
    torch.testing.assert_close(critical_temperature(z, weights=times), repeated, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(critical_temperature(z, weights=times / 7), repeated, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("junk", [0.0, 1e6, float("nan"), float("inf")])
def test_masked_tokens_do_not_count(junk):
    z, keep = cloud(20, 5).reshape(4, 5, 5), torch.arange(5) < torch.tensor([5, 3, 1, 0])[:, None]
    dirty = z.masked_fill(~keep[..., None], junk)
    assert critical_temperature(dirty, mask=keep) == critical_temperature(z[keep])
    assert critical_temperature(dirty, mask=keep.long()) == critical_temperature(z[keep])


def test_weights_and_mask_together():
    z, w, keep = cloud(20, 3), torch.rand(20, generator=seeded(1)), torch.arange(20) % 3 > 0
    assert float(critical_temperature(z, mask=keep, weights=w)) == pytest.approx(float(critical_temperature(z[keep], weights=w[keep])), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("N, m", [(200, 6), (4, 300)])
def test_every_precision_is_computed_in_float64(dtype, N, m):
    z = torch.randn(N, m, generator=seeded(2)).mul(3).to(dtype)
    found = critical_temperature(z)
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(4 * by_numpy(z.double()), rel=1e-10)


@pytest.mark.parametrize("dtype, offset", [(torch.float32, 1e4), (torch.float64, 1e7)])
def test_far_from_the_origin_nothing_is_lost(dtype, offset):
    z = cloud(500, 4).to(dtype) + offset
    assert float(critical_temperature(z)) == pytest.approx(4 * by_numpy((z.double() - offset)), rel=1e-6)


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 2**16))
def test_scaling_the_data_scales_the_temperature_by_its_square(scale, seed):
    z = cloud(30, 4, seed)
    torch.testing.assert_close(critical_temperature(scale * z), scale**2 * critical_temperature(z), rtol=1e-9, atol=0)


@given(scale=st.floats(1e-3, 1e3), tau=st.floats(1e-2, 2), seed=st.integers(0, 2**16))
def test_equal_reduced_temperatures_give_equal_assignments_at_every_scale(scale, tau, seed):
    z, p = cloud(30, 4, seed), cloud(5, 4, seed + 1)
    near, far = (assignments(c * z, c * p, tau * critical_temperature(c * z)) for c in (1.0, scale))
    torch.testing.assert_close(near, far, rtol=1e-7, atol=1e-10)


def test_equal_tokens_have_temperature_zero():
    assert float(critical_temperature(torch.full((9, 3), 2.5))) == pytest.approx(0, abs=1e-12)
    assert float(largest_variance(torch.randn(1, 3))) == 0


def test_no_gradient_flows_through_the_temperature():
    assert not critical_temperature(torch.randn(9, 3, requires_grad=True)).requires_grad


@pytest.mark.parametrize("change, message", [
    (dict(tokens=torch.randn(3)), r"tokens must be \(..., N, m\), got shape \(3,\)"),
    (dict(tokens=torch.full((5, 3), float("nan"))), "tokens hold 15 NaN"),
    (dict(mask=torch.ones(4, dtype=torch.bool)), r"mask must have shape \(5,\), got \(4,\)"),
    (dict(mask=torch.zeros(5, dtype=torch.bool)), "all masked"),
    (dict(weights=torch.ones(5, 1)), r"weights must have shape \(5,\), got \(5, 1\)"),
    (dict(weights=torch.zeros(5)), "weight 0"),
    (dict(weights=torch.tensor([1.0, -1, 1, 1, 1])), "weights must not be negative, got -1"),
    (dict(weights=torch.full((5,), float("nan"))), "weights hold 5 NaN"),
    (dict(grad="half"), "grad must be one of .* got 'half'")])
def test_bad_input_is_named(change, message):
    arguments = dict(tokens=torch.randn(5, 3)) | change
    with pytest.raises(ValueError, match=message):
        critical_temperature(arguments.pop("tokens"), **arguments)


# --- what it predicts

def spread_after_training(z, tau, grad, steps=600, K=4):
    "Gradient descent from the mean and a little noise: final over initial spread of the prototypes."
    noise = 1e-3 * torch.randn(K, z.shape[1], generator=seeded(7), dtype=z.dtype)
    p = (z.mean(0) + noise - noise.mean(0)).requires_grad_()
    T = float(tau * critical_temperature(z, grad=grad))
    for _ in range(steps):
        slope, = torch.autograd.grad(ddcl(z, p, T, grad=grad).loss.sum(), p)
        p.data -= K * slope / (4 * len(z))
    return float((p - p.mean(0)).detach().norm() / (noise - noise.mean(0)).norm())


@pytest.mark.parametrize("grad", ["stop", "full"])
def test_a_bank_collapses_just_above_and_separates_just_below(grad):
    z = cloud(150, 3, seed=4, offset=2.0)
    assert spread_after_training(z, 1.1, grad) < 0.01
    assert spread_after_training(z, 0.9, grad) > 30


# --- schedules

@pytest.mark.parametrize("shape", SHAPES)
@given(start=st.floats(1e-3, 10), end=st.floats(1e-3, 10), steps=st.floats(1, 1e4))
def test_schedules_are_monotone_between_their_ends(shape, start, end, steps):
    anneal = Anneal(start, end, steps, shape)
    values = np.array([anneal(steps * i / 50) for i in range(51)])
    direction = np.sign(end - start)
    assert values[0] == pytest.approx(start) and (np.diff(values) * direction >= -1e-12 * values.max()).all()
    share = 1 - math.exp(-5) if shape == "exponential" else 1
    assert values[-1] == pytest.approx(start + share * (end - start))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_schedule_is_constant_outside_its_steps(shape):
    anneal = Anneal(1.0, 0.1, 10, shape)
    assert anneal(-3) == anneal(0) and anneal(10) == anneal(1000)


@pytest.mark.parametrize("constant", [None, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stretched_schedule_is_the_same_curve(shape, constant):
    anneal = Anneal(1.0, 0.1, 10, shape, constant)
    longer = anneal.over(250)
    assert longer.steps == 250
    assert [longer(25 * i) for i in range(11)] == pytest.approx([anneal(i) for i in range(11)])


def test_the_shapes_of_their_formulas():
    assert Anneal(1.0, 0.01, 2)(1) == pytest.approx(0.1)
    assert Anneal(1.0, 0.5, 4, "linear")(1) == pytest.approx(0.875)
    assert Anneal(1.0, 0.5, 4, "cosine")(1) == pytest.approx(0.75 + 0.25 * math.cos(math.pi / 4))
    assert Anneal(1.0, 0.5, 4, "exponential", time_constant=2)(2) == pytest.approx(0.5 + 0.5 * math.exp(-1))


@pytest.mark.parametrize("name", ["start", "end", "steps", "time_constant"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf")])
def test_a_schedule_needs_positive_numbers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive and finite, got {value}"):
        Anneal(**{name: value})


def test_a_schedule_needs_a_known_shape():
    with pytest.raises(ValueError, match="shape must be one of .* got 'step'"):
        Anneal(shape="step")


# --- split temperatures

@given(N=st.integers(2, 20), m=st.integers(1, 5), K=st.integers(1, 4), seed=st.integers(0, 2**16), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_split_temperatures_are_those_of_the_weighted_covariances(N, m, K, seed, dtype):
    z, p = cloud(N, m, seed).to(dtype), cloud(K, m, seed + 1).to(dtype)
    T = float(critical_temperature(z)) + 0.1
    q = assignments(z.double(), p.double(), T).numpy()
    for grad in ("stop", "full"):
        found = split_temperatures(z, p, T, grad=grad)
        assert found.shape == (K,) and found.dtype == torch.float64
        for k in range(K):
            C = np.atleast_2d(np.cov(z.double().numpy(), rowvar=False, ddof=0, aweights=q[:, k]))
            assert float(found[k]) == pytest.approx(CURVATURE[grad] * np.linalg.eigvalsh(C)[-1], rel=1e-8, abs=1e-10)


def test_separated_clusters_split_at_their_own_temperature_and_unused_prototypes_at_none():
    left, right = cloud(80, 2, 1), 0.1 * cloud(80, 2, 2) + 1e3
    p = torch.stack([left.mean(0), right.mean(0), torch.tensor([-1e3, 1e3], dtype=torch.float64)])
    found = split_temperatures(torch.cat([left, right]), p, 1.0)
    for k, cluster in enumerate((left, right)):
        torch.testing.assert_close(found[k], critical_temperature(cluster, grad="stop"))
    assert found[2] == 0


def test_a_single_prototype_splits_at_the_critical_temperature():
    z = cloud(50, 3)
    torch.testing.assert_close(split_temperatures(z, z.mean(0, keepdim=True), 1.0)[0], critical_temperature(z, grad="stop"))


def test_masked_tokens_do_not_split():
    z, p, keep = cloud(20, 3).reshape(4, 5, 3), cloud(2, 3, 1), torch.arange(5) < torch.tensor([5, 3, 1, 0])[:, None]
    dirty = z.masked_fill(~keep[..., None], float("nan"))
    torch.testing.assert_close(split_temperatures(dirty, p, 2.0, mask=keep), split_temperatures(z[keep], p, 2.0))


@pytest.mark.parametrize("change, message", [(dict(temperature=0.0), "temperature must be positive"), (dict(grad="half"), "grad must be one of"),
                                             (dict(prototypes=torch.randn(2, 4)), "tokens have width 3, prototypes have width 4")])
def test_split_temperatures_name_bad_input(change, message):
    arguments = dict(tokens=torch.randn(9, 3), prototypes=torch.randn(2, 3), temperature=1.0) | change
    with pytest.raises(ValueError, match=message):
        split_temperatures(**arguments)
