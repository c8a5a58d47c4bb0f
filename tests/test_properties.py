"""What must hold for every input, over shapes, kinds of numbers, masks, temperatures and seeds; and that every public name of the package has such a property, or a reason here.

HYPOTHESIS_PROFILE=nightly draws thousands of new examples of each property; otherwise the same few are drawn every time."""
import importlib
import inspect
import json
import math
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import ddcl_nb
from ddcl_nb import adapters, curvature, estimators, examine, explain, fitted, metrics, page, report, storage
from ddcl_nb.assign import THROUGH, NonFiniteInput, assignments, check_inputs, ddcl, decompose
from ddcl_nb.bank import INITIALISERS, PrototypeBank, cool, initial_prototypes, merge_heads, merge_prototypes, separation, split_heads
from ddcl_nb.cli import clusters_asked, heat, plain, seeds_of, words
from ddcl_nb.data import EARTH_RADIUS, DataSet, class_sizes, measured_orbits, period_minutes, regimes, sample, strip_newsgroup_post, synthetic_orbits, take, true_orbits
from ddcl_nb.encoders import TokenEmbeddings, cache_key, like_lengths, masked_mean
from ddcl_nb.estimators import DDCLClusterer
from ddcl_nb.experiments.registry import Log, Result, check_profile, read_result, spread, with_spread
from ddcl_nb.layers import POOLS, DDCLAttention, DDCLReadout, GatedDDCL, PrototypeBottleneck, PrototypeFFN, PrototypeNorm, SerialDDCL, check_tokens, token_mean, without_padding
from ddcl_nb.losses import ddcl_loss, decorrelation, on_sphere, reconstruction, repulsion, variance_floor
from ddcl_nb.progress import progress
from ddcl_nb.quantize import DDCLQuantize, Encoder
from ddcl_nb.sources import checked_encoding
from ddcl_nb.stability import StabilityWarning, called, stability_report, watch
from ddcl_nb.temperature import Anneal, covariance, critical_temperature, largest_variance, split_temperatures
from ddcl_nb.training import TensorBatches, bank_loss, banks, check_decomposition, fit, param_groups

# --- which names have a property here

COVERED: set[str] = set()


def covers(*names):
    "Note that a test holds a property of these names, `module.name`."
    COVERED.update(names)
    return lambda test: test


# --- what is drawn

@dataclass
class Scene:
    "Tokens `(B, N, m)`, prototypes `(K, m)` of the same scale, a temperature of their order, and a mask `(B, N)` or None."
    z: torch.Tensor
    p: torch.Tensor
    T: float
    mask: torch.Tensor | None
    scale: float
    seed: int

    @property
    def keep(self):
        return torch.ones(self.z.shape[:2], dtype=torch.bool) if self.mask is None else self.mask

    @property
    def tolerance(self):
        return 1e-8 if self.z.dtype == torch.float64 else 3e-3

    def generator(self):
        return torch.Generator().manual_seed(self.seed + 1)


@st.composite
def scenes(draw, kinds=(torch.float64, torch.float32), fewest=1, counting=0, scales=3, distinct=False):
    "`counting` tokens count at least; `distinct` leaves no two prototypes or tokens alike, which normal draws give by themselves."
    B, N, K, m = draw(st.integers(1, 3)), draw(st.integers(max(fewest, counting), 9)), draw(st.integers(1, 7)), draw(st.integers(1, 6))
    kind, scale = draw(st.sampled_from(kinds)), 10.0 ** draw(st.floats(-scales, scales))
    gen = torch.Generator().manual_seed(seed := draw(st.integers(0, 2**31)))
    z, p = (scale * torch.randn(*shape, generator=gen, dtype=torch.float64).to(kind) for shape in ((B, N, m), (K, m)))
    mask = torch.rand(B, N, generator=gen) < draw(st.sampled_from([0.2, 0.6, 0.9])) if draw(st.booleans()) else None
    if mask is not None and mask.sum() < counting:
        mask[:, :counting] = True
    return Scene(z, p, scale**2 * m * 10.0 ** draw(st.floats(-1, 2)), mask, scale, seed)


KINDS = st.sampled_from([torch.float64, torch.float32])
FACTORS = st.floats(-2, 2).map(lambda x: 10.0**x)
SEEDS = st.integers(0, 2**31)
JUNK = st.sampled_from([0.0, 1e4, -math.inf, math.nan])


def near(a, b, tolerance, floor=0.0, what=""):
    "The largest difference, relative to the largest value of `b` and at least to `floor`."
    a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
    assert a.shape == b.shape and a.isfinite().all(), (what, a, b)
    if b.numel():
        assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), floor) + 1e-12 * floor, (what, a, b)


def padded(scene, junk, extra):
    "The same tokens with others behind them that do not count."
    more = torch.full((len(scene.z), extra, scene.z.shape[-1]), junk, dtype=scene.z.dtype)
    return torch.cat([scene.z, more], 1), torch.cat([scene.keep, torch.zeros(len(scene.z), extra, dtype=torch.bool)], 1)


TERMS = ("centroids", "loss", "recon", "variance", "entropy", "free_energy")
POWERS = {"centroids": 1, "loss": 2, "recon": 2, "variance": 2, "entropy": 0, "free_energy": 2}


def units(scene, name):
    "The natural size of a term: its unit, by the largest number of its kind."
    return max(scene.scale, float(scene.z.abs().max())) ** POWERS[name] if name != "free_energy" else scene.scale**2 * scene.z.shape[-1] + scene.T * 3


# --- assign

@covers("assign.assignments")
@given(scenes(), FACTORS, st.floats(-5, 5))
def test_assignments_sum_to_one_and_know_no_unit_and_no_origin(scene, c, shift):
    q = assignments(scene.z, scene.p, scene.T, mask=scene.mask)
    assert (q >= 0).all() and q.shape == (*scene.z.shape[:2], len(scene.p))
    near(q.sum(-1), scene.keep.to(q.dtype), 1e-5)
    tolerance = scene.tolerance * (1 + 20 * scene.scale**2 * scene.z.shape[-1] / scene.T)
    near(assignments(c * scene.z, c * scene.p, c**2 * scene.T, mask=scene.mask), q, tolerance, 1)
    moved = shift * scene.scale
    near(assignments(scene.z + moved, scene.p + moved, scene.T, mask=scene.mask), q, tolerance, 1)


@covers("assign.assignments", "assign.ddcl", "assign.DDCLOutput")
@given(scenes(), st.sampled_from(list(THROUGH)), st.sampled_from(["fused", "matmul", "reference"]))
def test_the_terms_belong_together(scene, grad, backend):
    out = ddcl(scene.z, scene.p, scene.T, mask=scene.mask, grad=grad, backend=backend)
    size, keep = units(scene, "loss"), scene.keep
    near(out.loss, out.recon + out.variance, 1e-5, size)
    near(out.free_energy, out.loss - scene.T * out.entropy, 1e-4, size + scene.T)
    assert (out.recon >= 0).all() and (out.variance >= 0).all() and (out.entropy >= -1e-6).all() and (out.entropy <= math.log(len(scene.p)) + 1e-5).all()
    assert ((out.indices >= 0) == keep).all() and (out.indices < len(scene.p)).all()
    near(out.centroids, assignments(scene.z, scene.p, scene.T, mask=scene.mask) @ scene.p, scene.tolerance, scene.scale)
    again = ddcl(scene.z, scene.p, scene.T, mask=scene.mask, grad=grad, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(out, again))


@covers("assign.ddcl")
@given(scenes(), FACTORS, st.floats(-5, 5), st.sampled_from(["auto", "matmul"]))
def test_units_and_origin_of_the_terms(scene, c, shift, backend):
    out, shift = ddcl(scene.z, scene.p, scene.T, mask=scene.mask, backend=backend), shift * scene.scale
    tolerance = scene.tolerance * (1 + 20 * scene.scale**2 * scene.z.shape[-1] / scene.T)
    scaled = ddcl(c * scene.z, c * scene.p, c**2 * scene.T, mask=scene.mask, backend=backend)
    moved = ddcl(scene.z + shift, scene.p + shift, scene.T, mask=scene.mask, backend=backend)
    for name in TERMS:
        power, size = POWERS[name], units(scene, name)
        near(getattr(scaled, name), c**power * getattr(out, name), tolerance, c**power * size, name)
        expected = getattr(out, name) + (shift * scene.keep[..., None].to(scene.z.dtype) if name == "centroids" else 0)
        near(getattr(moved, name), expected, tolerance, size + abs(shift) * (name == "centroids"), name)


