"Layers against their formulas, under padding, mixed precision and unsuitable arguments."
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from ddcl_nb.layers import (DDCLAttention, DDCLReadout, GatedDDCL, PrototypeBottleneck, PrototypeFFN, PrototypeNorm, SerialDDCL)

KEEP = torch.arange(7) < torch.tensor([[7], [4], [0]])
LAYERS = {
    "attention": lambda: DDCLAttention(6, 4),
    "heads": lambda: DDCLAttention(6, 4, n_heads=2, proto_dim=8),
    "histogram": lambda: DDCLReadout(6, 4),
    "centroid": lambda: DDCLReadout(6, 4, pool="centroid", n_heads=2),
    "residual": lambda: DDCLReadout(6, 4, pool="residual"),
    "bottleneck": lambda: PrototypeBottleneck(6, 4),
    "ffn": lambda: PrototypeFFN(6, 4, proto_dim=9),
    "norm": lambda: PrototypeNorm(6, 4),
    "serial": lambda: SerialDDCL(nn.Linear(6, 6), 6, 4),
    "gated": lambda: GatedDDCL(nn.Linear(6, 6), 6, 4),
}


def seeded(name):
    torch.manual_seed(0)
    return LAYERS[name]()


def counted(output):
    "What a caller reads: summaries whole, token outputs where they count."
    return output if output.dim() == 2 else output[KEEP]


@pytest.mark.parametrize("junk", [1e4, float("nan")])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_padding_changes_neither_outputs_nor_gradients(name, training, junk):
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))
    results = []
    for tokens in (x.masked_fill(~KEEP[..., None], 0), x.masked_fill(~KEEP[..., None], junk)):
        layer = seeded(name).train(training)
        out = layer(tokens, mask=KEEP)
        (counted(out.output).square().sum() + out.loss).backward()
        results.append([counted(out.output), out.loss, *(p.grad for p in layer.parameters())])
    for clean, padded in zip(*results):
        torch.testing.assert_close(padded, clean)


@pytest.mark.parametrize("name", LAYERS)
def test_training_under_autocast(name):
    layer = seeded(name)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            out = layer(torch.randn(3, 7, 6), mask=KEEP)
    (counted(out.output).float().square().sum() + out.loss).backward()
    assert out.loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_model_in_one_precision_answers_in_it_and_reaches_every_parameter(name, dtype):
    layer = seeded(name).to(dtype)
    out = layer(torch.randn(3, 7, 6).to(dtype), mask=KEEP)
    (counted(out.output).square().sum() + out.loss).backward()
    assert out.output.dtype == dtype
    for parameter_name, p in layer.named_parameters():
        assert p.grad.isfinite().all() and p.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("unsuitable", [dict(n_heads=2), dict(proto_dim=8)])
def test_a_norm_has_one_head_of_full_width(unsuitable):
    with pytest.raises((TypeError, ValueError), match=next(iter(unsuitable))):
        PrototypeNorm(6, 4, **unsuitable)


