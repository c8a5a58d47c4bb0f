"Layers under padding, mixed precision and unsuitable arguments."
import pytest
import torch
from torch import nn

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