@covers("assign.ddcl", "assign.assignments")
@given(scenes(), st.integers(0, 4), JUNK, st.sampled_from(["auto", "matmul", "reference"]))
def test_order_and_padding_of_tokens_and_order_of_prototypes(scene, extra, junk, backend):
    call = lambda z, p, mask: ddcl(z, p, scene.T, mask=mask, backend=backend)
    out, gen = call(scene.z, scene.p, scene.keep), scene.generator()
    z, mask = padded(scene, junk, extra)
    longer, n = call(z, scene.p, mask), scene.z.shape[1]
    tokens, prototypes = torch.randperm(n, generator=gen), torch.randperm(len(scene.p), generator=gen)
    other = call(scene.z[:, tokens], scene.p[prototypes], scene.keep[:, tokens])
    for name in TERMS:
        a, b, size = getattr(longer, name), getattr(out, name), units(scene, name)
        near(a[:, :n], b, scene.tolerance, size, name)
        assert (a[:, n:] == 0).all()
        near(getattr(other, name), b[:, tokens], scene.tolerance * 10, size, name)
    assert (longer.indices[:, n:] == -1).all()
    q = assignments(scene.z, scene.p, scene.T, mask=scene.keep)
    near(assignments(scene.z[:, tokens], scene.p[prototypes], scene.T, mask=scene.keep[:, tokens]), q[:, tokens][..., prototypes], scene.tolerance * 10, 1)


@covers("assign.decompose", "assign.Decomposition")
@given(scenes())
def test_decompose_takes_apart_what_ddcl_adds_up(scene):
    out, parts = ddcl(scene.z, scene.p, scene.T, mask=scene.mask), decompose(scene.z, scene.p, scene.T, mask=scene.mask)
    for part, term in zip(parts, (out.loss, out.recon, out.variance)):
        assert part.dtype == torch.float64
        near(term, part, scene.tolerance, units(scene, "loss"))
    near(parts[0], parts[1] + parts[2], 1e-10, units(scene, "loss"))
    weights = torch.softmax(torch.randn(*scene.z.shape[:2], len(scene.p), generator=scene.generator()), -1)
    assert parts.gap < 1e-9 and decompose(scene.z, scene.p, weights=weights.double(), mask=scene.mask).gap < 1e-9, "of any weights"


BAD = {"nan": lambda s: dict(tokens=s.z.index_fill(1, torch.tensor([0]), math.nan)), "inf": lambda s: dict(prototypes=s.p * math.inf), "width": lambda s: dict(prototypes=torch.cat([s.p, s.p], -1)),
       "cold": lambda s: dict(temperature=0.0), "negative": lambda s: dict(temperature=-s.T), "integer": lambda s: dict(tokens=s.z.long()),
       "precision": lambda s: dict(prototypes=s.p.to(torch.float32 if s.p.dtype == torch.float64 else torch.float64)),
       "mask": lambda s: dict(mask=torch.ones(len(s.z), s.z.shape[1] + 1, dtype=torch.bool)), "one": lambda s: dict(tokens=s.z[0, 0]), "list": lambda s: dict(tokens=s.z.tolist())}


@covers("assign.check_inputs", "assign.NonFiniteInput", "assign.ddcl", "assign.assignments")
@given(scenes(), st.sampled_from(list(BAD)))
def test_bad_input_is_named(scene, what):
    given_ = dict(tokens=scene.z, prototypes=scene.p, temperature=scene.T, mask=None)
    check_inputs(**given_)
    wrong = given_ | BAD[what](scene)
    for call in (check_inputs, ddcl, assignments):
        with pytest.raises((ValueError, TypeError), match="tokens|prototypes|temperature|mask") as caught:
            call(wrong["tokens"], wrong["prototypes"], wrong["temperature"], **({"mask": wrong["mask"]}))
        assert len(str(caught.value)) < 300 and (what not in ("nan", "inf") or isinstance(caught.value, NonFiniteInput))


# --- temperature

@covers("temperature.largest_variance", "temperature.critical_temperature", "temperature.covariance")
@given(scenes(counting=1), FACTORS, st.floats(-5, 5), JUNK, st.sampled_from(["full", "stop"]))
def test_critical_temperature_is_of_the_cloud_alone(scene, c, shift, junk, grad):
    T, top, gen = critical_temperature(scene.z, mask=scene.mask, grad=grad), largest_variance(scene.z, mask=scene.mask), scene.generator()
    assert T >= 0 and float(T) == pytest.approx({"full": 4, "stop": 2}[grad] * float(top))
    size = scene.scale**2
    near(critical_temperature(c * scene.z, mask=scene.mask, grad=grad), c**2 * T, scene.tolerance, c**2 * size)
    near(critical_temperature(scene.z + shift * scene.scale, mask=scene.mask, grad=grad), T, scene.tolerance, size)
    z, mask = padded(scene, junk, 3)
    near(critical_temperature(z, mask=mask, grad=grad), T, 1e-9, size)
    kept = scene.z[scene.keep]
    near(torch.linalg.eigvalsh(covariance(kept, torch.ones(len(kept)))[1])[-1], top, 1e-9, size)
    near(critical_temperature(kept[torch.randperm(len(kept), generator=gen)], grad=grad), T, 1e-9, size)
    turn = torch.linalg.qr(torch.randn(scene.z.shape[-1], scene.z.shape[-1], generator=gen, dtype=torch.float64))[0]
    near(critical_temperature(scene.z.double() @ turn, mask=scene.mask, grad=grad), T, 1e-9, size)


@covers("temperature.split_temperatures")
@given(scenes(counting=2), FACTORS)
def test_split_temperatures_follow_their_prototypes(scene, c):
    found = split_temperatures(scene.z, scene.p, scene.T, mask=scene.mask)
    assert (found >= 0).all() and found.shape == (len(scene.p),)
    order = torch.randperm(len(scene.p), generator=scene.generator())
    near(split_temperatures(scene.z, scene.p[order], scene.T, mask=scene.mask), found[order], 1e-6, scene.scale**2)
    near(split_temperatures(c * scene.z, c * scene.p, c**2 * scene.T, mask=scene.mask), c**2 * found, scene.tolerance * (1 + 20 * scene.scale**2 * scene.z.shape[-1] / scene.T), c**2 * scene.scale**2)


@covers("temperature.Anneal")
@given(st.floats(1e-3, 10), st.floats(1e-3, 10), st.integers(1, 500), st.sampled_from(["exponential", "geometric", "linear", "cosine"]), st.floats(0, 2), st.floats(1.0, 1000))
def test_schedules_stay_between_their_ends_and_stretch(start, end, steps, shape, where, longer):
    anneal = Anneal(start, end, steps, shape)
    low, high = sorted((start, end))
    assert low * (1 - 1e-9) <= anneal(where * steps) <= high * (1 + 1e-9) or shape == "exponential"
    assert anneal(steps + 7) == anneal(steps) and anneal.over(longer)(where * longer) == pytest.approx(anneal(where * steps), rel=1e-9)


# --- bank

@covers("bank.separation", "bank.Separation")
@given(scenes(), FACTORS, st.floats(-5, 5))
def test_separation_is_a_length_between_prototypes(scene, c, shift):
    s, order = separation(scene.p), torch.randperm(len(scene.p), generator=scene.generator())
    assert 0 <= s.minimum <= s.mean * (1 + 1e-5)
    for other, factor in ((separation(scene.p[order]), 1), (separation(c * scene.p), c), (separation(scene.p + shift * scene.scale), 1)):
        near(torch.stack([*other]), factor * torch.stack([*s]), scene.tolerance, factor * scene.scale)


@covers("bank.initial_prototypes", "bank.cool")
@given(scenes(kinds=(torch.float64,), fewest=7), st.sampled_from(list(INITIALISERS)), st.integers(0, 100), st.sampled_from([0.25, 2.0, 64.0]))
def test_starts_are_drawn_by_their_seed_and_in_the_units_of_the_tokens(scene, method, seed, c):
    z, K = scene.z.flatten(0, 1), len(scene.p)
    found = initial_prototypes(z, K, method, seed)
    assert found.shape == scene.p.shape and torch.equal(found, initial_prototypes(z, K, method, seed))
    near(initial_prototypes(c * z, K, method, seed), c * found, 1e-6, c * scene.scale)
    assert (found >= z.amin(0) - 0.01 * scene.scale).all() and (found <= z.amax(0) + 0.01 * scene.scale).all()
    if method in ("random", "farthest", "kmeans++"):
        assert torch.cdist(found, z, compute_mode="donot_use_mm_for_euclid_dist").amin(-1).max() <= 1e-6 * scene.scale
    with pytest.raises(ValueError, match="distinct tokens"):
        initial_prototypes(z[:1].expand(9, -1), 2, method)


