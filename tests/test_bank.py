"The bank in training: what must survive bad batches, mixed precision and low precision."
import pytest
import torch

from ddcl_nb.bank import PrototypeBank, initial_prototypes, separation


def trained(**bank):
    "A bank that has seen a batch, so that it follows its critical temperature."
    bank = PrototypeBank(4, 6, **bank)
    bank(torch.randn(20, 6))
    return bank


def buffers_of(bank):
    return {name: value.clone() for name, value in bank.named_buffers()}


def batch(change):
    z = torch.randn(20, 6)
    return {"nan": z.index_fill(0, torch.tensor(3), float("nan")), "infinite": z.index_fill(0, torch.tensor(3), float("inf")),
            "integer": torch.ones(20, 6, dtype=torch.int64), "wide": torch.randn(20, 8), "odd": torch.randn(20, 7)}[change]


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("change", ["nan", "infinite", "integer", "wide", "odd"])
def test_a_bad_batch_is_named_and_changes_nothing(change, seen, n_heads):
    bank = trained(n_heads=n_heads) if seen else PrototypeBank(4, 6, n_heads=n_heads)
    before = buffers_of(bank)
    with pytest.raises((TypeError, ValueError), match="tokens"):
        bank(batch(change))
    for name, value in bank.named_buffers():
        assert value.equal(before[name]), name


@pytest.mark.parametrize("seen", [False, True])
def test_a_mask_of_the_wrong_shape_is_named(seen):
    bank = trained() if seen else PrototypeBank(4, 6)
    with pytest.raises(ValueError, match=r"mask must have shape \(20,\), got \(19,\)"):
        bank(torch.randn(20, 6), torch.ones(19, dtype=torch.bool))


@pytest.mark.parametrize("n_heads", [1, 2])
def test_training_under_autocast_follows_the_same_temperature(n_heads):
    batches = torch.randn(4, 20, 6)
    plain, cast = (PrototypeBank(4, 6, n_heads=n_heads) for _ in range(2))
    for z in batches:
        plain(z)
        with torch.autocast("cpu", torch.bfloat16):
            cast(z)
    torch.testing.assert_close(cast.critical, plain.critical)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_a_bank_in_half_precision_keeps_its_temperature(scale):
    z = scale * torch.randn(64, 6)
    half, full = PrototypeBank(4, 6, tau=0.01).half(), PrototypeBank(4, 6, tau=0.01)
    half(z.half()), full(z.half().float())
    torch.testing.assert_close(half.temperature.float(), full.temperature, rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_separation_in_every_precision(dtype):
    p = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 8.0]], dtype=dtype)
    found = separation(p)
    assert float(found.minimum) == 5 and float(found.mean) == pytest.approx(6, rel=1e-2)


@pytest.mark.parametrize("tau", [[0.1, 0.2, 0.3], [0.1, 0.2]])
def test_one_temperature_for_each_head_or_an_error_that_says_so(tau):
    bank = PrototypeBank(4, 6, n_heads=2)
    if len(tau) == 2:
        bank.set_tau(torch.tensor(tau))
        torch.testing.assert_close(bank.reduced_temperature, torch.tensor(tau))
        return
    with pytest.raises(ValueError, match="tau must be"):
        bank.set_tau(torch.tensor(tau))


@pytest.mark.parametrize("method", ["farthest", "random", "anneal", "kmeans", "kmeans++"])
def test_initial_prototypes_refuse_nan_tokens(method):
    z = torch.randn(12, 3)
    z[4, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        initial_prototypes(z, 3, method)


@pytest.mark.parametrize("K", [0, -1])
def test_initial_prototypes_refuse_no_prototypes(K):
    with pytest.raises(ValueError, match=f"n_prototypes must be .* got {K}"):
        initial_prototypes(torch.randn(12, 3), K)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e4 + 0.3])
def test_equal_tokens_have_no_critical_temperature(value):
    with pytest.raises(ValueError, match="tokens are all equal"):
        PrototypeBank(2, 3).calibrate(torch.full((1000, 3), value))
