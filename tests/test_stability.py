"The report against dense matrices and against reality, and what a watch sees and says."
import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from ddcl_nb.bank import PrototypeBank, separation
from ddcl_nb.curvature import Curvature, coupling, largest_rates, limits, schur_product, spectrum
from ddcl_nb.layers import DDCLAttention, DDCLReadout, PrototypeFFN
from ddcl_nb.stability import StabilityWarning, stability_report, watch
from ddcl_nb.training import Anchored, anchor_settings, bank_loss, banks, fit, param_groups

TOKENS = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor([3.0, 2, 1.5, 1, 0.5], dtype=torch.float64)


class Coder(nn.Module):
    "A nonlinear encoder into a bank; anchored by a fixed decoder where asked."

    def __init__(self, grad="full", n_heads=1, tau=0.15, **bank):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.bank = PrototypeBank(3, 4, n_heads=n_heads, tau=tau, grad=grad, backend="reference", **bank)
        self.register_buffer("decode", torch.randn(4, 5))

    def forward(self, x):
        return self.bank(self.encode(x))


def coder(seed=0, **settings):
    torch.manual_seed(seed)
    model = Coder(**settings).double()
    model.bank.init_from(model.encode(TOKENS).detach(), "random", seed)
    return model


def anchored(model, x):
    return bank_loss(model, x) + (model.encode(x) @ model.decode - x).square().mean()


def potential(model, x):
    "What a bank that holds its assignments fixed follows, with the anchor."
    return model(x).free_energy.sum() / len(x) + (model.encode(x) @ model.decode - x).square().mean()


def dense(model, loss, x):
    "Hessian over prototypes first, then all others; and how many are prototypes."
    named = {name: p.detach() for name, p in model.named_parameters()}
    order = sorted(named, key=lambda name: name != "bank.prototypes")
    shapes, sizes = [named[n].shape for n in order], [named[n].numel() for n in order]

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.eval()

        def forward(self, x):
            return loss(self.model, x)

    def at(vector):
        values = {f"model.{n}": piece.view(shape) for n, piece, shape in zip(order, vector.split(sizes), shapes)}
        return functional_call(Loss(), values, (x,))
    return torch.autograd.functional.hessian(at, torch.cat([named[n].flatten() for n in order])), named["bank.prototypes"].numel()


@pytest.mark.parametrize("n_heads", [1, 2])
@pytest.mark.parametrize("grad, loss", [("full", anchored), ("stop", potential), ("stop-loss", potential)])
def test_a_report_agrees_with_dense_matrices(grad, loss, n_heads):
    model = coder(grad=grad, n_heads=n_heads)
    report = stability_report(model, anchored, TOKENS, ratio=7)
    H, n = dense(model, loss, TOKENS)
    size = float(torch.linalg.eigvalsh(H).abs().max())
    near = dict(rtol=1e-3, atol=1e-6 * size)
    np.testing.assert_allclose(report.kappa, torch.linalg.eigvalsh(H[:n, :n])[0], **near)
    np.testing.assert_allclose(report.H_TT[:2], torch.linalg.eigvalsh(H[n:, n:])[[0, -1]], **near)
    np.testing.assert_allclose(report.H[:2], torch.linalg.eigvalsh(H)[[0, -1]], **near)
    np.testing.assert_allclose(report.coupling, torch.linalg.matrix_norm(H[n:, :n], 2), **near)
    root = torch.cat([torch.full((n,), 7.0), torch.ones(len(H) - n)]).double().sqrt()
    sharp = float(torch.linalg.eigvalsh(root[:, None] * H * root)[-1])
    for name, limit in (("gradient descent", 2), ("momentum", 3.8)):
        np.testing.assert_allclose(report.rates[name], [7 * limit / sharp, limit / sharp], rtol=1e-3)
    if report.schur:
        effective = torch.linalg.eigvalsh(H[n:, n:] - H[n:, :n] @ torch.linalg.solve(H[:n, :n], H[:n, n:]))
        np.testing.assert_allclose(report.schur[:2], effective[[0, -1]], rtol=1e-3, atol=1e-4 * size)