@covers("bank.cool")
@given(scenes(kinds=(torch.float64,), fewest=4), st.integers(0, 100), st.sampled_from([0.25, 2.0, 64.0]))
def test_cooling_knows_its_seed_and_no_unit(scene, seed, c):
    z, schedule = scene.z.flatten(0, 1), Anneal(1.5, 0.3, 5)
    assume(float(largest_variance(z)) > 0)
    found = cool(z, scene.p, schedule, steps=5, seed=seed)
    assert found.isfinite().all() and torch.equal(found, cool(z, scene.p, schedule, steps=5, seed=seed))
    near(cool(c * z, c * scene.p, schedule, steps=5, seed=seed), c * found, 1e-6, c * scene.scale)


@covers("bank.merge_prototypes")
@given(scenes(), st.data(), st.sampled_from(["average", "single", "complete", "ward"]))
def test_merged_prototypes_are_a_partition(scene, data, linkage):
    n = data.draw(st.integers(1, len(scene.p)))
    labels = merge_prototypes(scene.p, n, linkage)
    assert labels.shape == (len(scene.p),) and sorted(set(labels.tolist())) == list(range(n))
    order = torch.randperm(len(scene.p), generator=scene.generator())
    other = merge_prototypes(scene.p[order], n, linkage)
    assert metrics.ari(labels[order], other) == pytest.approx(1) or n in (1, len(scene.p))


@covers("bank.split_heads", "bank.merge_heads")
@given(scenes(), st.integers(1, 4), st.integers(1, 4))
def test_heads_are_split_and_merged(scene, heads, width):
    x = torch.randn(2, scene.z.shape[1], heads * width, generator=scene.generator())
    split = split_heads(x, heads)
    assert split.shape == ((2, x.shape[1], width) if heads == 1 else (2, heads, x.shape[1], width)) and torch.equal(merge_heads(split, heads), x)


@covers("bank.PrototypeBank")
@given(scenes(kinds=(torch.float32,), counting=3), FACTORS, st.floats(0.05, 0.9), st.sampled_from(["full", "stop"]), JUNK)
def test_a_bank_speaks_in_reduced_temperature(scene, c, tau, grad, junk):
    assume(scene.z.shape[1] >= 3)
    bank = lambda z, mask: PrototypeBank(2, z.shape[-1], tau=tau, grad=grad).eval().init_from(z, "farthest", mask=mask)
    one, scaled = bank(scene.z, scene.mask), bank(c * scene.z, scene.mask)
    assert float(scaled.temperature) == pytest.approx(c**2 * float(one.temperature), rel=1e-3) and float(one.reduced_temperature) == pytest.approx(tau, rel=1e-4)
    a, b = one(scene.z, scene.mask), scaled(c * scene.z, scene.mask)
    near(b.loss, c**2 * a.loss, 1e-2, c**2 * scene.scale**2)
    z, mask = padded(scene, junk, 2)
    near(bank(z, mask).prototypes, one.prototypes, 1e-5, scene.scale)
    copy = PrototypeBank(2, scene.z.shape[-1], grad=grad).eval()
    copy.load_state_dict(one.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(copy(scene.z, scene.mask), a))


# --- layers

LAYERS = {"attention": lambda m, K, h: DDCLAttention(m, K, n_heads=h, proto_dim=4), "bottleneck": lambda m, K, h: PrototypeBottleneck(m, K, n_heads=h, proto_dim=4), "ffn": lambda m, K, h: PrototypeFFN(m, K, n_heads=h, proto_dim=8),
          "norm": lambda m, K, h: PrototypeNorm(m, K), "serial": lambda m, K, h: SerialDDCL(torch.nn.Linear(m, m), m, K, n_heads=h, proto_dim=4), "gated": lambda m, K, h: GatedDDCL(torch.nn.Linear(m, m), m, K, n_heads=h, proto_dim=4),
          **{pool: lambda m, K, h, pool=pool: DDCLReadout(m, K, pool=pool, n_heads=h, proto_dim=4) for pool in POOLS}}


def layer(name, scene, heads, seed):
    torch.manual_seed(seed)
    made = LAYERS[name](scene.z.shape[-1], len(scene.p), heads)
    for bank in banks(made).values():
        bank.set_temperature(scene.T)
        with torch.no_grad():
            bank.prototypes.mul_(scene.scale)
    return made.eval()


@covers("layers.Assigning", "layers.DDCLAttention", "layers.DDCLReadout", "layers.PrototypeBottleneck", "layers.PrototypeFFN", "layers.PrototypeNorm", "layers.SerialDDCL", "layers.GatedDDCL", "layers.LayerOutput", "losses.ddcl_loss")
@pytest.mark.parametrize("name", LAYERS)
@given(scene=scenes(kinds=(torch.float32,), scales=1), heads=st.sampled_from([1, 2]), extra=st.integers(0, 4), junk=JUNK, seed=st.integers(0, 1000))
def test_layers_know_no_padding_and_no_order(name, scene, heads, extra, junk, seed):
    made, n = layer(name, scene, heads, seed), scene.z.shape[1]
    out, order = made(scene.z, mask=scene.keep), torch.randperm(n, generator=scene.generator())
    z, mask = padded(scene, junk, extra)
    longer, other = made(z, mask=mask), made(scene.z[:, order], mask=scene.keep[:, order])
    summary, size = name in POOLS, 1 + float(out.output.detach().abs().max())
    keep = scene.keep[..., None]
    cut = (lambda x: x) if summary else lambda x: torch.where(keep, x[:, :n], 0.0)
    near(cut(longer.output), cut(out.output), 2e-3, size)
    near(other.output if summary else torch.where(keep[:, order], other.output, 0.0), out.output if summary else torch.where(keep, out.output, 0.0)[:, order], 2e-3, size)
    for found in (longer, other):
        near(found.loss, out.loss, 2e-3, scene.scale**2)
    near(ddcl_loss(out), ddcl_loss(out.assignment, scene.keep, 1 if name == "norm" else heads), 1e-4, scene.scale**2)
    again = made(scene.z, mask=scene.keep)
    assert torch.equal(again.output, out.output) and torch.equal(layer(name, scene, heads, seed)(scene.z, mask=scene.keep).output, out.output)


@covers("layers.token_mean", "layers.without_padding", "layers.check_tokens")
@given(scenes(), st.integers(1, 3), JUNK)
def test_means_and_checks_of_tokens(scene, heads, junk):
    values = torch.rand(len(scene.z), heads, scene.z.shape[1], generator=scene.generator()) * scene.keep[:, None]
    near(token_mean(values, scene.keep, heads), values.sum() / max(1, int(scene.keep.sum())), 1e-6)
    z, mask = padded(scene, junk, 2)
    clean = without_padding(z, mask)
    assert clean.isfinite().all() and torch.equal(clean[mask], z[mask]) and (clean[~mask] == 0).all()
    check_tokens(scene.z, scene.z.shape[-1], scene.z.dtype)
    for wrong in (scene.z.long(), scene.z[0, 0], scene.z[..., :0], scene.z.tolist()):
        with pytest.raises((TypeError, ValueError), match="tokens"):
            check_tokens(wrong, scene.z.shape[-1], scene.z.dtype)


# --- losses and metrics

