"The quantiser as its users know it: exact decoding, padding, precision, export, saving, and the interface of vector-quantize-pytorch."
import copy
import io
import socket
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddcl_nb.assign import NonFiniteInput
from ddcl_nb.quantize import SHARPNESS, DDCLQuantize, Encoder, Stage
from ddcl_nb.storage import load_state, save_state
from ddcl_nb.temperature import Anneal
from ddcl_nb.training import banks, fit, param_groups

SHAPES = {"one": {}, "heads": dict(heads=2), "stages": dict(num_quantizers=3), "both": dict(heads=2, num_quantizers=2)}
KEEP = torch.arange(7) < torch.tensor([[7], [4], [0]])


def cloud(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(kind="one", size=8, **more):
    torch.manual_seed(0)
    return DDCLQuantize(6, size, **SHAPES[kind], **more).init_from(cloud(300, 6)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", SHAPES)
def test_decoding_is_bit_identical_on_any_batch(kind, dtype):
    layer, x = fitted(kind).to(dtype), cloud(9, 5, 6, seed=1).to(dtype)
    out = layer(x)
    whole = layer.get_codes_from_indices(out.indices)
    assert out.quantized.dtype == dtype and torch.equal(whole.to(dtype), out.quantized)
    for size in range(1, 10):
        assert torch.equal(torch.cat([layer.get_codes_from_indices(part) for part in out.indices.split(size)]), whole)
    one_by_one = layer.get_codes_from_indices(out.indices.flatten(0, 1)[:, None])
    assert torch.equal(one_by_one[:, 0], whole.flatten(0, 1))


@pytest.mark.parametrize("kind", SHAPES)
def test_codes_are_sums_of_the_codebook(kind):
    layer, x = fitted(kind), cloud(4, 5, 6, seed=1)
    indices = layer.encode(x).reshape(20, layer.num_quantizers, layer.heads)
    book = layer.codebook.reshape(layer.num_quantizers, layer.heads, 8, -1)
    total = sum(torch.cat([book[s, h, indices[:, s, h]] for h in range(layer.heads)], -1) for s in range(layer.num_quantizers))
    assert torch.equal(layer.get_codes_from_indices(layer.encode(x)).flatten(0, 1), total)


@settings(deadline=None, max_examples=8)
@given(st.floats(1e-4, 1e4), st.floats(-1e2, 1e2), st.sampled_from(sorted(SHAPES)))
def test_units_of_the_tokens_do_not_matter(scale, shift, kind):
    x, y = cloud(300, 6).double(), cloud(50, 6, seed=1).double()
    shift = shift * scale
    here, there = (DDCLQuantize(6, 8, **SHAPES[kind]).double().init_from(z) for z in (x, x * scale + shift))
    assert torch.equal(here.encode(y), there.encode(y * scale + shift))
    torch.testing.assert_close(here(y).quantized * scale + shift, there(y * scale + shift).quantized, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("junk", [1e4, float("nan")])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_padding_changes_nothing(kind, training, junk):
    x, results = cloud(3, 7, 6, seed=2), []
    for fill in (0.0, junk):
        layer = fitted(kind).train(training)
        tokens = x.masked_fill(~KEEP[..., None], fill).requires_grad_()
        out = layer(tokens, KEEP)
        (out.quantized.square().sum() + out.loss).backward()
        results.append([*out, tokens.grad, layer.usage().counts, *layer.state_dict().values()])
        assert out.quantized[~KEEP].eq(0).all() and out.indices[~KEEP].eq(-1).all() and tokens.grad[~KEEP].eq(0).all()
    for clean, padded in zip(*results):
        assert torch.equal(padded, clean)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_padded_batch_equals_its_tokens(kind, training):
    x = cloud(3, 7, 6, seed=2)
    layers = [fitted(kind).train(training) for _ in range(2)]
    padded, alone = layers[0](x, KEEP), layers[1](x[KEEP])
    torch.testing.assert_close(padded.quantized[KEEP], alone.quantized)
    assert torch.equal(padded.indices[KEEP], alone.indices)
    torch.testing.assert_close(padded.loss, alone.loss)
    for a, b in zip(*(layer.state_dict().values() for layer in layers)):
        torch.testing.assert_close(a, b)


def test_all_masked_and_empty():
    layer, nothing = fitted().train(), torch.zeros(2, 4, dtype=torch.bool)
    before = copy.deepcopy(layer.state_dict())
    out = layer(cloud(2, 4, 6), nothing)
    assert out.quantized.eq(0).all() and out.indices.eq(-1).all() and out.loss == 0
    assert all(torch.equal(a, b) for (name, a), b in zip(before.items(), layer.state_dict().values()) if name != "steps" and "tau" not in name)
    assert layer.eval()(cloud(0, 4, 6)).quantized.shape == (0, 4, 6)


@pytest.mark.parametrize("kind", SHAPES)
def test_maps_are_their_tokens(kind):
    layer, x = fitted(kind), cloud(2, 6, 3, 4, seed=3)
    maps, tokens = layer(x), layer(x.flatten(2).mT)
    assert torch.equal(maps.quantized.flatten(2).mT, tokens.quantized) and torch.equal(maps.indices.flatten(1, 2), tokens.indices)
    assert torch.equal(layer.get_codes_from_indices(maps.indices), maps.quantized)
    keep = torch.rand(2, 3, 4) > 0.5
    assert torch.equal(layer(x, keep).indices.eq(-1).flatten(3).any(-1) if layer._behind else layer(x, keep).indices.eq(-1), ~keep)


@pytest.mark.parametrize("kind", SHAPES)
def test_gradients_go_where_the_page_says(kind):
    layer = fitted(kind).train()
    x = cloud(4, 5, 6).requires_grad_()
    out = layer(x)
    on_x, = torch.autograd.grad(out.quantized.square().sum(), x, retain_graph=True)
    torch.testing.assert_close(on_x, 2 * out.quantized.detach())
    on_x, = torch.autograd.grad(out.loss, x)
    torch.testing.assert_close(on_x, 0.25 * 2 * (x - out.quantized).detach() / x.numel())
    assert not list(layer.parameters())


@pytest.mark.parametrize("kind", SHAPES)
def test_codes_follow_the_tokens_by_running_means(kind):
    layer, x = fitted(kind).train(), cloud(40, 50, 6, seed=3) + 2
    before = layer(x).loss
    for _ in range(100):
        layer(x)
    assert layer(x).loss < 0.7 * before


def test_one_em_step_is_the_running_mean_of_soft_shares():
    stage, z = Stage(8, 6, n_heads=2), cloud(200, 6).double()
    stage.double().start(z)
    stage.set_tau(0.3)
    x, old, mass = stage.standard(z), stage.prototypes.clone(), stage.mass.clone()
    stage.step(x, 0.1)
    for h in range(2):
        q = torch.softmax(-torch.cdist(x[:, 3 * h:3 * h + 3], old[h]).square() / stage.temperature[h], -1)
        expected = 0.9 * mass[h] + 0.1 * q.mean(0)
        torch.testing.assert_close(stage.mass[h], expected)
        torch.testing.assert_close(stage.prototypes[h], (0.9 * mass[h][:, None] * old[h] + 0.1 * q.mT @ x[:, 3 * h:3 * h + 3] / 200) / expected[:, None])


@pytest.mark.parametrize("kind", SHAPES)
def test_a_new_ruler_moves_no_code(kind):
    layer = fitted(kind)
    before = layer.codebook
    for stage in layer.stages:
        stage.feel(cloud(50, 6, seed=4) * torch.tensor([9.0, 1, 1, 1, 1, 0]))
        stage.turn()
        assert not torch.allclose(stage.ruler, torch.eye(6 // layer.heads).expand_as(stage.ruler), atol=0.1)
    torch.testing.assert_close(layer.codebook, before)
    index = layer.encode(cloud(300, 6, seed=5))
    assert not torch.equal(index, fitted(kind).encode(cloud(300, 6, seed=5)))


def test_the_ruler_is_the_decoders():
    torch.manual_seed(0)
    decoder, layer = torch.tensor([1.0, 1, 1, 0.1, 0.1, 0.1]), DDCLQuantize(6, 32, warmup=5, anneal=Anneal(0.1, 0.01, 20))
    blind = copy.deepcopy(layer)
    for step in range(60):
        x = cloud(500, 6, seed=step).requires_grad_()
        ((layer(x).quantized - x.detach() - cloud(500, 6, seed=step + 999)) * decoder).square().sum().backward()
        blind(x.detach())
    expected = decoder.square() / decoder.square().mean()
    torch.testing.assert_close(layer.stages[0].sensitivity[0].diagonal(), expected, rtol=0.1, atol=0.02)
    x = cloud(2000, 6, seed=5000)
    error = [float(((q.eval()(x).quantized - x) * decoder).square().mean()) for q in (layer, blind)]
    assert error[0] < 0.7 * error[1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_gradient_that_says_nothing_changes_no_ruler(bad):
    layer = fitted().train()
    x = cloud(4, 5, 6).requires_grad_()
    layer(x).quantized.backward(torch.full_like(x, bad))
    assert layer.stages[0].felt == 0 and torch.equal(layer.stages[0].sensitivity[0], torch.eye(6))


def test_the_whole_course_of_training():
    torch.manual_seed(0)
    layer = DDCLQuantize(6, 8, warmup=3, anneal=Anneal(0.5, 0.1, 40))
    spread = torch.tensor([9.0, 1, 1, 1, 1, 1])
    for step in range(60):
        if step == 50:
            layer.reset_usage()
        x = cloud(64, 6, seed=step) * spread
        out = layer(x)
        assert torch.equal(out.quantized, x) == (step < 3) == (out.loss == 0)
        assert bool(layer.started) == (step >= 3)
    stage = layer.stages[0]
    torch.testing.assert_close(stage.temperature, SHARPNESS * 2 * stage.distortion[0] / 6, rtol=0.05, atol=0)
    assert 8 * 0.6 < layer.usage().perplexity <= 8 and layer.usage().used == 1 and 0 < layer.usage().softness < 0.2


def test_a_fixed_temperature_stays():
    layer = DDCLQuantize(6, 8, warmup=1, anneal=Anneal(0.3, 0.3, 10))
    for step in range(30):
        layer(cloud(64, 6, seed=step))
    torch.testing.assert_close(layer.stages[0].tau, torch.tensor([0.3]))


def test_usage_is_that_of_the_stream():
    layer = fitted(size=4)
    book = layer.codebook
    for k in range(3):
        layer(book[k].expand(5, 6))
        layer.encode(book[3:])
    use = layer.usage()
    assert use.counts.tolist() == [[[5, 5, 5, 0]]] and use.used == 0.75 and use.perplexity == pytest.approx(3)
    layer.reset_usage()
    assert layer.usage().counts.eq(0).all() and layer.usage().perplexity == 0


@pytest.mark.parametrize("kind", SHAPES)
def test_soft_and_hard_decoding_meet_when_cold(kind):
    layer, x = fitted(kind), cloud(4, 5, 6, seed=1)
    assert not torch.allclose(layer.soften(x), layer(x).quantized)
    for stage in layer.stages:
        stage.set_tau(1e-8)
    torch.testing.assert_close(layer.soften(x), layer(x).quantized, atol=1e-5, rtol=1e-4)


def test_frozen_code_is_fixed():
    layer = fitted("both").train().freeze()
    before, x = copy.deepcopy(layer.state_dict()), cloud(4, 5, 6, seed=1).requires_grad_()
    out = layer(x)
    (out.loss + out.quantized.sum()).backward()
    assert torch.equal(out.quantized, layer.get_codes_from_indices(out.indices)) and x.grad.abs().min() > 0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values()))
    layer.unfreeze()(x.detach())
    assert not torch.equal(layer.stages[0].prototypes, before["stages.0.prototypes"])


@pytest.mark.parametrize("kind", SHAPES)
def test_state_goes_round(kind, tmp_path):
    torch.manual_seed(1)
    layer, other = (DDCLQuantize(6, 8, warmup=2, anneal=Anneal(0.3, 0.01, 20), **SHAPES[kind]) for _ in range(2))
    for step in range(6):
        layer(cloud(64, 6, seed=step))
    save_state(tmp_path / "layer.safetensors", layer.state_dict(), {})
    other.load_state_dict(load_state(tmp_path / "layer.safetensors")[0])
    for step in range(6, 9):
        for a, b in zip(layer(x := cloud(64, 6, seed=step)), other(x)):
            assert torch.equal(a, b)
    assert torch.equal(layer.codebook, copy.deepcopy(layer).codebook)


@pytest.mark.parametrize("kind", SHAPES)
def test_autocast_keeps_distances_in_float32(kind):
    layer, x = fitted(kind).train(), cloud(4, 5, 6, seed=1).requires_grad_()
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        out.loss.backward()
        half = layer(x.bfloat16())
    assert torch.equal(out.indices, expected.indices) and torch.equal(out.quantized, expected.quantized)
    assert half.quantized.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
    assert all(b.dtype != torch.bfloat16 for b in layer.bfloat16().buffers() if b is not layer.latest)


@pytest.mark.parametrize("kind", ["one", "both"])
def test_encode_is_exported(kind):
    layer, x = fitted(kind), cloud(3, 5, 6, seed=1)
    B, N = torch.export.Dim("B"), torch.export.Dim("N")
    program = torch.export.export(Encoder(layer), (x,), dynamic_shapes=({0: B, 1: N},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for tokens in (x, cloud(2, 9, 6, seed=2)):
        assert torch.equal(loaded(tokens), layer.encode(tokens))
    maps = cloud(2, 6, 4, 4)
    assert torch.equal(torch.export.export(Encoder(layer), (maps,)).module()(maps), layer.encode(maps))


@pytest.mark.parametrize("kind", ["one", "both"])
def test_encode_runs_as_onnx(kind, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: torch.onnx needs it")
    layer, x = fitted(kind), cloud(3, 5, 6, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(Encoder(layer), (x,), dynamo=True)
    program.save(path := str(tmp_path / "encoder.onnx"))
    from onnx.reference import ReferenceEvaluator
    session = ReferenceEvaluator(path)
    found = session.run(None, {session.input_names[0]: x.numpy()})[0]
    assert torch.equal(torch.from_numpy(found), layer.encode(x))


def test_no_collective_in_forward(monkeypatch):
    for name in ("all_reduce", "all_gather", "broadcast", "barrier"):
        monkeypatch.setattr(torch.distributed, name, lambda *a, **k: pytest.fail("a collective was called"))
    layer = DDCLQuantize(6, 8, warmup=1)
    for step in range(4):
        layer(cloud(64, 6, seed=step).requires_grad_()).loss.backward()


def train_in_parallel(rank, port, results):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), DDCLQuantize(6, 8, heads=2, num_quantizers=2, warmup=3, anneal=Anneal(0.1, 0.01, 10)))
    parallel = nn.parallel.DistributedDataParallel(model)
    optimiser = torch.optim.Adam(param_groups(parallel))
    for step in range(8):
        out = parallel(x := cloud(40, 6, seed=2 * step + rank))
        optimiser.zero_grad()
        (out.loss + (out.quantized - x).square().mean()).backward()
        optimiser.step()
    parallel.eval()(x)  # buffers are those of rank 0 from here on
    torch.save([bool(model[1].started), list(model.state_dict().values())], f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_keep_one_codebook(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(train_in_parallel, (port, str(tmp_path)), nprocs=2)
    (started, here), (_, there) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert started and all(torch.equal(a, b) for a, b in zip(here, there))


@pytest.mark.parametrize("kind", ["one", "heads", "stages"])
def test_one_line_away_from_vector_quantize_pytorch(kind):
    peers = pytest.importorskip("vector_quantize_pytorch", reason="the peer library is not installed")
    theirs = {"one": lambda: peers.VectorQuantize(dim=6, codebook_size=8, decay=0.8, commitment_weight=1.0),
              "heads": lambda: peers.VectorQuantize(dim=6, codebook_size=8, codebook_dim=3, heads=2, separate_codebook_per_head=True),
              "stages": lambda: peers.ResidualVQ(dim=6, codebook_size=8, num_quantizers=3)}[kind]().eval()
    ours = DDCLQuantize(dim=6, codebook_size=8, decay=0.8, commitment_weight=1.0, **SHAPES[kind]).eval()
    x = cloud(2, 5, 6)
    for a, b in zip(theirs(x)[:2], ours(x)):
        assert a.shape == b.shape and a.dtype == b.dtype
    assert ours.get_codes_from_indices(ours.encode(x)).shape == x.shape
    if kind == "one":
        assert theirs.codebook.shape == ours.codebook.shape


def test_maps_as_the_peer_takes_them():
    peers = pytest.importorskip("vector_quantize_pytorch", reason="the peer library is not installed")
    x, arguments = cloud(2, 6, 3, 4), dict(dim=6, codebook_size=8, accept_image_fmap=True, kmeans_init=True)
    for a, b in zip(peers.VectorQuantize(**arguments).eval()(x)[:2], DDCLQuantize(**arguments).eval()(x)):
        assert a.shape == b.shape


def test_fit_and_its_diagnostics_know_the_stages():
    model = nn.Sequential(nn.Linear(6, 6), DDCLQuantize(6, 8, heads=2, warmup=2))
    assert list(banks(model)) == ["1.stages.0"]
    history = fit(model, cloud(200, 6), epochs=2, init=None, batch_size=50,
                  loss=lambda model, x: (out := model(x)).loss + (out.quantized - x).square().mean()).history
    assert {"variance", "perplexity", "tau"} <= history[-1].keys()


@pytest.mark.parametrize("arguments, error, message", [
    (dict(dim=0), ValueError, "dim must be a positive integer, got 0"),
    (dict(codebook_size=2.5), ValueError, "codebook_size must be a positive integer, got 2.5"),
    (dict(heads=4), ValueError, "dim must be a multiple of heads; got dim=6, heads=4"),
    (dict(num_quantizers=0), ValueError, "num_quantizers must be a positive integer, got 0"),
    (dict(warmup=0), ValueError, "warmup must be a positive integer, got 0"),
    (dict(decay=1.0), ValueError, "decay must be at least 0 and below 1, got 1.0"),
    (dict(commitment_weight=-1), ValueError, "commitment_weight must be at least 0, got -1"),
    (dict(anneal=0.1), TypeError, "anneal must be an Anneal, got float"),
    (dict(rotation_trick=True), TypeError, "no argument rotation_trick .got True.: the encoder's gradient passes straight through"),
    (dict(colour="red"), TypeError, "no argument colour .got 'red'.")])
def test_unsuitable_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        DDCLQuantize(**{"dim": 6, "codebook_size": 8, **arguments})


@pytest.mark.parametrize("call, error, message", [
    (lambda q: q(torch.ones(2, 3, 6, dtype=torch.long)), TypeError, "tokens must be a floating-point tensor, got torch.int64"),
    (lambda q: q([1.0]), TypeError, "tokens must be a floating-point tensor, got list"),
    (lambda q: q(cloud(2, 3, 5)), ValueError, r"tokens must be \(..., N, 6\), got \(2, 3, 5\)"),
    (lambda q: q(cloud(2, 5, 3, 6)), ValueError, r"a feature map must be \(B, 6, H, W\), got \(2, 5, 3, 6\)"),
    (lambda q: q(cloud(6)), ValueError, r"tokens must be \(N, 6\), .* got \(6,\)"),
    (lambda q: q(cloud(2, 3, 6), torch.ones(3, 2)), ValueError, r"mask must have shape \(2, 3\), got \(3, 2\)"),
    (lambda q: q(cloud(2, 3, 6) / 0), NonFiniteInput, "tokens hold 36 NaN or infinite values"),
    (lambda q: q(cloud(2, 3, 6).double()), TypeError, "tokens are torch.float64, the layer is torch.float32"),
    (lambda q: q.get_codes_from_indices(torch.tensor([[8]])), ValueError, r"indices must lie in -1 ... 7, got 8 ... 8"),
    (lambda q: q.get_codes_from_indices(torch.tensor([[0.5]])), TypeError, "indices must be an integer tensor, got torch.float32"),
    (lambda q: q.init_from(cloud(5, 6)), ValueError, "codebook_size is 8, but there are only 5 distinct tokens among 5")])
@pytest.mark.parametrize("training", [True, False])
def test_unsuitable_input(call, error, message, training):
    layer = fitted().train(training)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=message):
        call(layer)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values()))


def test_indices_of_heads_need_their_dimension():
    with pytest.raises(ValueError, match=r"indices must be \(..., 2, 2\), got \(5, 3\)"):
        fitted("both").get_codes_from_indices(torch.zeros(5, 3, dtype=torch.long))


def test_too_few_distinct_tokens_are_told_in_training():
    layer, x = DDCLQuantize(6, 8, warmup=2), cloud(3, 6).repeat(50, 1)
    with pytest.raises(ValueError, match="codebook_size is 8, but there are only 3 distinct tokens"):
        for _ in range(9):
            layer(x)