@pytest.mark.parametrize("size", [5, 60, 300])
@pytest.mark.parametrize("low, high", [(0.01, 10), (-4, 10), (-10, 4), (-10, -1), (0, 7)])
def test_the_ends_of_a_spectrum(size, low, high):
    rng = np.random.default_rng(size)
    basis, values = np.linalg.qr(rng.standard_normal((size, size)))[0], np.linspace(low, high, size)
    found = spectrum(lambda v: basis @ (values * (basis.T @ v)), size)
    np.testing.assert_allclose(found[:2], [low, high], rtol=1e-3, atol=1e-4)
    assert found.flat == (low == 0)


def settled(loss=anchored, **settings):
    model = coder(**settings).eval()
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=3000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe", history_size=60)

    def closure():
        optimiser.zero_grad()
        value = loss(model, TOKENS)
        value.backward()
        return value
    optimiser.step(closure)
    return model


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_just_inside_the_bound_training_settles_and_ten_percent_outside_it_leaves(momentum):
    model = settled()
    bound = stability_report(model, anchored, TOKENS, momentum=momentum).rates["momentum"]
    assert not momentum or bound.eta_P > stability_report(model, anchored, TOKENS).rates["gradient descent"].eta_P
    for factor in (0.98, 1.1):
        trial = copy.deepcopy(model)
        groups = [{**g, "lr": factor * (bound.eta_P if g["name"] == "prototypes" else bound.eta_theta)} for g in param_groups(trial)]
        optimiser = torch.optim.SGD(groups, momentum=momentum)
        report = stability_report(trial, anchored, TOKENS, optimiser=optimiser)
        assert report.speed == pytest.approx(factor, rel=1e-3) and (report.status == "too fast") == (factor > 1)
        for p in trial.parameters():
            p.data += 1e-6 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(0))
        norms = []
        for _ in range(250):
            optimiser.zero_grad()
            anchored(trial, TOKENS).backward()
            optimiser.step()
            norms.append(float(torch.cat([p.grad.flatten() for p in trial.parameters()]).norm()))
        assert norms[-1] < norms[0] if factor < 1 else max(norms) > 100 * norms[0]


def test_adam_is_judged_by_its_own_second_moments():
    model = coder()
    optimiser = torch.optim.Adam(param_groups(model, lr=1e-3))
    for _ in range(5):
        optimiser.zero_grad()
        anchored(model, TOKENS).backward()
        optimiser.step()
    report = stability_report(model, anchored, TOKENS, optimiser=optimiser)
    H, n = dense(model, anchored, TOKENS)
    order = [model.bank.prototypes, *(p for p in model.encode.parameters())]
    moments = torch.cat([(optimiser.state[p]["exp_avg_sq"] / (1 - 0.999**5)).flatten() for p in order])
    root = (torch.cat([torch.full((n,), 1e-2), torch.full((len(H) - n,), 1e-3)]).double() / (moments.sqrt() + 1e-8)).sqrt()
    assert report.speed == pytest.approx(float(torch.linalg.eigvalsh(root[:, None] * H * root)[-1]) / 38, rel=1e-3)


@pytest.mark.parametrize("make, status", [
    (lambda: coder(tau=1.3), "collapse"),
    (lambda: settled(), ("stable", "flat")),
    (lambda: coder(grad="stop"), "shrinking")])
def test_the_verdict_names_what_is_wrong(make, status):
    report = stability_report(make(), bank_loss if status == "shrinking" else anchored, TOKENS)
    assert report.status in status and report.verdict and (report.change or report.status in ("stable", "flat"))
    assert report.status in str(report) and "kappa" in str(report)


def test_a_collapsed_bank_below_the_critical_temperature_is_a_saddle():
    bank = PrototypeBank(4, 5, tau=0.5, grad="stop").double()
    bank.init_from(TOKENS)
    bank.prototypes.data[:] = TOKENS.mean(0)
    report = stability_report(bank, bank_loss, TOKENS)
    assert report.status == "saddle" and report.H_TT is None and math.isnan(report.schur_margin) and "coincide" in report.verdict
    exact = 2 / 4 * (1 - 2)  # second variation of F_T: (2 / K)(1 - T_c / T) along the leading axis
    assert report.kappa == pytest.approx(exact, rel=1e-3)