@covers("losses.repulsion", "losses.variance_floor", "losses.decorrelation", "losses.reconstruction", "losses.on_sphere")
@given(scenes(counting=2, scales=1), FACTORS, st.floats(-5, 5), JUNK)
def test_losses_in_other_units_orders_and_lengths(scene, c, shift, junk):
    z, p, mask, gen, moved = scene.z.double(), scene.p.double(), scene.keep, scene.generator(), shift * scene.scale
    K, order = len(p), torch.randperm(len(p), generator=gen)
    near(repulsion(p[order], 0.3, 0.1), repulsion(p, 0.3, 0.1), 1e-9, 1)
    near(repulsion(c * p, 0.3, 0.1 / c**2), repulsion(p, 0.3, 0.1) - 0.3 * K * (K - 1) * math.log(c), 1e-8, 1)
    longer, longer_mask = padded(Scene(z, p, 1.0, scene.mask, scene.scale, scene.seed), junk, 2)
    for loss, power in ((lambda x, m: variance_floor(x, scene.scale, m), None), (decorrelation, 4)):
        value = loss(z, mask)
        near(loss(z + moved, mask), value, 1e-7, scene.scale**(power or 1))
        near(loss(longer, longer_mask), value, 1e-9, scene.scale**(power or 1))
        if power:
            near(loss(c * z, mask), c**power * value, 1e-7, c**power * scene.scale**power)
    decoded = z + scene.scale * torch.randn(z.shape, generator=gen, dtype=z.dtype)
    if float(largest_variance(z, mask=mask)) > 1e-12 * scene.scale**2:
        error = reconstruction(decoded, z, mask)
        near(reconstruction(c * decoded + moved, c * z + moved, mask), error, 1e-6, 1)
        assert reconstruction(z, z, mask) == 0
        near(reconstruction(z[mask].mean(0).expand_as(z), z, mask), torch.tensor(1.0), 1e-6)
    near(on_sphere(scene.z, 3.0).norm(dim=-1), torch.full(z.shape[:2], 3.0), 1e-5)


PARTITIONS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=40)


@covers("metrics.match_clusters", "metrics.clustering_accuracy", "metrics.mean_recall", "metrics.nmi", "metrics.ari", "metrics.clustering_scores")
@given(PARTITIONS, st.permutations(range(7)), SEEDS)
def test_scores_of_partitions(pairs, naming, seed):
    y, c = np.array(pairs).T
    scores, order = metrics.clustering_scores(y, c), np.random.default_rng(seed).permutation(len(y))
    assert scores == {"acc": metrics.clustering_accuracy(y, c), "nmi": metrics.nmi(y, c), "ari": metrics.ari(y, c), "recall": metrics.mean_recall(y, c)}
    assert all(-1 <= value <= 1 + 1e-9 for value in scores.values()) and scores["acc"] > 0
    assert metrics.clustering_scores(y[order], np.array(naming)[c][order]) == pytest.approx(scores, abs=1e-9)
    assert metrics.clustering_accuracy(y, np.array(naming)[y]) == metrics.mean_recall(y, y) == 1
    matched = metrics.match_clusters(y, c)
    assert metrics.ari(c, matched) == pytest.approx(1) and (matched == y).mean() == scores["acc"]


@covers("metrics.usage_counts", "metrics.perplexity", "metrics.utilization")
@given(st.lists(st.integers(-1, 8), max_size=60), FACTORS)
def test_use_of_prototypes(indices, c):
    counts = metrics.usage_counts(np.array(indices, dtype=int), 9)
    assert counts.sum() == sum(i >= 0 for i in indices)
    used = int((counts > 0).sum())
    assert metrics.utilization(counts) == used / 9 and (1 - 1e-9 <= metrics.perplexity(counts) <= used + 1e-9 if used else metrics.perplexity(counts) == 0)
    assert metrics.perplexity(c * counts[::-1]) == pytest.approx(metrics.perplexity(counts))


# --- quantize

@covers("quantize.DDCLQuantize", "quantize.Stage", "quantize.Quantized", "quantize.Usage", "quantize.Encoder")
@given(scenes(kinds=(torch.float32,), fewest=8), st.sampled_from([1, 2]), st.sampled_from([1, 2]), SEEDS, st.sampled_from([0.25, 4.0]))
def test_codes_are_what_their_indices_say(scene, heads, stages, seed, c):
    z = torch.randn(len(scene.z), scene.z.shape[1], 4, generator=scene.generator()) * scene.scale
    start = lambda x: DDCLQuantize(4, 3, heads=heads, num_quantizers=stages).init_from(x, seed=seed % 100).eval()
    layer = start(z)
    quantized, indices, loss = layer(z, scene.mask)
    assert (indices < 3).all() and ((indices >= 0).reshape(*z.shape[:2], -1).all(-1) == scene.keep).all() and loss >= 0
    near(torch.where(scene.keep[..., None], layer.get_codes_from_indices(indices), 0.0), quantized, 1e-6, scene.scale)
    assert torch.equal(indices, layer.encode(z, scene.mask)) and torch.equal(Encoder(layer)(z), layer.encode(z))
    assert torch.equal(start(z).codebook, layer.codebook), "the seed decides"
    near(start(c * z).codebook, c * layer.codebook, 1e-4, c * scene.scale)
    use = layer.usage()
    assert 0 <= use.used <= 1 and 0 <= use.perplexity <= 3 + 1e-6


# --- curvature and stability

def symmetric(n, seed):
    A = np.random.default_rng(seed).normal(size=(n, n))
    return A + A.T


@covers("curvature.spectrum", "curvature.dominant", "curvature.top", "curvature.Spectrum")
@given(st.integers(2, 60), st.integers(0, 1000), FACTORS)
def test_ends_of_a_spectrum(n, seed, c):
    A = c * symmetric(n, seed)
    values = np.linalg.eigvalsh(A)
    size = abs(values).max()
    found = curvature.spectrum(lambda v: A @ v, n)
    assert abs(found.smallest - values[0]) < 1e-4 * size and abs(found.largest - values[-1]) < 1e-4 * size and not found.flat
    one, tolerance = curvature.dominant(lambda v: A @ v, n)
    assert abs(abs(one) - size) < max(1e-3, 10 * tolerance) * size and abs(curvature.top(lambda v: A @ v, n) - values[-1]) < 1e-3 * size


@covers("curvature.Curvature", "curvature.schur_product", "curvature.coupling", "curvature.sharpness", "curvature.limits", "curvature.largest_rates", "curvature.Rates")
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 1000), st.floats(0.01, 100))
def test_products_are_those_of_the_hessian(n, k, seed, ratio):
    A = np.random.default_rng(seed).normal(size=(n + k, n + k))
    H = torch.from_numpy(A @ A.T / (n + k) + np.eye(n + k))
    P, T = torch.randn(n, dtype=torch.float64, requires_grad=True), torch.randn(k, dtype=torch.float64, requires_grad=True)
    x = torch.cat([P, T])
    found = curvature.Curvature(x @ H @ x / 2, [P], [T])
    H, v = H.numpy(), np.random.default_rng(seed + 1).normal(size=n + k)
    np.testing.assert_allclose(found.product("PT", "PT", v), H @ v, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.gradient("PT"), H @ x.detach().numpy(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(curvature.schur_product(found)(v[n:]), (H[n:, n:] - H[n:, :n] @ np.linalg.solve(H[:n, :n], H[:n, n:])) @ v[n:], atol=1e-5)
    assert curvature.coupling(found) == pytest.approx(np.linalg.norm(H[n:, :n], 2), rel=1e-4)
    for limit in curvature.limits().values():
        rates = curvature.largest_rates(found, ratio, limit)
        assert rates[0] == pytest.approx(ratio * rates[1]) and curvature.sharpness(found, np.repeat(rates, [n, k])) == pytest.approx(limit, rel=1e-2)


@covers("stability.stability_report", "stability.StabilityReport", "stability.BankSigns", "stability.called")
@given(st.integers(0, 1000), st.sampled_from([0.25, 4.0, 64.0]), st.floats(0.1, 2.0), st.sampled_from(["full", "stop"]))
def test_a_report_speaks_of_shape_and_not_of_units(seed, c, tau, grad):
    z = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * torch.tensor([3.0, 1, 1])

    def report_of(z):
        bank = PrototypeBank(3, 3, tau=tau, grad=grad).double()
        bank.init_from(z, "farthest")
        return stability_report(bank, lambda bank, z: bank(z).loss.mean(), z)
    one, other = report_of(z), report_of(c * z)
    assert one.status == other.status and one.banks[0].critical * c**2 == pytest.approx(other.banks[0].critical, rel=1e-4)
    assert json.loads(json.dumps(one.as_dict(), default=str)) and one.verdict in str(one)
    assert called("", None) == "the bank" and called("a.b", 1) == "a.b, head 1"


@covers("stability.Watch", "stability.watch", "stability.StabilityWarning", "training.banks", "training.param_groups", "training.bank_loss", "training.check_decomposition", "training.DecompositionError")
@given(scenes(kinds=(torch.float32,), counting=3), st.floats(0.1, 0.9), st.floats(1e-4, 1e-2), st.floats(1, 100))
def test_watching_changes_nothing(scene, tau, lr, ratio):
    def steps(watched):
        torch.manual_seed(scene.seed)
        model = torch.nn.Sequential(PrototypeBank(2, scene.z.shape[-1], tau=tau))
        optimiser, losses = torch.optim.SGD(param_groups(model, lr, ratio)), []
        assert optimiser.param_groups[0]["lr"] != optimiser.param_groups[-1]["lr"] or len(optimiser.param_groups) == 1
        for _ in range(3):
            loss = bank_loss(model[0], scene.z, scene.mask)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss))
        return losses, banks(model)
    assume(scene.z.shape[1] >= 3)
    with _quiet():
        plain_losses, found = steps(None)
        bank = next(iter(found.values()))
        with watch(torch.nn.Sequential(bank), every=1) as signs:
            bank(scene.z, scene.mask)
    assert list(found) == ["0"] and len(plain_losses) == 3 and plain_losses == steps(None)[0] and len(signs.rows) == 1 and issubclass(StabilityWarning, UserWarning)
    gap = check_decomposition(bank, scene.z, scene.mask, bank.eval()(scene.z, scene.mask))
    assert gap < 1e-3


