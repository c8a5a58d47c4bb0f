"The bank: bad batches, mixed and low precision, where prototypes start, how far apart they are, and how a bank is kept."
import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddcl_nb.bank import PrototypeBank, initial_prototypes, merge_prototypes, separation
from ddcl_nb.temperature import critical_temperature


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


# --- where prototypes start

METHODS = ["kmeans", "kmeans++", "farthest", "random", "anneal"]


def clusters(n_clusters=6, each=60, m=3, offset=0.0):
    "Well separated Gaussian clusters on a grid, float32."
    gen = torch.Generator().manual_seed(0)
    centres = 8.0 * torch.cartesian_prod(*[torch.arange(2.0)] * m)[:n_clusters]
    return (centres.repeat(each, 1) + 0.5 * torch.randn(each * n_clusters, m, generator=gen)) + offset


def distortion(tokens, prototypes):
    "Mean squared distance to the nearest prototype, in float64."
    return float(torch.cdist(tokens.double(), prototypes.double()).square().amin(1).mean())


@pytest.mark.parametrize("K", [1, 2, 7])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_places_k_prototypes_the_same_way_for_the_same_seed(method, K):
    z = clusters()
    one, again, other = (initial_prototypes(z, K, method, seed) for seed in (3, 3, 4))
    assert one.shape == (K, 3) and one.dtype == z.dtype and one.isfinite().all()
    assert one.equal(again)
    if method in ("random", "kmeans++"):
        assert not one.equal(other)


@pytest.mark.parametrize("method", METHODS)
def test_methods_leave_the_random_state_of_the_caller_alone(method):
    state = torch.get_rng_state()
    initial_prototypes(clusters(), 4, method, 1)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("method", ["random", "farthest", "kmeans++"])
def test_chosen_tokens_are_tokens_and_distinct(method):
    z = clusters()[:30].repeat(4, 1)
    chosen = initial_prototypes(z, 12, method, 0)
    assert (chosen[:, None] == z).all(-1).any(1).all()
    assert len(chosen.unique(dim=0)) == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_methods_in_other_precisions(method, dtype):
    z = clusters().to(dtype)
    found = initial_prototypes(z, 4, method)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.float(), initial_prototypes(z.float(), 4, method), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_each_distinct_token_can_be_a_prototype_but_no_more(method):
    z = torch.eye(5).repeat(10, 1)
    exact = initial_prototypes(z, 5, method)
    assert distortion(z, exact) < 1e-3
    with pytest.raises(ValueError, match="n_prototypes is 6, but there are only 5 distinct tokens"):
        initial_prototypes(z, 6, method)


@pytest.mark.parametrize("unsuitable", [2.0, "3", None, 0])
def test_a_number_of_prototypes_is_a_positive_integer(unsuitable):
    with pytest.raises(ValueError, match="n_prototypes must be a positive integer"):
        initial_prototypes(clusters(), unsuitable)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="method must be one of .* got 'grid'"):
        initial_prototypes(clusters(), 2, "grid")