def test_an_unused_prototype_is_a_flat_direction():
    bank = PrototypeBank(4, 5, temperature=1e-2).double()
    bank.init_from(TOKENS)
    bank.prototypes.data[0] = 1e3
    bank.prototypes.data[1:] = torch.stack([TOKENS[bank(TOKENS).indices == k].mean(0) for k in (1, 2, 3)])
    for _ in range(50):
        q = torch.softmax(-torch.cdist(TOKENS, bank.prototypes.data).square() / 1e-2, -1)
        bank.prototypes.data[1:] = (q.T @ TOKENS / q.sum(0)[:, None])[1:]
    report = stability_report(bank, bank_loss, TOKENS)
    assert report.banks[0].unused == 1 and report.H_PP.flat and report.status == "flat" and "nearest to no token" in report.verdict


@pytest.mark.parametrize("batch", [TOKENS[:1], TOKENS[:1].expand(7, 5)])
def test_a_batch_without_spread_is_named_and_not_crashed_on(batch):
    report = stability_report(coder(), anchored, batch)
    assert any("no critical temperature" in note for note in report.notes) and math.isinf(report.banks[0].tau)
    json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.parametrize("make", [
    lambda: DDCLAttention(5, 4, n_heads=1), lambda: DDCLAttention(5, 4, proto_dim=6, n_heads=3, grad="stop"), lambda: DDCLReadout(5, 4, proto_dim=6, pool="residual"),
    lambda: PrototypeFFN(5, 6), lambda: nn.Sequential(nn.TransformerEncoderLayer(5, 1, 8, dropout=0.5, batch_first=True), DDCLAttention(5, 3))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_of_all_kinds_are_reported_and_left_as_they_were(make, dtype):
    torch.manual_seed(0)
    model = make().to(dtype)
    x = torch.randn(6, 9, 5, dtype=dtype)
    loss = lambda m, x: (out := m(x)).loss + out.output.square().mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train()(x)
        next(iter(model.modules())).train()
        frozen = list(model.modules())[-1].eval()
        before, modes, state = torch.get_rng_state(), [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
        report = stability_report(model, loss, x)
    assert frozen.training is False and [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters()) and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert math.isfinite(report.lambda_max) and report.rates["Adam"].eta_theta > 0 and len(report.banks) == next(iter(banks(model).values())).n_heads


def test_a_mask_keeps_padding_out_of_the_report():
    torch.manual_seed(0)
    layer, x = DDCLAttention(5, 3, tau=0.2).double(), torch.randn(4, 9, 5, dtype=torch.float64)
    layer.init_from(x)
    keep, loss = torch.arange(9) < torch.tensor([[9], [4], [1], [0]]), lambda m, x, mask: (out := m(x, mask)).loss + out.output[mask].square().mean()
    one = stability_report(layer, loss, (x, keep))
    x[~keep] = 1e6
    other = stability_report(layer, loss, (x, keep))
    assert str(one) == str(other)


def test_a_bank_that_is_not_used_and_a_frozen_encoder_are_noted():
    model = coder()
    model.spare = PrototypeBank(2, 3).double()
    model.encode.requires_grad_(False)
    report = stability_report(model, bank_loss, TOKENS)
    assert "spare was not used by this loss" in report.notes and report.banks[0].pull is None and report.H_TT is None
    assert math.isnan(report.rates["momentum"].eta_theta) and report.rates["momentum"].eta_P > 0


def test_the_pull_is_the_scaling_identity():
    model = coder(grad="stop")
    assert stability_report(model, bank_loss, TOKENS).banks[0].pull == pytest.approx(2, rel=1e-6)
    full = coder()
    q = torch.softmax(-torch.cdist(full.encode(TOKENS), full.bank.prototypes).square() / full.bank.temperature, -1)
    d = torch.cdist(full.encode(TOKENS), full.bank.prototypes).square()
    mean = (q * d).sum(-1)
    spread = (q * (d - mean[:, None]).square()).sum(-1)
    assert stability_report(full, bank_loss, TOKENS).banks[0].pull == pytest.approx(float(2 * (mean - spread / full.bank.temperature).sum().detach() / mean.sum().detach()), rel=1e-6)


@pytest.mark.parametrize("loss, message", [
    (lambda m, x: m(x).loss, "loss_fn must return one number"), (lambda m, x: 3.0, "got float"),
    (lambda m, x: bank_loss(m, x) * math.inf, "the loss is inf"), (lambda m, x: bank_loss(m, x).detach(), "depends on no trainable parameter")])
def test_a_loss_that_says_nothing_is_named(loss, message):
    model = coder().train()
    with pytest.raises(ValueError, match=message):
        stability_report(model, loss, TOKENS)
    assert model.training and not model.bank._forward_hooks


@pytest.mark.parametrize("ratio", [0, -1, math.nan])
def test_a_ratio_that_is_none_is_named(ratio):
    with pytest.raises(ValueError, match="ratio must be positive and finite"):
        stability_report(coder(), anchored, TOKENS, ratio=ratio)


def test_an_optimiser_of_another_model_is_named():
    with pytest.raises(ValueError, match="optimiser does not hold every trainable parameter"):
        stability_report(coder(), anchored, TOKENS, optimiser=torch.optim.SGD(coder().parameters(), lr=0.1))


def test_limits_are_those_of_the_recursions():
    "Spectral radius of each linear recursion, one thousandth below and above."
    for momentum in (0.0, 0.3, 0.9, 0.99):
        limit = limits(momentum)["momentum"]
        radius = [np.abs(np.linalg.eigvals([[1 + momentum - s, -momentum], [1, 0]])).max() for s in (0.999 * limit, 1.001 * limit)]
        assert radius[0] < 1 < radius[1]
    for beta in (0.5, 0.9):
        limit = limits(betas=(beta, 0.999))["Adam"]
        radius = [np.abs(np.linalg.eigvals([[1 + beta - (1 - beta) * s, -beta], [1, 0]])).max() for s in (0.999 * limit, 1.001 * limit)]
        assert radius[0] < 1 < radius[1]


class Heads(nn.Module):
    def __init__(self, n_prototypes=3, **bank):
        super().__init__()
        self.encode, self.bank = nn.Linear(5, 6), PrototypeBank(n_prototypes, 6, n_heads=2, **bank)

    def forward(self, x):
        return self.bank(self.encode(x))


def test_a_rising_temperature_is_named_with_its_bank_and_head_before_it_does_damage():
    torch.manual_seed(0)
    model = Heads(tau=0.3)
    model.bank.init_from(model.encode(TOKENS.float()).detach(), "random")
    model.train()
    with watch(model, every=2) as signs, pytest.warns(StabilityWarning, match="tau of bank, head 1 rose above 1"):
        for step in range(40):
            model.bank.set_tau(torch.tensor([0.3, 0.3 + 0.02 * step]))
            model(TOKENS.float())
    assert len(signs.rows) == 2 * 20 and sum("head 1" in w for w in signs.warnings) == 1 and not any("head 0" in w for w in signs.warnings)


def test_a_shrinking_encoder_is_named_at_each_halving():
    model = Heads().train()
    with watch(model, every=1) as signs, pytest.warns(StabilityWarning, match="no anchor holds the encoder"):
        for _ in range(200):
            model(TOKENS.float())
            with torch.no_grad():
                model.encode.weight.mul_(0.985)
    halvings = [w for w in signs.warnings if "head 0" in w and "scale" in w]
    assert 2 <= len(halvings) <= 4


def test_a_frozen_encoder_may_show_data_of_another_scale():
    model = Heads().train()
    model.encode.requires_grad_(False)
    with watch(model, every=1) as signs, warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(150):
            model(TOKENS.float() * 0.98**step)
    assert not [w for w in signs.warnings if "scale" in w]


@pytest.mark.parametrize("n_prototypes", [2, 100, 700])
def test_the_smallest_distance_is_found_in_banks_of_every_size(n_prototypes):
    torch.manual_seed(0)
    bank = PrototypeBank(n_prototypes, 8, temperature=1.0).train()
    with watch(bank, every=1) as signs:
        for _ in range(4):
            bank(torch.randn(50, 8))
    assert signs.rows[-1]["separation_min"] == pytest.approx(float(separation(bank.prototypes).minimum), rel=1e-3)


def test_prototypes_that_merge_are_named_but_not_while_cooling():
    for cooling in (False, True):
        torch.manual_seed(0)
        bank = PrototypeBank(4, 5, tau=0.5)
        bank.init_from(TOKENS.float())
        bank.train()
        with watch(bank, every=1) as signs, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in range(20):
                bank.set_tau(0.5 - 0.01 * step * cooling)
                bank(TOKENS.float())
                bank.prototypes.data.lerp_(TOKENS.float().mean(0).expand_as(bank.prototypes), 0.3)
        assert bool([w for w in signs.warnings if "merging" in w]) != cooling


def test_a_watch_leaves_training_as_it_was():
    runs = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Heads()
        with watch(model) if watched else warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(model, TOKENS.float(), epochs=3, batch_size=10)
        runs.append(model)
    assert all(torch.equal(a, b) for a, b in zip(runs[0].state_dict().values(), runs[1].state_dict().values()))
    assert not runs[1].bank._forward_hooks


def test_evaluation_is_not_watched_and_senseless_settings_are_named():
    model = Heads().eval()
    with watch(model) as signs, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(TOKENS.float())
    assert not signs.rows
    with pytest.raises(ValueError, match="model holds no PrototypeBank"):
        watch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="every must be a positive integer, got 0"):
        watch(model, every=0)


def test_coupling_and_schur_of_a_model_in_single_precision():
    model = settled()
    H, n = dense(model, anchored, TOKENS)
    single = copy.deepcopy(model).float()
    report = stability_report(single, anchored, TOKENS.float())
    assert report.kappa == pytest.approx(float(torch.linalg.eigvalsh(H[:n, :n])[0]), rel=1e-2)
    assert report.coupling == pytest.approx(float(torch.linalg.matrix_norm(H[n:, :n], 2)), rel=1e-3)


def test_parts_without_any_coupling():
    a, b = torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)
    curvature = Curvature(a.square().sum() + 3 * b.sum(), [a], [b])
    assert coupling(curvature) == 0 and spectrum(lambda v: curvature.product("T", "T", v), 4) == (0, 0, 0)
    assert largest_rates(curvature, 1.0, 2.0).eta_theta == pytest.approx(1.0) and np.all(schur_product(curvature)(np.ones(4)) == 0)


@pytest.mark.parametrize("pool", ["histogram", "centroid", "residual"])
def test_sequences_that_are_masked_entirely_are_no_obstacle(pool):
    torch.manual_seed(0)
    readout = DDCLReadout(5, 3, pool=pool, proto_dim=4, tau=0.2).double()
    x, keep = torch.randn(6, 9, 5, dtype=torch.float64), torch.arange(9) < torch.tensor([9, 4, 1, 0, 7, 3])[:, None]
    readout.init_from(x, mask=keep)
    report = stability_report(readout, lambda m, x, mask: (out := m(x, mask)).loss + out.output.pow(3).mean(), (x, keep))
    assert math.isfinite(report.lambda_max)
    none = stability_report(readout, lambda m, x, mask: m(x, mask).loss + m.project_in.weight.square().sum(), (x, keep & False))
    assert not none.banks and any("no token that counts reached" in note for note in none.notes)


@pytest.mark.parametrize("size", [1, 8, 15])
def test_a_loss_that_refuses_small_pieces_is_reported(size):
    loss = Anchored(bank_loss, anchor_settings({"variance_floor": 1.0}))
    weighted = lambda m, x, w: (m(x).loss * w).sum() / w.sum()
    assert stability_report(coder(), loss, TOKENS[:size]).rates["Adam"].eta_P > 0
    assert stability_report(coder(), weighted, (TOKENS, (torch.arange(60) > 20).double())).rates["Adam"].eta_P > 0


def test_a_loss_without_a_second_derivative_is_named():
    with pytest.raises(ValueError, match="no finite second derivative"):
        stability_report(coder(), lambda m, x: bank_loss(m, x) + (m.encode(x) * 0).norm(), TOKENS)


def test_a_field_that_is_no_gradient_is_noted():
    for grad, loss, approximate in (("stop", lambda m, x: m(x).variance.mean(), True), ("stop", bank_loss, False), ("stop-loss", lambda m, x: m(x).centroids.square().mean(), False)):
        assert any("approximate" in note for note in stability_report(coder(grad=grad), loss, TOKENS).notes) == approximate


@pytest.mark.parametrize("settings, share", [({"momentum": 0.9}, 1), ({"momentum": 0.9, "nesterov": True}, 2.8), ({"momentum": 0.5, "dampening": 0.5}, 0.5 * 1.9 / 1.5)])
def test_every_kind_of_momentum_has_its_own_limit(settings, share):
    model = coder()
    bound = stability_report(model, anchored, TOKENS).rates["momentum"]
    groups = [{**g, "lr": bound.eta_P if g["name"] == "prototypes" else bound.eta_theta} for g in param_groups(model)]
    assert stability_report(model, anchored, TOKENS, optimiser=torch.optim.SGD(groups, **settings)).speed == pytest.approx(share, rel=1e-3)


def test_a_parameter_without_moments_does_not_hide_those_of_the_others():
    model = coder()
    optimiser = torch.optim.Adam(param_groups(model))
    for _ in range(3):
        optimiser.zero_grad()
        anchored(model, TOKENS).backward()
        optimiser.step()
    alone = stability_report(model, anchored, TOKENS, optimiser=optimiser).speed
    model.extra = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimiser.add_param_group({"params": [model.extra]})
    assert stability_report(model, anchored, TOKENS, optimiser=optimiser).speed == pytest.approx(alone, rel=1e-3)


def test_what_cannot_collapse_is_not_told_that_it_will():
    single = PrototypeBank(1, 5, tau=1.3).double()
    single.init_from(TOKENS)
    frozen = coder(tau=1.3)
    frozen.bank.prototypes.requires_grad_(False)
    apart = Anchored(anchored, anchor_settings({"repulsion": 1.0}))
    reports = stability_report(single, bank_loss, TOKENS), stability_report(frozen, anchored, TOKENS), stability_report(coder(tau=1.3), apart, TOKENS)
    assert [r.status == "collapse" for r in reports] == [False] * 3


@pytest.mark.parametrize("constant", [0, -5])
def test_a_shrinking_encoder_is_seen_whatever_the_constant_of_the_loss(constant):
    assert stability_report(coder(grad="stop"), lambda m, x: bank_loss(m, x) + constant, TOKENS).status == "shrinking"


def test_a_normalised_embedding_is_not_called_shrinking():
    model = coder(grad="stop")
    model.encode.append(nn.BatchNorm1d(4, affine=False, track_running_stats=False).double())
    model.bank.init_from(model.encode(TOKENS).detach(), "random")
    assert stability_report(model, bank_loss, TOKENS).status != "shrinking"


def test_banks_that_share_their_prototypes_are_counted_once():
    model = nn.ModuleList([PrototypeBank(3, 5), PrototypeBank(3, 5)]).double()
    model[1].prototypes = model[0].prototypes
    for bank in model:
        bank.init_from(TOKENS)
    report = stability_report(model, lambda m, x: bank_loss(m[0], x) + bank_loss(m[1], x), TOKENS)
    alone = stability_report(model[0], bank_loss, TOKENS)
    assert report.kappa == pytest.approx(2 * alone.kappa, rel=1e-3)


def test_random_numbers_are_left_as_they_were():
    model, before = coder(), torch.get_rng_state()
    stability_report(model, lambda m, x: bank_loss(m, x) + 0 * torch.rand(()), TOKENS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_large_bank_at_rest_is_not_merging():
    torch.manual_seed(0)
    bank = PrototypeBank(600, 8, temperature=1.0).train()
    bank.prototypes.data[500] = bank.prototypes.data[501] + 1e-3
    with watch(bank, every=1) as signs, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            bank(torch.randn(50, 8))
    assert not signs.warnings


def test_a_bank_that_stays_hot_is_named():
    torch.manual_seed(0)
    bank = PrototypeBank(4, 5, temperature=60.0)
    bank.init_from(TOKENS.float())
    with watch(bank.train(), every=1) as signs, pytest.warns(StabilityWarning, match="stays above 1"):
        for _ in range(15):
            bank(TOKENS.float())
    assert len(signs.warnings) == 1


def test_an_encoder_that_starts_at_zero_is_not_called_shrinking():
    model = Heads().train()
    nn.init.zeros_(model.encode.weight)
    with watch(model, every=1) as signs:
        for step in range(30):
            model(TOKENS.float())
            with torch.no_grad():
                model.encode.weight.add_(0.01 * torch.randn_like(model.encode.weight))
    assert not [w for w in signs.warnings if "scale" in w]