def _quiet():
    import warnings
    return warnings.catch_warnings(action="ignore")


# --- the clusterer, and what is built on it

OPTIONS = st.sampled_from([{"n_clusters": 3}, {"n_clusters": 3, "tau": 0.05}, {"n_clusters": 2, "n_prototypes": 5}, {"n_clusters": "auto"}])


def cloud(seed, n=60, m=3, K=3):
    random = np.random.default_rng(seed)
    return random.normal(size=(n, m)) + 8 * random.normal(size=(K, m))[random.integers(0, K, n)]


@covers("estimators.DDCLClusterer", "fitted.assign_rows", "examine.column_evidence")
@given(OPTIONS, st.integers(0, 10_000), st.sampled_from([2.0**-10, 2.0**12]), st.sampled_from([np.float64, np.float32]))
def test_a_clustering_is_of_the_points_and_the_seed(options, seed, c, kind):
    X, order = cloud(seed).astype(kind), np.random.default_rng(seed).permutation(60)
    fit = lambda X, **others: DDCLClusterer(**options, random_state=seed % 7).fit(X, **others)
    with _quiet():
        model, again, scaled, turned = fit(X), fit(X), fit(X * kind(c)), fit(X[order])
    np.testing.assert_array_equal(model.prototypes_, again.prototypes_)
    q = model.predict_proba(X)
    assert (q >= 0).all() and (q <= 1).all() and q.dtype == kind
    np.testing.assert_allclose(q.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(q.argmax(1), model.labels_)
    assert scaled.tau_ == pytest.approx(model.tau_, rel=1e-3) and scaled.inertia_ == pytest.approx(model.inertia_ * c**2, rel=1e-3)
    if turned.n_clusters_ != model.n_clusters_:  # numbers that last as long as each other, to the length of two steps
        lasted = estimators.persistence(*model.cooling_.T)
        assert options["n_clusters"] == "auto" and abs(lasted[model.n_clusters_] - lasted[turned.n_clusters_]) < 0.12
    elif options.get("tau") is None:
        assert turned.inertia_ == pytest.approx(model.inertia_, rel=0.1)
    label, probability, squared = fitted.assign_rows(model, X)
    np.testing.assert_allclose(probability, q.max(1), atol=1e-3)
    assert (q[np.arange(len(q)), label] > q.max(1) - 1e-5).all() and squared.sum() == pytest.approx(model.inertia_, rel=1e-3)
    evidence = examine.column_evidence(model, X[0])
    if len(model.prototypes_) == model.n_clusters_ > 1:
        two = np.sort(q[0].astype(float))[::-1][:2]
        assert evidence.sum() >= -1e-6 and (two[1] < 1e-6 or evidence.sum() == pytest.approx(math.log(two[0] / two[1]), rel=2e-2, abs=1e-2))


@covers("estimators.Stage", "estimators.persistence", "page.cooling_path", "page.fitted_stage", "page.Fitted", "page.shares", "page.signs", "page.parents", "page.largest_shares", "page.Kept")
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_stages_of_cooling(seed, K):
    X = cloud(seed)
    with _quiet():
        model = DDCLClusterer(K, random_state=0).fit(X)
    taus, counts = model.cooling_.T
    assert (np.diff(taus) < 0).all() and sum(estimators.persistence(taus, counts).values()) == pytest.approx(math.log(taus[0] / taus[-1]))
    z, path = model._units.reduce(X), page.cooling_path(model, X)
    stages = [*path, page.fitted_stage(model).stage]
    for stage in stages:
        q = page.shares(z, stage)
        near(q.sum(-1), torch.ones(60), 1e-9)
        kept = page.largest_shares(q)
        assert kept.counts.sum() == len(kept.which) == len(kept.much) and (kept.counts >= 1).all() and 0 <= kept.left_out < 0.02
    rows = page.signs(z, stages)
    assert [row["count"] for row in rows] == [len(s.prototypes) for s in stages] and all(-1e-9 <= row["entropy"] <= math.log(max(1, row["count"])) + 1e-6 for row in rows)
    for before, after in zip(stages, stages[1:]):
        found = page.parents(before.prototypes, after.prototypes)
        assert len(found) == len(after.prototypes) and set(found) <= set(range(len(before.prototypes)))
        assert len(after.prototypes) < len(before.prototypes) or set(found) == set(range(len(before.prototypes)))


@covers("page.map_axes", "page.planes", "page.Layout", "page.honesty")
@given(st.integers(0, 10_000), st.integers(1, 8), FACTORS)
def test_axes_of_the_map_are_orthonormal_and_know_no_unit(seed, m, c):
    gen = torch.Generator().manual_seed(seed)
    z, p, weights = torch.randn(30, m, generator=gen, dtype=torch.float64), torch.randn(4, m, generator=gen, dtype=torch.float64), torch.rand(4, generator=gen)
    axes = page.map_axes(z, p, weights)
    near(axes @ axes.mT, torch.eye(len(axes)), 1e-7)
    assert len(axes) >= min(2, m) and torch.equal(axes, page.map_axes(z, p, weights))
    near(page.map_axes(c * z, c * p, weights).abs(), axes.abs(), 1e-4)
    stage = estimators.Stage(0.5, p, torch.full((4,), 0.25), 1)
    for layout in page.planes(z, [stage], axes):
        assert layout.documents.shape == (30, 2) and layout.prototypes[0].shape == (4, 2)


@covers("page.standing_out", "page.characteristic_words", "page.nearest_examples")
@given(st.integers(0, 10_000), st.integers(1, 4), st.lists(st.text(max_size=40), min_size=12, max_size=12), FACTORS)
def test_what_stands_out_of_a_class(seed, K, texts, c):
    random = np.random.default_rng(seed)
    values, labels = random.normal(size=(12, 3)), random.integers(0, K, 12)
    found, scaled = (page.standing_out(x, labels, K) for x in (values, c * values))
    assert [[i for i, *_ in row] for row in found] == [[i for i, *_ in row] for row in scaled] and len(found) == K
    characteristic = page.characteristic_words(texts, labels, K)
    assert len(characteristic) == K and all(len(row) <= 8 for row in characteristic)


@covers("examine.stability_index", "examine.whole_words")
@given(st.lists(st.integers(0, 500), min_size=1, max_size=8), st.integers(2, 5), st.lists(st.tuples(st.sampled_from(["##a", "b", "Ġc", "▁d", "e"]), st.floats(-5, 5)), max_size=12))
def test_drift_and_words(counts, times, pieces):
    assume(sum(counts))
    counts = np.array(counts)
    assert 0 <= examine.stability_index(counts, times * counts) < 0.1 + 5 / counts.sum() and examine.stability_index(counts, counts) == 0
    joined = examine.whole_words([name for name, _ in pieces], [e for _, e in pieces])
    assert sum(row["nats"] for row in joined) == pytest.approx(sum(e for _, e in pieces), abs=1e-9) and not any("Ġ" in row["word"] or "▁" in row["word"] for row in joined)


@covers("fitted.Preparation", "fitted.sample_size")
@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([np.float64, np.float32]), st.integers(1, 10**6), st.integers(1, 1000))
def test_preparation_is_undone_and_samples_are_large_enough(seed, m, kind, width, P):
    random = np.random.default_rng(seed)
    reads = fitted.Preparation(tuple("abcde"[:m]), m, tuple(random.normal(size=m)), tuple(random.uniform(0.1, 9, m)))
    X = random.normal(size=(7, m)).astype(kind)
    assert reads.scaled(X).dtype == kind and not reads.text
    np.testing.assert_allclose(reads.in_units(reads.scaled(X)), X, rtol=1e-4, atol=1e-4)
    assert fitted.SAMPLE_PER_PROTOTYPE * P <= fitted.sample_size(width, P) <= max(fitted.SAMPLE_ROWS, fitted.SAMPLE_PER_PROTOTYPE * P)