@pytest.mark.parametrize("pool", ["histogram", "centroid", "residual"])
def test_readouts_far_from_the_origin_keep_their_digits(pool):
    torch.manual_seed(0)
    x = torch.randn(2, 50, 6) + 1e4
    near = DDCLReadout(6, 4, pool=pool).init_from(x).eval()
    exact = DDCLReadout(6, 4, pool=pool).double().eval()
    exact.load_state_dict(near.state_dict())
    torch.testing.assert_close(near(x).output.double(), exact(x.double()).output, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_no_tokens(name):
    out = seeded(name).eval()(torch.zeros(2, 0, 6))
    assert out.loss == 0 and out.output.isfinite().all()


# --- readouts against their formulas

def summary_by_loops(layer, tokens, keep):
    "The summary of each sequence, one token, head and prototype at a time, in float64."
    rows = []
    for b in range(len(tokens)):
        z = [(layer.project_in(tokens[b, n]) if keep[b, n] else None) for n in range(tokens.shape[1])]
        heads = [pooled_by_loops(layer, [t.chunk(layer.n_heads)[h].double() for t in z if t is not None], h) for h in range(layer.n_heads)]
        row = torch.cat(heads)
        rows.append(row / row.norm().clamp_min(1e-12) if layer.pool == "residual" else row)
    return torch.stack(rows)


def pooled_by_loops(layer, tokens, h):
    "One head of one sequence."
    P = layer.bank.prototypes.double().reshape(layer.n_heads, layer.bank.n_prototypes, -1)[h]
    T = float(layer.bank.temperature.reshape(-1)[h])
    q = [torch.softmax(torch.stack([-(z - p).square().sum() / T for p in P]), 0) for z in tokens]
    if layer.pool == "histogram":
        return sum(q, torch.zeros(len(P)).double()) / max(1, len(tokens))
    if layer.pool == "centroid":
        return sum((w @ P for w in q), torch.zeros(P.shape[1]).double()) / max(1, len(tokens))
    pulls = [sum((w[k] * (z - P[k]) for w, z in zip(q, tokens)), torch.zeros(P.shape[1]).double()) for k in range(len(P))]
    return torch.cat([v / v.norm().clamp_min(1e-12) for v in pulls])


@pytest.mark.parametrize("n_heads, proto_dim", [(1, None), (1, 9), (2, None), (3, 9)])
@pytest.mark.parametrize("pool", ["histogram", "centroid", "residual"])
def test_readouts_are_their_formulas(pool, n_heads, proto_dim):
    torch.manual_seed(0)
    layer = DDCLReadout(6, 4, pool=pool, n_heads=n_heads, proto_dim=proto_dim, temperature=1.5).eval()
    x = torch.randn(3, 7, 6)
    found = layer(x, KEEP).output
    assert found.shape == (3, layer.out_dim)
    torch.testing.assert_close(found.double(), summary_by_loops(layer, x, KEEP), rtol=1e-4, atol=1e-5)
    assert found[2].eq(0).all()


def test_summaries_have_the_norm_they_promise():
    x = torch.randn(3, 7, 6)
    histogram, residual = (DDCLReadout(6, 4, pool=pool, n_heads=2)(x, KEEP).output for pool in ("histogram", "residual"))
    torch.testing.assert_close(histogram[:2].sum(-1), torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(residual.norm(dim=-1), torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("pool", ["histogram", "centroid", "residual"])
def test_the_order_of_tokens_does_not_matter(pool):
    torch.manual_seed(0)
    layer, x = DDCLReadout(6, 4, pool=pool).eval().init_from(torch.randn(50, 6)), torch.randn(2, 7, 6)
    torch.testing.assert_close(layer(x[:, torch.randperm(7)]).output, layer(x).output)


def test_unsuitable_readouts_are_named():
    with pytest.raises(ValueError, match="pool must be one of .* got 'mean'"):
        DDCLReadout(6, 4, pool="mean")
    with pytest.raises(ValueError, match=r"tokens must be \(B, N, 6\), got \(7, 6\)"):
        DDCLReadout(6, 4)(torch.randn(7, 6))


# --- attention, bottleneck, norm and placements against their formulas

def soft_centroids(layer, x):
    "`[zbar^1; ...; zbar^H]` from the definition."
    P, T = layer.bank.prototypes, layer.bank.temperature.reshape(-1)
    P = P.reshape(layer.n_heads, *P.shape[-2:])
    parts = layer.project_in(x).chunk(layer.n_heads, -1)
    return torch.cat([torch.softmax(-torch.cdist(z, p).square() / t, -1) @ p for z, p, t in zip(parts, P, T)], -1)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("n_heads", [1, 2])
def test_attention_is_its_formula(n_heads, residual):
    torch.manual_seed(0)
    layer, x = DDCLAttention(6, 4, n_heads=n_heads, proto_dim=8, residual=residual, temperature=2.0).eval(), torch.randn(3, 7, 6)
    expected = soft_centroids(layer, x) @ layer.project_out.weight.T
    torch.testing.assert_close(layer(x).output, expected + x if residual else expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_a_mean_over_tokens_that_count_and_a_sum_over_heads():
    torch.manual_seed(0)
    layer, x = DDCLAttention(6, 4, n_heads=2, proto_dim=8).eval().init_from(torch.randn(50, 6)), torch.randn(3, 7, 6)
    out = layer(x, KEEP)
    torch.testing.assert_close(out.loss, torch.stack([out.assignment.loss[:, h][KEEP].mean() for h in range(2)]).sum())


@pytest.mark.parametrize("make", [lambda: DDCLAttention(6, 4, n_heads=2, temperature=2.0), lambda: DDCLReadout(6, 4, n_heads=2, temperature=2.0)])
def test_heads_are_independent(make):
    torch.manual_seed(0)
    layer = make().eval()
    nn.init.eye_(layer.project_in.weight)
    x = torch.randn(2, 7, 6)
    before = layer(x).assignment
    layer.bank.prototypes.data[1] += 1
    x[..., 3:] -= 1
    after = layer(x).assignment
    for name in ("centroids", "loss", "entropy", "indices"):
        one, other = getattr(before, name), getattr(after, name)
        assert one[:, 0].equal(other[:, 0]) and not one[:, 1].equal(other[:, 1]), name


@pytest.mark.parametrize("n_heads", [1, 2])
def test_a_cold_bottleneck_decodes_its_own_indices(n_heads):
    torch.manual_seed(0)
    layer, x = PrototypeBottleneck(6, 4, n_heads=n_heads, proto_dim=8, temperature=1e-6).eval(), torch.randn(3, 7, 6)
    indices = layer.encode(x, KEEP)
    decoded = layer.decode(indices)
    torch.testing.assert_close(decoded[KEEP], layer(x, KEEP).output[KEEP])
    assert decoded[~KEEP].eq(0).all() and layer.bits == 2 * n_heads


def test_a_norm_is_its_formula():
    torch.manual_seed(0)
    layer, x = PrototypeNorm(6, 4, temperature=2.0).eval(), torch.randn(3, 7, 6)
    layer.gain.data.normal_(), layer.bias.data.normal_()
    offset = x - soft_centroids(layer, x)
    expected = offset / (offset.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.gain + layer.bias
    torch.testing.assert_close(layer(x).output, expected, rtol=1e-4, atol=1e-5)


class Tuple(nn.Module):
    "A block in the manner of many libraries: a tuple, and an argument of its own."

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x, scale=1.0):
        return scale * self.inner(x), None


@pytest.mark.parametrize("placement", [SerialDDCL, GatedDDCL])
def test_placements_are_their_formulas(placement):
    torch.manual_seed(0)
    layer, x = placement(Tuple(), 6, 4, temperature=2.0).eval(), torch.randn(3, 7, 6)
    block = 0.5 * layer.block.inner(x)
    if placement is SerialDDCL:
        expected = layer.ddcl(block).output
    else:
        layer.gate.weight.data.normal_()
        g = torch.sigmoid(layer.gate(x))
        expected = g * block + (1 - g) * layer.ddcl(x).output
    torch.testing.assert_close(layer(x, scale=0.5).output, expected)


# --- training and evaluation

@pytest.mark.parametrize("name", LAYERS)
def test_training_follows_the_tokens_and_evaluation_does_not(name):
    layer, x = seeded(name), torch.randn(3, 7, 6)
    bank = next(m for m in layer.modules() if hasattr(m, "critical"))
    layer.train()(x, mask=KEEP)
    assert bank.calibrated
    after = bank.critical.clone()
    layer.eval()(5 * x, mask=KEEP)
    assert bank.critical.equal(after)
    layer.train()(5 * x, mask=KEEP)
    assert not bank.critical.equal(after)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_survives_its_state_dict(name):
    layer, x = seeded(name), torch.randn(3, 7, 6)
    layer(x)
    other = LAYERS[name]()
    other.load_state_dict(layer.state_dict())
    assert other.eval()(x).output.equal(layer.eval()(x).output)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tokens, error", [(torch.ones(3, 7, 6, dtype=torch.int64), TypeError), (torch.randn(3, 7, 5), (ValueError, RuntimeError)),
                                           (torch.full((3, 7, 6), float("nan")), ValueError)])
def test_bad_tokens_are_refused(name, tokens, error):
    if name in ("serial", "gated") and not tokens.is_floating_point():
        error = (TypeError, RuntimeError)  # the block speaks first
    with pytest.raises(error):
        seeded(name)(tokens)


@pytest.mark.parametrize("unsuitable, message", [(dict(dim=0), "dim must be a positive integer, got 0"), (dict(proto_dim=-2), "proto_dim must be a positive integer, got -2"),
                                                 (dict(proto_dim=0), "proto_dim must be a positive integer, got 0"), (dict(grad="half"), "grad must be one of")])
def test_unsuitable_arguments_are_named(unsuitable, message):
    with pytest.raises(ValueError, match=message):
        DDCLAttention(**(dict(dim=6, n_prototypes=4) | unsuitable))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pool", ["histogram", "centroid", "residual"])
def test_prototypes_that_no_token_is_near_leave_gradients_finite(pool, dtype):
    torch.manual_seed(0)
    readout, x = DDCLReadout(4, 6, pool=pool, temperature=0.05).to(dtype), torch.randn(3, 7, 4, dtype=dtype)
    far = torch.tensor([0.0, 0.5, 1.5, 2.0, 3.0, 30.0])[:, None]
    readout.bank.prototypes.data[:] = x[0, :1] + far
    keep = torch.arange(7) < torch.tensor([[7], [2], [0]])
    out = readout(x.requires_grad_(), keep)
    (out.output.square() * torch.randn(out.output.shape, dtype=dtype)).sum().backward()
    assert x.grad.isfinite().all() and readout.bank.prototypes.grad.isfinite().all()


@pytest.mark.parametrize("kind", [DDCLAttention, DDCLReadout, PrototypeFFN, PrototypeNorm, PrototypeBottleneck])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_by_sequence_through_torch_func(kind, training):
    layer, z = kind(8, 4).double().train(training), torch.randn(3, 6, 8, dtype=torch.float64)
    layer.init_from(z)
    weights, buffers = dict(layer.named_parameters()), {name: x.clone() for name, x in layer.named_buffers()}
    energy = lambda weights, z: functional_call(layer, weights, z)[0].square().sum()
    by_sequence = vmap(grad(energy), (None, 0))(weights, z[:, None])
    whole = grad(energy)(weights, z)
    assert all(x.equal(buffers[name]) for name, x in layer.named_buffers())  # nothing was followed
    layer.eval()
    energy(weights, z).backward()
    for name, weight in layer.named_parameters():
        torch.testing.assert_close(by_sequence[name].sum(0), whole[name])
        torch.testing.assert_close(whole[name], weight.grad)
