"The comparators behind their one interface: padding, order, batch and the defined result of nothing at all."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddcl_nb.baselines import MECHANISMS, AdaptiveSlotAttention, DualPrototypes, Prototypes, PrototypeTransformer, SelfAttention, SlotAttention, deep_clusters, dual_clusters
from ddcl_nb.layers import DDCLAttention

DIM, N = 8, 6


def made(name, K=3):
    torch.manual_seed(0)
    layer = MECHANISMS[name](DIM, K)
    if isinstance(layer, Prototypes): layer.layer.init_from(torch.randn(4, N, DIM), "kmeans++")
    return layer.eval()


def per_token(layer):
    return isinstance(layer, (SelfAttention, PrototypeTransformer)) or isinstance(layer, Prototypes) and isinstance(layer.layer, DDCLAttention)


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("name", MECHANISMS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_padding_anywhere_changes_nothing(name, data):
    layer = made(name)
    mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=1, max_size=3)))
    x = torch.randn(*mask.shape, DIM, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    rubbish = data.draw(st.sampled_from([float("nan"), float("inf"), 1e9]))
    out = layer(x.masked_fill(~mask[..., None], rubbish), mask)
    for i, keep in enumerate(mask):
        if not keep.any():
            assert not out.summary[i].any() and not out.assignments[i].any()
            continue
        one = layer(x[i:i + 1, keep])
        close(out.summary[i, keep] if per_token(layer) else out.summary[i], one.summary[0])
        weights = out.assignments[i, keep]
        close(weights[:, keep] if isinstance(layer, SelfAttention) else weights, one.assignments[0])


@pytest.mark.parametrize("name", MECHANISMS)
def test_order_of_the_tokens_does_not_matter(name):
    layer, x, order = made(name), torch.randn(2, N, DIM), torch.randperm(N)
    a, b = layer(x), layer(x[:, order])
    close(a.summary[:, order] if per_token(layer) else a.summary, b.summary)


@pytest.mark.parametrize("name", MECHANISMS)
def test_everything_learns_and_sequences_do_not_mix(name):
    layer, x = made(name).train(), torch.randn(2, N, DIM, requires_grad=True)
    out = layer(x)
    (out.summary[0].sin().sum() + 0 * out.loss).backward()
    assert x.grad[0].any() and not x.grad[1].any()
    still = [n for n, p in layer.named_parameters() if p.grad is None]
    assert not still or name == "Adaptive Slot Attention", still


def test_slots_are_drawn_anew_in_training_and_kept_in_evaluation():
    layer, x = SlotAttention(DIM, 3), torch.randn(2, N, DIM)
    assert not torch.equal(layer(x).summary, layer(x).summary)
    again = SlotAttention(DIM, 3)
    again.load_state_dict(layer.state_dict())
    close(layer.eval()(x).summary, again.eval()(x).summary)


def test_no_slot_kept_is_no_summary():
    layer, x = AdaptiveSlotAttention(DIM, 3).eval(), torch.randn(2, N, DIM)
    with torch.no_grad(): layer.judge[-1].bias.copy_(torch.tensor([50.0, -50.0]))
    out = layer(x)
    assert not out.summary.any() and not out.assignments.any() and out.loss < 1e-6


def test_prototypes_of_the_dual_layer_stay_in_the_span_of_the_rows():
    torch.manual_seed(0)
    plane = torch.linalg.qr(torch.randn(5, 2))[0].mT  # (2, 5)
    X = (torch.randn(60, 2) @ plane + 1).numpy()
    found, again = (dual_clusters(X, 3, epochs=30, seed=1) for _ in range(2))
    centred = torch.tensor(found.prototypes - X.mean(0))
    close(centred @ plane.mT @ plane, centred)
    assert (found.labels == again.labels).all() and found.losses[-1] < found.losses[0] and set(found.labels) == {0, 1, 2}


def test_gradient_of_the_dual_layer_is_that_of_prototypes_times_the_rows():
    torch.manual_seed(0)
    X, target = torch.randn(20, 4), torch.randn(3, 4)
    layer = DualPrototypes(X, 3)
    P = layer(X)
    G = torch.autograd.grad((P - target).pow(4).sum(), P, retain_graph=True)[0]
    (P - target).pow(4).sum().backward()
    close(layer.weight.grad, G @ X.mT)


def test_faults_are_named():
    with pytest.raises(ValueError, match="n_prototypes must be between 1 and the 1 distinct rows of X, got 2"): DualPrototypes(torch.zeros(3, 2), 2)
    with pytest.raises(ValueError, match="tau must be positive, got 0"): dual_clusters(torch.randn(9, 2).numpy(), 2, tau=0)
    with pytest.raises(ValueError, match="method must be one of DEC, IDEC, DKM; got 'DCN'"): deep_clusters("DCN", torch.zeros(3, 2).numpy(), 2)
    with pytest.raises(ValueError, match="X holds 1 NaN"): deep_clusters("DEC", torch.tensor([[0.0, float("nan")]]).numpy(), 1)
    with pytest.raises(ValueError, match="layer must have one head, got 2"): Prototypes(DDCLAttention(8, 3, n_heads=2))