# --- explain

@covers("explain.token_evidence", "explain.views", "explain.View", "explain.survey", "explain.Survey", "explain.Example", "explain.Corpus")
@given(scenes(kinds=(torch.float32,), counting=1), st.sampled_from([1, 2]), JUNK)
def test_evidence_and_surveys_add_up(scene, heads, junk):
    T, mask = scene.T, scene.keep.clone()
    mask[:, 0] = True
    z = scene.z
    evidence = explain.token_evidence(z, mask, scene.p, T)
    mean = masked_mean(z, mask)
    near(torch.softmax(evidence.sum(1), -1), assignments(mean, scene.p, T), 5e-3, 1)
    bank = PrototypeBank(len(scene.p), z.shape[-1], temperature=T).eval()
    with torch.no_grad():
        bank.prototypes.copy_(scene.p)
    found, = explain.views(bank, z, mask)
    near(found.shares.sum(-1), mask.float(), 1e-5)
    assert torch.isinf(found.squared[~mask]).all()
    known, = explain.survey(bank, explain.Corpus(z, mask))
    near(known.usage.sum(), torch.tensor(1.0), 1e-5)
    near(known.documents.sum(-1), torch.ones(len(z)), 1e-5)
    assert known.tokens == int(mask.sum()) == int(known.nearest.sum()) and all(e.distance >= 0 for row in known.examples for e in row)
    longer, longer_mask = padded(Scene(z, scene.p, T, mask, scene.scale, scene.seed), junk, 2)
    near(explain.survey(bank, explain.Corpus(longer, longer_mask))[0].documents, known.documents, 1e-4, 1)


@covers("explain.contributions", "explain.Contributions", "explain.logits_of", "explain.explain", "explain.Explanation", "explain.Reading")
@given(scenes(kinds=(torch.float32,), counting=1, scales=1), st.sampled_from([1, 2]), st.sampled_from(list(POOLS)), st.integers(2, 4))
def test_pieces_of_the_logits_add_up(scene, heads, pool, C):
    class Classifier(torch.nn.Module):
        def __init__(self, readout):
            super().__init__()
            self.readout, self.head = readout, torch.nn.Linear(readout.out_dim, C)
        def forward(self, z, mask=None):
            return self.head(self.readout(z, mask).output)
    mask = scene.keep.clone()
    mask[:, 0] = True
    model = Classifier(layer(pool, scene, heads, 0)).eval()
    found = explain.contributions(model, scene.z, mask)
    near(found.base + found.by_token.sum(1), found.logits, 1e-3, 1)
    near(found.by_prototype.sum((1, 2)), found.by_token.sum(1), 1e-4, 1)
    assert explain.logits_of(model(scene.z, mask)).shape == (len(scene.z), C) and (found.by_token[~mask] == 0).all()
    explained = explain.explain(model, scene.z, mask)
    assert len(explained.readings) == heads if hasattr(explained, "readings") else explained is not None


@covers("explain.matched_cosine", "explain.bank_agreement", "explain.word_scores")
@given(scenes(kinds=(torch.float64,)), FACTORS)
def test_agreement_of_banks_and_scores_of_words(scene, c):
    gen = scene.generator()
    a = torch.randn(4, 6, generator=gen, dtype=torch.float64)
    order = torch.randperm(4, generator=gen)
    assert explain.matched_cosine(a, a[order]) == pytest.approx(1) and explain.matched_cosine(c * a, c * a[order]) == pytest.approx(1)
    b = torch.randn(4, 6, generator=gen, dtype=torch.float64)
    assert -1 <= explain.matched_cosine(a, b) <= 1 and explain.matched_cosine(a, b) == pytest.approx(explain.matched_cosine(b[order], a))
    row, = explain.bank_agreement([a, a[order]], repeats=2)
    assert row["cosine"] == pytest.approx(1) and row["excess"] == pytest.approx(1)
    counts = torch.rand(9, 3, generator=gen) * 20 * (torch.rand(9, 1, generator=gen) < 0.8)
    scores, rows = explain.word_scores(counts), torch.randperm(9, generator=gen)
    near(explain.word_scores(counts[rows]), scores[rows], 1e-6, 1)
    near(explain.word_scores(counts[:, [2, 0, 1]]), scores[:, [2, 0, 1]], 1e-6, 1)
    assert (scores[counts.sum(1) == 0] == 0).all()


# --- encoders, data, files

@covers("encoders.masked_mean", "encoders.TokenEmbeddings")
@given(scenes(), JUNK, st.integers(1, 5))
def test_means_of_tokens(scene, junk, size):
    clean = without_padding(scene.z, scene.keep)
    mean = masked_mean(clean, scene.keep)
    near(mean, clean.sum(1) / scene.keep.sum(1, keepdim=True).clamp_min(1), 1e-5, scene.scale)
    held = TokenEmbeddings(clean, scene.keep)
    near(held.mean(), mean.float(), 1e-5, scene.scale)
    rows = torch.cat([rows for rows, _, _ in held.batches(size, shuffle=True, seed=scene.seed % 100)])
    assert sorted(rows.tolist()) == list(range(len(held))) and torch.equal(held[[0]].embeddings, clean[:1])


@covers("encoders.like_lengths", "encoders.cache_key")
@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(1, 8), st.lists(st.text(max_size=9), min_size=1, max_size=6), st.integers(0, 9))
def test_batches_hold_each_text_once_and_keys_tell_texts_apart(lengths, size, texts, setting):
    batches = like_lengths(lengths, size)
    assert sorted(np.concatenate(batches) if batches else []) == [i for i, n in enumerate(lengths) if n] and all(len(b) <= size for b in batches)
    assert cache_key(texts, setting) == cache_key(list(texts), setting) != cache_key(texts, setting + 1)
    assert len(texts) < 2 or cache_key(texts) != cache_key([texts[0] + texts[1], *texts[2:]])


@covers("data.DataSet", "data.take", "data.sample", "data.class_sizes", "data.synthetic_orbits", "data.true_orbits", "data.measured_orbits", "data.period_minutes", "data.regimes")
@given(st.integers(1, 30), st.integers(1, 150), st.integers(0, 1000), st.floats(0, 3))
def test_data_sets_are_drawn_by_their_seed(n, size, seed, noise):
    data = synthetic_orbits(n, noise, seed)
    assert len(data) == 4 * n and set(class_sizes(data).values()) == {n}
    np.testing.assert_array_equal(data.inputs, synthetic_orbits(n, noise, seed).inputs)
    part = sample(data, size, seed)
    assert len(part) == min(size, 4 * n) and isinstance(part, DataSet) and sum(class_sizes(part).values()) == len(part)
    np.testing.assert_array_equal(take(data, range(len(data))[::-1]).inputs, data.inputs[::-1])
    a, e, i = true_orbits("LEO", n, np.random.default_rng(seed))
    perigee, apogee = a * (1 - e) - EARTH_RADIUS, a * (1 + e) - EARTH_RADIUS
    assert (regimes(perigee + 1e-6, apogee - 1e-6, i) == 0).all() and (perigee > 200 - 1e-6).all()
    np.testing.assert_allclose(period_minutes(4 * a), 8 * period_minutes(a))
    assert np.isfinite(measured_orbits("GEO", n, noise, np.random.default_rng(seed))).all()


@covers("data.strip_newsgroup_post")
@given(st.text(max_size=300))
def test_any_post_is_stripped(text):
    found = strip_newsgroup_post(text)
    assert isinstance(found, str) and len(found) <= len(text)


@covers("storage.save_state", "storage.load_state", "storage.write_text", "storage.atomic", "storage.StateError")
@given(st.dictionaries(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=8), st.lists(st.floats(allow_nan=False), max_size=5), max_size=4),
       st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.integers(-2**60, 2**60) | st.text(max_size=20), max_size=4), KINDS, st.text(max_size=80))