@pytest.mark.parametrize("method", ["farthest", "kmeans", "anneal"])
def test_separated_clusters_get_a_prototype_each(method):
    z = clusters()
    nearest = torch.cdist(z[:6], initial_prototypes(z, 6, method, 2)).argmin(1)
    assert len(nearest.unique()) == 6


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_annealing_does_not_depend_on_luck(offset):
    z = clusters(offset=offset)
    found = [distortion(z, initial_prototypes(z, 6, "anneal", seed)) for seed in range(3)]
    assert max(found) <= 1.01 * min(found)
    assert max(found) <= 1.01 * distortion(z, z.unflatten(0, (-1, 6)).mean(0))


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_bank_starts_each_head_among_its_own_tokens_that_count(method, n_heads):
    z = torch.cat([clusters(), clusters().flip(0)], -1).reshape(-1, 6, 6)
    keep = torch.arange(6) < torch.tensor([6, 4, 0]).repeat(len(z) // 3)[:, None]
    bank = PrototypeBank(4, 6, n_heads=n_heads)
    assert bank.init_from(z.masked_fill(~keep[..., None], float("nan")), method, 5, keep) is bank
    expected = [initial_prototypes(piece, 4, method, 5) for piece in z[keep].chunk(n_heads, -1)]
    assert bank.prototypes.data.equal(torch.stack(expected) if n_heads == 2 else expected[0])
    assert bank.calibrated
    exact = torch.stack([critical_temperature(piece) for piece in z[keep].chunk(n_heads, -1)])
    torch.testing.assert_close(bank.critical.reshape(-1).double(), exact, rtol=1e-5, atol=0)


def test_a_failed_start_changes_nothing():
    bank = trained()
    before = bank.prototypes.data.clone(), buffers_of(bank)
    with pytest.raises(ValueError, match="distinct"):
        bank.init_from(torch.ones(20, 6))
    assert bank.prototypes.data.equal(before[0]) and all(v.equal(before[1][n]) for n, v in bank.named_buffers())


# --- separation and merging

@pytest.mark.parametrize("K", [2, 3, 50, 1024, 1025, 1500])
def test_separation_is_that_of_all_pairs(K):
    p = torch.randn(K, 4, generator=torch.Generator().manual_seed(K)) + 100
    pairs, found = torch.nn.functional.pdist(p.double()), separation(p)
    assert float(found.mean) == pytest.approx(float(pairs.mean()), rel=1e-5)
    assert float(found.minimum) == pytest.approx(float(pairs.min()), rel=1e-4)


def test_separation_sees_a_merged_pair_and_each_head():
    p = torch.randn(2, 9, 4)
    p[1, 8] = p[1, 3]
    found = separation(p)
    assert found.minimum[0] > 0 and found.minimum[1] == 0 and found.mean.shape == (2,)
    assert separation(p[:, :1]).mean.equal(torch.zeros(2))


def test_merged_prototypes_follow_the_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    p = centres.repeat(4, 1) + 0.3 * torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    for linkage in ("average", "ward", "single"):
        labels = merge_prototypes(p.requires_grad_(), 3, linkage)
        assert labels.dtype == torch.int64 and labels.shape == (12,)
        assert all(len(labels[c::3].unique()) == 1 for c in range(3)) and len(labels.unique()) == 3


def test_merging_to_as_many_or_to_one():
    p = torch.randn(5, 2)
    assert merge_prototypes(p, 5).equal(torch.arange(5)) and merge_prototypes(p, 1).equal(torch.zeros(5, dtype=torch.int64))
    for unsuitable in (0, 6):
        with pytest.raises(ValueError, match=f"n_clusters must be between 1 and .* 5; got {unsuitable}"):
            merge_prototypes(p, unsuitable)


# --- a bank as a module among others

@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("insist", [False, True])
def test_a_bank_survives_a_state_dict_a_file_and_a_copy(tmp_path, n_heads, insist):
    bank = trained(n_heads=n_heads, tau=0.3)
    if insist:
        bank.set_temperature(0.7)
    save_file(bank.state_dict(), tmp_path / "bank.safetensors")
    loaded = [PrototypeBank(4, 6, n_heads=n_heads) for _ in range(2)]
    loaded[0].load_state_dict(bank.state_dict())
    loaded[1].load_state_dict(load_file(tmp_path / "bank.safetensors"))
    z = torch.randn(9, 6)
    expected = bank.eval()(z)
    for other in (*loaded, copy.deepcopy(bank)):
        for found, wanted in zip(other.eval()(z), expected):
            assert found.equal(wanted)


def test_a_copy_is_independent():
    bank = trained()
    before, twin = buffers_of(bank), copy.deepcopy(bank)
    twin.set_tau(0.5)
    twin.train()(10 * torch.randn(30, 6))
    assert all(value.equal(before[name]) for name, value in bank.named_buffers())


def test_what_other_processes_must_be_sent_is_in_buffers():
    bank, other = trained(n_heads=2), PrototypeBank(4, 6, n_heads=2)
    assert {name for name, _ in bank.named_parameters()} == {"prototypes"}
    assert set(bank.state_dict()) == {"prototypes", *dict(bank.named_buffers())}
    for mine, theirs in zip((*bank.parameters(), *bank.buffers()), (*other.parameters(), *other.buffers())):
        theirs.data.copy_(mine.data)  # what a broadcast does
    assert other.temperature.equal(bank.temperature) and other.calibrated


def test_the_followed_temperature_comes_close_to_that_of_a_stationary_stream():
    gen = torch.Generator().manual_seed(0)
    mix, bank = torch.randn(6, 6, generator=gen), PrototypeBank(4, 6, tau=1.0)
    stream = torch.randn(400, 64, 6, generator=gen) @ mix + 3
    for z in stream:
        bank(z)
    assert float(bank.temperature) == pytest.approx(float(critical_temperature(stream)), rel=0.15)


def test_evaluation_follows_nothing():
    bank = trained().eval()
    before = buffers_of(bank)
    bank(100 * torch.randn(50, 6))
    assert all(value.equal(before[name]) for name, value in bank.named_buffers())


def test_an_uncalibrated_bank_says_so_when_it_is_asked():
    bank = PrototypeBank(4, 6).eval()
    with pytest.warns(UserWarning, match="seen no tokens"):
        bank(torch.randn(3, 6))
    bank.set_temperature(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank(torch.randn(3, 6))


@pytest.mark.parametrize("unsuitable, message", [
    (dict(n_prototypes=0), "n_prototypes must be a positive integer, got 0"), (dict(dim=0), "dim must be a positive integer"),
    (dict(n_heads=0), "n_heads must be a positive integer"), (dict(n_heads=4), "dim must be a multiple of n_heads"),
    (dict(grad="half"), "grad must be one of"), (dict(tau=0.0), "tau must be positive and finite"), (dict(temperature=-1.0), "temperature must be positive"),
    (dict(tau=float("nan")), "tau must be positive and finite"), (dict(n_prototypes=2.0), "n_prototypes must be a positive integer, got 2.0")])
def test_unsuitable_arguments_are_named(unsuitable, message):
    with pytest.raises(ValueError, match=message):
        PrototypeBank(**(dict(n_prototypes=4, dim=6) | unsuitable))


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("masked", [False, True])
def test_one_step_of_following_is_that_of_its_definition(n_heads, offset, masked):
    torch.manual_seed(0)
    start, z = torch.randn(200, 6) + offset, 1.5 * torch.randn(30, 4, 6) + offset + 0.3
    keep = torch.rand(30, 4) > 0.4 if masked else None
    bank = PrototypeBank(4, 6, n_heads=n_heads, momentum=0.1).calibrate(start)
    centre, direction, variance = (b.clone().double() for b in (bank.centre, bank.direction, bank.variance))
    bank.train()(z, keep)
    x = (z if keep is None else z[keep]).double().reshape(-1, n_heads, 6 // n_heads).movedim(1, 0)
    centre = 0.9 * centre + 0.1 * x.mean(1)
    for h in range(n_heads):
        y = x[h] - centre[h]
        along = y @ direction[h]
        turned = 0.9 * variance[h] * direction[h] + 0.1 * (along[:, None] * y).mean(0)
        torch.testing.assert_close(bank.centre[h].double(), centre[h], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(bank.direction[h].double(), turned / turned.norm(), rtol=1e-4, atol=1e-4 if offset else 1e-6)
        torch.testing.assert_close(bank.variance[h].double(), 0.9 * variance[h] + 0.1 * along.square().mean(), rtol=1e-3 if offset else 1e-6, atol=0)
