"Centroid attention against loops, and under padding, permutation, mixed precision, export and memory limits."
import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ddcl_nb.centroid as module
from ddcl_nb.centroid import (SIMILARITY, SOFTMAX, STARTS, CentroidAttention, CentroidBlock, CentroidTransformer, EncoderBlock, attend,
                              attention_maps, compete, energy, start_centroids, tie)

KEEP = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0, 1, 0], [0] * 9], dtype=torch.bool)
RULES = [(softmax, similarity) for softmax in SOFTMAX for similarity in SIMILARITY]


def layer_of(seed=0, **settings):
    torch.manual_seed(seed)
    return CentroidAttention(6, 4, **settings)


def tokens(n=9, b=4, seed=1, dim=6, dtype=torch.float32):
    return torch.randn(b, n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- a slow oracle: one sequence, head, centroid and input at a time, in float64

def starts_by_loops(layer, x, start):
    "Centroids at the start, from the tokens `(n, dim)` that count."
    n, m = len(x), min(len(x), layer.n_centroids)
    if start == "farthest":
        chosen = []
        for _ in range(m):
            far = [float((z - x.mean(0)).norm()) if not chosen else min(float((z - x[c]).norm()) for c in chosen) for z in x]
            chosen.append(max((i for i in range(n) if i not in chosen), key=lambda i: far[i]))
        return x[chosen]
    if start == "segments":
        return torch.stack([torch.stack([x[j] for j in range(n) if j * m // n == i]).mean(0) for i in range(m)])
    window, W, rows = layer.summary.window, layer.summary.weight, []
    for i in range(m):
        first = i * n // m
        rows.append(sum((W[:, 6 * t:6 * t + 6] @ x[first + t] for t in range(window) if first + t < n), torch.zeros(6, dtype=x.dtype)))
    return torch.stack(rows)


def neighbourhoods(u, x, k):
    return [set(sorted(range(len(x)), key=lambda j: float((x[j] - u[i]).norm()))[:k or len(x)]) for i in range(len(u))]


def step_by_loops(layer, u, x, allowed):
    d, changes = layer.dim // layer.n_heads, []
    logit = {}
    for h in range(layer.n_heads):
        at = slice(h * d, h * d + d)
        for i in range(len(u)):
            for j in allowed[i]:
                q, k = layer.query(u[i])[at], layer.key(x[j])[at]
                score = q @ k if layer.similarity == "dot" else -((q - k) ** 2).sum() / 2
                logit[h, i, j] = float(score / math.sqrt(d))
    for i in range(len(u)):
        heads = []
        for h in range(layer.n_heads):
            at, total, held = slice(h * d, h * d + d), torch.zeros(d, dtype=u.dtype), 0.0
            for j in allowed[i]:
                rivals = allowed[i] if layer.softmax == "inputs" else [a for a in range(len(u)) if j in allowed[a]]
                pairs = [(h, i, b) for b in rivals] if layer.softmax == "inputs" else [(h, a, j) for a in rivals]
                w = 1 / sum(math.exp(logit[p] - logit[h, i, j]) for p in pairs)
                value = layer.value(x[j])[at] - (layer.value(u[i])[at] if layer.similarity == "distance" else 0)
                total, held = total + w * value, held + w
            heads.append(total / held if layer.softmax == "shares" else total)
        changes.append(layer.out(torch.cat(heads)))
    return u + layer.step_size * torch.stack(changes)


@torch.no_grad()
def by_loops(layer, x, keep, start):
    rows = torch.zeros(len(x), layer.n_centroids, layer.dim, dtype=x.dtype)
    for b in range(len(x)):
        z = x[b][keep[b]]
        if len(z):
            u = starts_by_loops(layer, z, start)
            allowed = neighbourhoods(u, z, layer.neighbours)
            for _ in range(layer.steps):
                u = step_by_loops(layer, u, z, allowed)
            rows[b, :len(u)] = u
    return rows


@pytest.mark.parametrize("neighbours", [None, 3])
@pytest.mark.parametrize("softmax, similarity", RULES)
@pytest.mark.parametrize("start", ["segments", "farthest", "convolution"])
def test_a_layer_is_its_formula(start, softmax, similarity, neighbours):
    layer = layer_of(n_heads=2, start=start, softmax=softmax, similarity=similarity, steps=2, step_size=0.3, neighbours=neighbours).double().eval()
    if start == "convolution":
        nn.init.normal_(layer.summary.weight, std=0.3)
    x = tokens(dtype=torch.float64)
    out = layer(x, KEEP)
    torch.testing.assert_close(out.output, by_loops(layer, x, KEEP, start), atol=1e-7, rtol=1e-6)
    assert out.mask.sum(-1).tolist() == [4, 4, 2, 0] and out.output[~out.mask].eq(0).all()


@pytest.mark.parametrize("softmax, similarity", RULES)
def test_fused_steps_agree_with_stored_maps(softmax, similarity):
    layer = layer_of(n_heads=3, softmax=softmax, similarity=similarity).double()
    x = tokens(dtype=torch.float64)
    u, keep = layer.start(x, KEEP)
    w = attention_maps(layer, u, x, KEEP, keep)  # (B, H, M, N)
    values = layer._heads(layer.value(x.masked_fill(~KEEP[..., None], 0)))
    total = w @ values
    if similarity == "distance":
        total = total - w.sum(-1, keepdim=True) * layer._heads(layer.value(u))
    expected = layer.out(total.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer.pull(u, layer.read(x, KEEP, u), keep)[keep], expected[keep], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("softmax", SOFTMAX)
def test_weights_sum_to_one_over_what_the_softmax_runs_over(softmax):
    layer, x = layer_of(n_heads=2, softmax=softmax), tokens()
    u, keep = layer.start(x, KEEP)
    w = attention_maps(layer, u, x, KEEP, keep)
    over, counting = (-2, KEEP) if softmax == "centroids" else (-1, keep)
    torch.testing.assert_close(w.sum(over), counting[:, None].expand_as(w.sum(over)).float(), atol=1e-5, rtol=0)


# --- the reduction, and what a step descends

@pytest.mark.parametrize("n_heads", [1, 2, 3])
@pytest.mark.parametrize("start", ["segments", "convolution"])
def test_as_many_centroids_as_tokens_is_self_attention_with_a_residual(start, n_heads):
    torch.manual_seed(0)
    layer, peer = CentroidAttention(6, 9, n_heads=n_heads, start=start).double(), nn.MultiheadAttention(6, n_heads, batch_first=True).double()
    if start == "convolution":
        layer.summary = module.StridedConvolution(6, window=1).double()
    with torch.no_grad():
        for name in ("weight", "bias"):
            getattr(peer, f"in_proj_{name}").copy_(torch.cat([getattr(p, name) for p in (layer.query, layer.key, layer.value)]))
    peer.out_proj.load_state_dict(layer.out.state_dict())
    x = tokens(dtype=torch.float64)
    mixed, maps = peer(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(layer(x).output, x + mixed)
    torch.testing.assert_close(attention_maps(layer, x, x), maps)


@pytest.mark.parametrize("softmax", ["inputs", "centroids"])
@pytest.mark.parametrize("similarity", SIMILARITY)
def test_a_tied_step_is_a_gradient_step(softmax, similarity):
    layer = tie(layer_of(n_heads=2, softmax=softmax, similarity=similarity).double())
    x = tokens(dtype=torch.float64)[:3]
    u = layer.start(x[:, :, :])[0].requires_grad_()
    gradient, = torch.autograd.grad(energy(layer, u, x, KEEP[:3]).sum(), u)
    torch.testing.assert_close(layer.pull(u, layer.read(x, KEEP[:3], u)), -gradient)


def test_an_untied_step_is_not():
    layer = layer_of(n_heads=2).double()
    x = tokens(dtype=torch.float64)
    u = layer.start(x)[0].requires_grad_()
    gradient, = torch.autograd.grad(energy(layer, u, x).sum(), u)
    assert (layer.pull(u, layer.read(x, None, u)) + gradient).abs().max() > 0.1


@given(seed=st.integers(0, 1000), M=st.integers(1, 6), scale=st.floats(0.2, 3))
def test_em_steps_never_raise_the_energy(seed, M, scale):
    torch.manual_seed(seed)
    layer = CentroidAttention(3, M, softmax="shares", similarity="distance", start="farthest").double()
    for part in (layer.query, layer.key, layer.value, layer.out):
        nn.init.eye_(part.weight), nn.init.zeros_(part.bias)
    for part in (layer.query, layer.key):
        part.weight.data.mul_(scale)
    x = torch.randn(1, 12, 3, dtype=torch.float64)
    u, _ = layer.start(x)
    inputs, before = layer.read(x, None, u), energy(layer, u, x)
    for _ in range(5):
        u = (u + layer.pull(u, inputs)).detach()
        before, earlier = energy(layer, u, x), before
        assert before <= earlier + 1e-9


# --- padding, order, few tokens

MODELS = {f"{softmax}-{similarity}-{start}-{k}": (lambda s=softmax, d=similarity, a=start, k=k: CentroidAttention(6, 4, n_heads=2, softmax=s, similarity=d, start=a, neighbours=k))
          for softmax, similarity in RULES for start, k in (("segments", None), ("convolution", 3))}
MODELS |= {f"start-{start}": (lambda a=start: CentroidAttention(6, 4, start=a, steps=2)) for start in STARTS}
MODELS |= {"block": lambda: CentroidBlock(6, 4, n_heads=2), "transformer": lambda: CentroidTransformer(6, 4, n_heads=2, depth=(1, 1)),
           "transformer-centroids": lambda: CentroidTransformer(6, 4, n_heads=2, depth=(1, 1), softmax="centroids", steps=2)}


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize("junk", [1e4, float("nan")])
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_neither_outputs_nor_gradients(name, junk):
    x, results = tokens(), []
    for filled in (x.masked_fill(~KEEP[..., None], 0), x.masked_fill(~KEEP[..., None], junk)):
        model = made(name)
        out = model(filled, KEEP)
        (out.output * torch.arange(24.0).view(4, 6).sin()).sum().backward()
        results.append([out.output, *(p.grad for p in model.parameters())])
    for clean, padded in zip(*results):
        torch.testing.assert_close(padded, clean)


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_sequence_is_the_sequence_alone(name):
    model, x = made(name), tokens()
    out = model(x, KEEP)
    for b in range(3):
        alone = model(x[b:b + 1, KEEP[b]])
        torch.testing.assert_close(out.output[b:b + 1], alone.output, atol=2e-5, rtol=1e-4)
        assert alone.mask is None and out.mask[b].all() or alone.mask.equal(out.mask[b:b + 1])
    assert out.output[3].eq(0).all() and not out.mask[3].any()


@pytest.mark.parametrize("name", MODELS)
def test_a_mask_that_masks_nothing_changes_nothing(name):
    model, x = made(name), tokens()
    torch.testing.assert_close(model(x, torch.ones(4, 9, dtype=torch.bool)).output, model(x).output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softmax, similarity", RULES)
def test_farthest_starts_do_not_depend_on_the_order_of_tokens(softmax, similarity):
    layer, x, order = layer_of(start="farthest", softmax=softmax, similarity=similarity, neighbours=5), tokens(), torch.randperm(9)
    torch.testing.assert_close(layer(x[:, order]).output, layer(x).output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softmax, similarity", RULES)
def test_steps_follow_a_permutation_of_centroids_and_ignore_one_of_inputs(softmax, similarity):
    layer, x, u = layer_of(n_heads=2, softmax=softmax, similarity=similarity), tokens(), tokens(4, seed=2)
    pulled, inputs, centroids = layer.pull(u, layer.read(x, None, u)), torch.randperm(9), torch.randperm(4)
    torch.testing.assert_close(layer.pull(u, layer.read(x[:, inputs], None, u)), pulled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.pull(u[:, centroids], layer.read(x, None, u)), pulled[:, centroids], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_equal_tokens_are_a_start_like_any_other(start):
    u, keep = start_centroids(STARTS[start](6), torch.ones(2, 9, 6), None, 9)
    assert keep is None and u.isfinite().all()


def test_random_starts_are_distinct_tokens_drawn_anew_in_training():
    layer, x = CentroidAttention(6, 5, start="random"), torch.arange(40.0).view(1, 40, 1).expand(-1, -1, 6)
    drawn = [layer.start(x)[0][0, :, 0] for _ in range(4)]
    assert all(len(u.unique()) == 5 for u in drawn) and len({tuple(u.tolist()) for u in drawn}) > 1
    layer.eval()
    assert layer.start(x)[0].equal(layer.start(x)[0])


def test_all_neighbours_is_no_restriction():
    x = tokens()
    for softmax, similarity in RULES:
        wide, near = (layer_of(n_heads=2, softmax=softmax, similarity=similarity, neighbours=k) for k in (None, 20))
        torch.testing.assert_close(near(x, KEEP).output, wide(x, KEEP).output, atol=1e-5, rtol=1e-4)


# --- precision, export, gradients

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_one_precision_answers_in_it_and_reaches_every_parameter(name, dtype):
    model = made(name).to(dtype)
    out = model(tokens().to(dtype), KEEP)
    (out.output.float() * torch.arange(24.0).view(4, 6).sin()).sum().backward()
    assert out.output.dtype == dtype
    for parameter, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), parameter


@pytest.mark.parametrize("name", MODELS)
def test_training_under_autocast(name):
    model, x = made(name).train(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, KEEP)
    out.output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if name != "start-random":
        torch.testing.assert_close(out.output.float(), made(name)(x, KEEP).output, atol=0.15, rtol=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_export_for_any_batch_and_length(name):
    model, x = made(name), tokens()
    B, N = torch.export.Dim("B", min=2, max=64), torch.export.Dim("N", min=8, max=64)
    program = torch.export.export(model, (x, KEEP), dynamic_shapes=({0: B, 1: N}, {0: B, 1: N}))
    longer, keep = tokens(20, 3, seed=5), torch.rand(3, 20) < 0.6
    torch.testing.assert_close(program.module()(longer, keep).output, model(longer, keep).output)


@pytest.mark.parametrize("softmax, similarity", RULES)
def test_compiled_without_breaks(softmax, similarity):
    layer, x = layer_of(n_heads=2, softmax=softmax, similarity=similarity), tokens()
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, KEEP).output, layer(x, KEEP).output)


@pytest.mark.parametrize("softmax, similarity", RULES)
def test_gradients_by_differences(softmax, similarity):
    layer = layer_of(n_heads=2, softmax=softmax, similarity=similarity).double()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradcheck(lambda x: layer(x, KEEP[:2]).output, tokens(b=2, dtype=torch.float64).requires_grad_())


# --- cost

class Largest(TorchDispatchMode):
    "Remembers the number of elements of the largest tensor made."
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("similarity", SIMILARITY)
@pytest.mark.parametrize("softmax", SOFTMAX)
def test_memory_is_linear_forward_and_backward(softmax, similarity, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", 2**14)
    N, M = 4096, 256
    layer, x = CentroidAttention(8, M, softmax=softmax, similarity=similarity), torch.randn(1, N, 8, requires_grad=True)
    kept = []
    with Largest() as made_, torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        layer(x).output.square().sum().backward()
    assert made_.size <= 16 * N and made_.size < N * M / 8
    assert sum(kept) < 24 * N * 8
    small = layer_of(softmax=softmax, similarity=similarity)
    z = tokens(500, 1)
    chunked = small(z).output
    monkeypatch.undo()
    torch.testing.assert_close(chunked, small(z).output, atol=1e-4, rtol=1e-4)


def test_chunks_have_the_gradients_of_the_whole(monkeypatch):
    results = []
    for limit in (2**22, 100):
        monkeypatch.setattr(module, "LOGITS", limit)
        q, k, v = (torch.randn(2, 2, n, 4, generator=torch.Generator().manual_seed(n)).double().requires_grad_() for n in (5, 300, 301))
        v = v[:, :, :300]
        out = compete(q, k, v, scale=0.7)
        results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    for whole, parts in zip(*results):
        torch.testing.assert_close(parts, whole)


def test_operations_grow_with_inputs_times_centroids():
    def counted(N, M, **settings):
        layer = CentroidAttention(16, M, n_heads=2, **settings)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.randn(1, N, 16))
        return counter.get_total_flops() // 2
    for softmax in SOFTMAX:
        base = counted(512, 32, softmax=softmax)
        assert counted(1024, 32, softmax=softmax) < 2 * base
        slope = counted(512, 64, softmax=softmax) - base  # 32 more centroids
        assert slope == 2 * 32 * 16**2 + 32 * 512 * (32 if softmax != "shares" else 34)


def test_attention_where_no_input_counts_is_zero():
    q, mask = torch.randn(2, 1, 3, 4), torch.tensor([[True, True], [False, False]])
    out = attend(q, q[:, :, :2], q[:, :, :2], mask)
    assert out[1].eq(0).all() and out[0].abs().min() > 0
    assert compete(q, q[:, :, :2], q[:, :, :2], mask)[1].eq(0).all()


# --- what is refused

@pytest.mark.parametrize("settings, words", [
    (dict(softmax="both"), "softmax must be one of .* got 'both'"), (dict(similarity="cosine"), "similarity must be one of .* got 'cosine'"),
    (dict(start="first"), "start must be one of .* got 'first'"), (dict(n_heads=4), "dim=6, n_heads=4"), (dict(steps=0), "steps must be a positive integer, got 0"),
    (dict(neighbours=0), "neighbours must be a positive integer, got 0"), (dict(step_size=-1.0), "step_size must be positive and finite, got -1.0"),
    (dict(step_size=math.nan), "step_size must be positive and finite, got nan")])
def test_unsuitable_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        CentroidAttention(6, 4, **settings)


def test_unsuitable_inputs_are_named():
    layer = layer_of()
    with pytest.raises(TypeError, match="tokens must be a floating-point tensor, got torch.int64"):
        layer(torch.ones(2, 9, 6, dtype=torch.long))
    with pytest.raises(TypeError, match="tokens are torch.float64, the layer is torch.float32"):
        layer(tokens(dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got \(9, 6\)"):
        layer(torch.randn(9, 6))
    with pytest.raises(ValueError, match=r"N > 0, got \(2, 0, 6\)"):
        layer(torch.randn(2, 0, 6))
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 9\), got \(4, 8\)"):
        layer(tokens(), KEEP[:, :8])
    with pytest.raises(ValueError, match=r"depth must be two numbers of blocks.* got \(1,\)"):
        CentroidTransformer(8, 4, depth=(1,))


def test_an_encoder_block_is_pytorchs():
    block = EncoderBlock(8, 2, 2.0)
    peer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
    peer.self_attn.in_proj_weight.data, peer.self_attn.in_proj_bias.data = block.project.weight.data, block.project.bias.data
    for mine, theirs in ((block.out, peer.self_attn.out_proj), (block.norm, peer.norm1), (block.feed[0], peer.norm2), (block.feed[1], peer.linear1), (block.feed[3], peer.linear2)):
        theirs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 7, 8)
    torch.testing.assert_close(block(x), peer(x))