def test_states_come_back_as_they_were_and_are_the_same_bytes(tmp_path_factory, tensors, meta, kind, text):
    folder = tmp_path_factory.mktemp("state")
    tensors = {name: torch.tensor(values, dtype=kind) for name, values in tensors.items()}
    path = storage.save_state(folder / "a.safetensors", tensors, meta)
    found, facts = storage.load_state(path)
    assert facts == meta and set(found) == set(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert path.read_bytes() == storage.save_state(folder / "b.safetensors", dict(reversed(tensors.items())), meta).read_bytes()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(storage.StateError, match="a.safetensors"):
        storage.load_state(path)
    clean = text.encode("utf-8", "ignore").decode()
    assert storage.write_text(folder / "t.txt", clean).read_bytes() == clean.encode() and len(list(folder.iterdir())) == 3


@covers("sources.checked_encoding")
@given(st.text(max_size=12) | st.sampled_from(["utf-8", "UTF8", "cp1252", "latin-1", "rot13", "base64", "idna", "undefined"]))
def test_an_encoding_has_a_name_or_an_error(name):
    from ddcl_nb.sources import BadChoice
    try:
        found = checked_encoding(name)
        assert found is None or checked_encoding(found) == found
    except BadChoice as error:
        assert "\n" not in str(error).replace("\\n", "") and "--encoding" in str(error)


ROWS = st.lists(st.fixed_dictionaries({"seed": st.integers(0, 9), "acc": st.floats(0, 1), "data": st.sampled_from(["a", "b"])}), max_size=8)


@covers("experiments.registry.Result", "experiments.registry.read_result", "experiments.registry.spread", "experiments.registry.with_spread", "experiments.registry.Log", "experiments.registry.check_profile")
@given(ROWS, st.text(max_size=20), SEEDS)
def test_results_come_back_and_summaries_do_not_depend_on_order(tmp_path_factory, rows, note, seed):
    folder = tmp_path_factory.mktemp("results")
    note = note.encode("utf-8", "ignore").decode()
    result = Result("toy", check_profile("quick"), rows, {"note": note})
    result.write(folder)
    assert read_result(folder / "quick" / "toy.json") == result
    order = np.random.default_rng(seed).permutation(len(rows))
    turned = Result("toy", "quick", [rows[i] for i in order])
    by = lambda r: {line["data"]: line for line in r.summary(["data"], ["acc"])}
    for name, line in by(result).items():
        assert by(turned)[name]["acc"] == pytest.approx(line["acc"]) and with_spread(line["acc"]).count("±") == 1
    values = [row["acc"] for row in rows]
    assert spread(values) is None or spread(values)[0] == pytest.approx(np.mean(values))
    log, again = (Log("toy", "quick", folder, {"note": note}) for _ in range(2))
    log.row(lambda: {"acc": np.float64(0.5)}, seed=1)
    assert Log("toy", "quick", folder, {"note": note}).rows == log.rows and Log("toy", "quick", folder, {"note": note + "!"}).rows == [] and again.rows == []


# --- words, pages, command line

TEXTS = st.text(max_size=60)


@covers("report.Html", "report.tag", "report.joined", "report.number", "report.with_deviation", "report.largest", "report.best", "report.better", "report.label", "report.pairs", "page.script_json")
@given(TEXTS, st.floats(allow_nan=False, allow_infinity=False), st.lists(st.none() | st.floats(0, 1) | st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=4), st.sampled_from(["acc", "seconds", "nonsense"]))
def test_words_of_others_are_never_markup(text, value, values, measure):
    element = report.tag("p", text, report.tag("b", text), title=text)
    assert isinstance(element, report.Html) and element.count("<") == 4 and report.joined([text]).count("<") == 0 and report.pairs({"a": text}).count("<script") == 0
    assert "<" not in page.script_json([text]) and json.loads(page.script_json([text])) == [text]
    assert report.number(None) == "–" and re.fullmatch(r"-?[\d,.]+(e[+-]?\d+)?", report.number(value).replace("−", "-"))
    named = dict(zip("abcd", values))
    assert report.best(named, 1) <= set(named) and report.better(measure) in (-1, 0, 1) and isinstance(report.label(measure), str)
    assert report.largest(values) is None or report.largest(values) >= 0
    for entry in values:
        assert isinstance(report.with_deviation(entry), str)


@covers("cli.seeds_of", "cli.clusters_asked", "cli.plain", "cli.heat", "cli.words")
@given(st.text(max_size=30) | st.sampled_from(["3", "0,1,2", "auto", "-1", "1,1", "٣", "²"]), st.integers(2, 30), st.lists(st.tuples(st.text(max_size=6), st.floats(-9, 9)), max_size=5))
def test_what_is_typed_is_understood_or_refused(text, width, pieces):
    import typer
    for read in (seeds_of, clusters_asked):
        try:
            found = read(text)
            assert found == "auto" or isinstance(found, int) and found > 0 or isinstance(found, list) and found and min(found) >= 0
        except typer.Exit as refused:
            assert refused.exit_code == 2
    line = plain(text, width)
    assert len(line) <= width and all(c.isprintable() for c in line) and plain(line, width) == line
    assert "\n" not in words(ValueError(text)) and all(c.isprintable() for c in heat([{"word": w, "nats": e} for w, e in pieces]).plain)


@covers("plots.palette", "plots.plane")
@given(st.integers(1, 40), st.integers(1, 5), SEEDS)
def test_colours_and_planes(n, m, seed):
    from ddcl_nb import plots
    colours = plots.palette(n)
    assert colours.shape == (n, 3) and (0 <= colours).all() and (colours <= 1).all() and len(np.unique(colours.round(6), axis=0)) == n
    X = np.random.default_rng(seed).normal(size=(9, m))
    a, b = plots.plane(X, X[:3])
    assert a.shape == (9, 2) and np.allclose(a[:3], b)


@covers("progress.progress", "extras.require")
@given(st.integers(0, 50), st.text(max_size=20), st.sampled_from(["no_such_package", "no_such_package.part"]))
def test_bars_count_and_absent_extras_are_named(total, label, module):
    import io

    from rich.console import Console

    from ddcl_nb.extras import require
    with progress(label, total, show=True, console=Console(file=io.StringIO())) as advance:
        for _ in range(min(total, 5)):
            advance(1, label)
    with pytest.raises(ImportError, match=r"no_such_package is not installed .*ddcl_nb\[text\]"):
        require(module, "text")
    assert require("json", "text") is json


# --- adapters

@covers("adapters.unexplained", "adapters.prototype_terms", "adapters.read", "adapters.Reading", "adapters.positions", "adapters.token_mask", "adapters.padded_features")
@given(scenes(kinds=(torch.float32,), counting=2, scales=1), st.sampled_from([1, 2]), st.sampled_from(list(POOLS)), JUNK)
def test_readouts_of_adapters(scene, heads, pool, junk):
    readout = layer(pool, scene, heads, 1)
    read = adapters.read(readout, scene.z, scene.keep)
    near(read.shares.sum(-1), (scene.keep[:, None] if heads > 1 else scene.keep).expand(read.shares.shape[:-1]).float(), 1e-5)
    near(read.summary, readout(scene.z, scene.keep).output, 1e-5, 1)
    share = adapters.unexplained(readout.bank, read.tokens, scene.keep, read.assignment)
    assert float(share) >= 0 and float(adapters.prototype_terms(readout.bank, read.tokens, scene.keep, read.assignment, 2.0, {})) == pytest.approx(2 * float(share), rel=1e-4)
    places = adapters.positions(scene.keep)
    assert (places >= 0).all() and all(places[b][scene.keep[b]].tolist() == list(range(int(scene.keep[b].sum()))) for b in range(len(places)))
    assert adapters.token_mask(None, scene.z) is None and torch.equal(adapters.token_mask(scene.keep.long(), scene.z), scene.keep)
    tokens, mask = adapters.padded_features({"token_embeddings": scene.z, "attention_mask": scene.keep.long()})
    assert torch.equal(mask, scene.keep) and torch.equal(tokens, scene.z)


SETTINGS = {"n_prototypes": 8, "n_heads": 2, "proto_dim": None, "pool": "residual", "grad": "full", "tau": 0.1, "prototype_temperature": None, "prototype_weight": 0.1, "dropout": 0.0}


@covers("adapters.check_settings", "adapters.refuse_code")
@given(st.sampled_from(list(SETTINGS)), st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2))
def test_settings_are_taken_or_named(name, value):
    adapters.check_settings(SETTINGS)
    try:
        adapters.check_settings(SETTINGS | {name: value})
    except ValueError as error:
        assert name in str(error) and "\n" not in str(error)
    adapters.refuse_code({"auto_map": {}, name: value})
    with pytest.raises(ValueError, match="config names code .auto_map: "):
        adapters.refuse_code({name: value, "encoder": {"auto_map": {"a": "b"}}})


@covers("adapters.DDCLPooling")
@given(scenes(kinds=(torch.float32,), counting=1, scales=1), st.sampled_from(list(POOLS)), st.sampled_from([0.0, 1e4, math.nan]), SEEDS)
def test_pooling_knows_no_padding(scene, pool, junk, seed):
    torch.manual_seed(seed % 1000)
    pooling = adapters.DDCLPooling(scene.z.shape[-1], 3, pool, temperature=scene.T).eval()
    read = lambda z, mask: pooling({"token_embeddings": z, "attention_mask": mask.long()})["sentence_embedding"]
    out = read(scene.z, scene.keep)
    assert out.shape == (len(scene.z), pooling.get_embedding_dimension())
    near(read(*padded(scene, junk, 2)), out, 2e-3, 1)


@covers("training.fit", "training.FitResult", "training.TensorBatches", "training.Diagnostics", "training.Plan", "training.initialise")
@given(st.integers(0, 1000), st.floats(0.1, 0.9), st.sampled_from([2, 5]))
def test_training_is_decided_by_its_seed(seed, tau, batch_size):
    z = torch.randn(12, 3, 4, generator=torch.Generator().manual_seed(seed))

    def run(seed):
        torch.manual_seed(0)
        model = PrototypeBank(3, 4, tau=tau)
        result = fit(model, TensorBatches((z,), batch_size), epochs=2, seed=seed)
        return model.prototypes.detach(), result
    (one, result), (again, _) = run(seed), run(seed)
    assert torch.equal(one, again) and one.isfinite().all() and len(result.history) == 2
    for row in result.history:
        assert row["loss"] == pytest.approx(row["recon"] + row["variance"], rel=1e-3) and row["separation_min"] <= row["separation_mean"] * 1.001


# --- every public name has a property, or a reason

WITHOUT = {
    "a whole study: its numbers are kept in results/, its parts are lessons of its notebook": {"experiments": ["*"]},
    "what a study is made of, or where it was made; test_cli, test_report": {"experiments.registry": ["Experiment", "experiments", "provenance", "plain_columns", "stored_results"]},
    "records of claims; properties in test_claims": {"experiments.claims": ["Claim", "Evidence", "verdict", "conditions", "Record", "read_evidence", "anchor", "ledger", "ledger_table", "ledger_details"]},
    "commands, and what they print; run as people run them in test_cli, test_cli_fit and test_faults": {"cli": [
        "ddcl_command", "main", "fail", "one_line", "show", "get_data", "data_command", "chosen", "checked_profile", "writable", "data_of", "data_line", "say_data", "Reproduction", "finished", "note_finished",
        "forget", "left_over", "run_one", "run_all", "with_earlier", "list_experiments", "say_comparison", "interruptible", "carry_out", "reproduce_command", "bench_one", "bench_command", "telling", "example_words", "nearest_to_prototypes",
        "say_clusters", "fit_facts", "fit_command", "predict_command", "the_row", "say_why", "say_evidence", "explain_command", "doctor_command", "counted", "say_examination"]},
    "reads or fetches one published data set, or finds it on this machine; test_data": {"data": [
        "DataNotFound", "DataUnreadable", "DownloadFailed", "cache_folder", "data_folders", "locate", "found_in", "fetch", "hub_url", "reading", "read_bytes", "fetched", "read_lines", "read_parquet", "write_gzip",
        "write_parquet", "Entry", "register", "obtain", "one_of", "load_space_catalogue", "load_digits", "docstrings", "docstring_corpus", "load_20newsgroups", "load_sst2", "load_imdb", "load_mnist", "load_cifar10",
        "load_splice", "load_ecg5000", "load_modelnet10", "load_wikitext2", "load_tinyshakespeare", "load_aeslc", "load_scitldr", "whereabouts", "list_data", "download_data"]},
    "runs a pretrained model, or keeps what one gave; small real ones in test_encoders": {"encoders": ["ModelNotLoaded", "offline_model", "load_transformer", "fingerprint", "token_limit", "token_ids", "embed_ids", "readable", "join_shards", "encode_to_disk", "Encoder"]},
    "a model of transformers or sentence-transformers, or a part of their trainers; real ones in test_adapters": {"adapters": [
        "DDCLConfig", "build_encoder", "load_encoder", "counts_positions", "DDCLModelOutput", "DDCLPreTrainedModel", "DDCLModel", "DDCLForSequenceClassification", "init_prototypes", "two_rate_optimizer",
        "TemperatureCallback", "PrototypeLoss", "load_sentence_transformer", "PatchTokens"]},
    "files, folders and processes; mutated, killed and crowded in test_fitted, test_sources (with properties of their own) and test_faults": {
        "fitted": ["Embedder", "FitPlan", "refine", "InUse", "workplace", "put_in_place", "check_out", "Training", "FittedModel", "vectors_of", "write_assignments", "fit_model", "write_report"],
        "sources": ["SourceError", "BadChoice", "Block", "Source", "open_source", "Reservoir"]},
    "speaks of a saved model; test_cli_fit": {"examine": ["explain_row", "nearest_examples", "curvature", "examine"]},
    "measures a trained classifier, or tells of it; beside slow loops in test_explain": {"explain": ["Card", "prototype_cards", "training_story", "token_scores", "Faithfulness", "faithfulness", "sufficiency"]},
    "draws a picture; looked at in its notebook, and drawn in test_explain": {"explain": ["draw_curves", "draw_tokens", "draw_cards"], "plots": ["use_style", "axes", "bank", "clusters", "history", "training_curves", "bars"]},
    "a part of a page; in a browser in test_page and test_report": {
        "page": ["neighbours", "training_lines", "Sample", "page_data", "write_model_page"],
        "report": ["n_seeds", "title", "comparison", "headlines", "mark", "key", "strip", "summary_table", "table_box", "table", "circumstances", "keys_and_measures", "methods_table", "methods", "seeds_table", "figure", "figures",
                   "section", "page", "overview", "write_report"]},
    "what the processes of one run share; two real processes against one in test_distributed": {
        "bank": ["following_together"], "training": ["OwnRows", "OwnBatches", "read_together", "Mean", "terms_of", "add_gradients", "same_start", "following", "same_run", "refuse_sharded"]},
    "what anchors an encoder while it trains, or stops it; test_training": {"training": ["Seen", "Anchored", "anchor_settings", "NonFiniteLoss"]},
}

TESTED_WHOLE = {"baselines", "benchmark", "centroid", "costs", "distributed", "gpu", "hierarchy", "kernels", "kmeans", "sharded", "topk", "tree"}
"Modules, where they are there, that are held beside slow loops, properties included, by test files that import them."


def public_names():
    "`module.name` of every public function and class, where it is defined."
    for found in pkgutil.walk_packages(ddcl_nb.__path__, "ddcl_nb."):
        if not found.ispkg and not found.name.rpartition(".")[2].startswith("_"):
            module = importlib.import_module(found.name)
            yield from (f"{found.name.removeprefix('ddcl_nb.')}.{name}" for name in module.__all__
                        if (inspect.isclass(value := getattr(module, name)) or inspect.isfunction(value)) and value.__module__ == found.name)


def test_every_public_name_has_a_property_or_a_reason():
    excused = {f"{module}.{name}" for group in WITHOUT.values() for module, names in group.items() for name in names}
    names = list(public_names())
    study = lambda name: "experiments.*" in excused and name.startswith("experiments.") and name.split(".")[1] not in ("registry", "claims")
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    whole = {module for module in TESTED_WHOLE if re.search(rf"ddcl_nb\.{module}\b|from ddcl_nb import [\w, ]*\b{module}\b", tests)}
    bare = [name for name in names if name not in COVERED | excused and not study(name) and name.split(".")[0] not in whole]
    assert not bare, f"give these a property (@covers) or a reason (WITHOUT) in tests/test_properties.py: {', '.join(bare)}"
    gone = sorted((COVERED | excused) - set(names) - {"experiments.*"})
    assert not gone, f"these are covered or excused, and do not exist: {', '.join(gone)}"
    assert not COVERED & excused and {f"test_{name}" for group in WITHOUT for name in re.findall(r"test_(\w+)", group)} <= {path.stem for path in Path(__file__).parent.glob("test_*.py")}
