"Losses against loops, and scores against brute force."
import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from ddcl_nb.assign import ddcl
from ddcl_nb.layers import DDCLAttention
from ddcl_nb.losses import ddcl_loss, decorrelation, on_sphere, reconstruction, repulsion, variance_floor
from ddcl_nb.metrics import ari, clustering_accuracy, clustering_scores, match_clusters, mean_recall, nmi, perplexity, usage_counts, utilization


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the loss and the barrier

@pytest.mark.parametrize("heads", [(), (2,)])
def test_the_loss_is_a_mean_over_tokens_and_a_sum_over_heads(heads):
    z, p, keep = random(3, *heads, 5, 4), random(*heads, 6, 4, seed=1), torch.arange(5) < torch.tensor([5, 2, 0])[:, None]
    out = ddcl(z, p, 1.0, mask=keep)
    by_hand = sum(float(out.loss[b, ..., n].sum()) for b in range(3) for n in range(5) if keep[b, n]) / 7
    assert float(ddcl_loss(out, keep, n_heads=2 if heads else 1)) == pytest.approx(by_hand)
    assert float(ddcl_loss(ddcl(z, p, 1.0, mask=torch.zeros_like(keep)), torch.zeros_like(keep), n_heads=2 if heads else 1)) == 0


def test_the_loss_of_a_layer_is_the_one_it_carries():
    out = DDCLAttention(4, 3)(torch.randn(2, 5, 4))
    assert ddcl_loss(out) is out.loss


@given(K=st.integers(1, 6), heads=st.sampled_from([(), (1,), (3,)]), gamma=st.floats(1e-4, 2), confinement=st.floats(1e-4, 2))
def test_repulsion_is_its_formula(K, heads, gamma, confinement):
    p, total = random(*heads, K, 3), 0.0
    for bank in p.reshape(-1, K, 3):
        total += sum(confinement * float(x @ x) for x in bank)
        total -= sum(gamma * math.log(float((a - b).square().sum())) for a, b in combinations(bank, 2))
    assert float(repulsion(p, gamma, confinement)) == pytest.approx(total, rel=1e-9, abs=1e-9)


def test_repulsion_drives_a_collapsed_bank_apart_above_the_critical_temperature():
    z = random(40, 3)
    p = (1e-2 * random(4, 3, seed=1)).requires_grad_()
    optimiser = torch.optim.Adam([p], 0.02)
    for _ in range(300):
        optimiser.zero_grad()
        (ddcl(z, p, 1e3).loss.mean() + repulsion(p, 0.05, 0.01)).backward()
        optimiser.step()
    assert float(torch.nn.functional.pdist(p.detach()).min()) > 0.1


def test_merged_prototypes_cost_much_but_not_infinity():
    p = torch.ones(2, 3, requires_grad=True)
    value = repulsion(p)
    value.backward()
    assert value.isfinite() and p.grad.isfinite().all() and value > repulsion(torch.eye(2, 3))


@pytest.mark.parametrize("unsuitable", [dict(gamma=0.0), dict(gamma=-1.0), dict(gamma=float("nan")), dict(confinement=0.0)])
def test_a_barrier_has_positive_strengths(unsuitable):
    with pytest.raises(ValueError, match=f"{next(iter(unsuitable))} must be positive"):
        repulsion(torch.randn(3, 2), **unsuitable)


# --- anchors

KEEP = torch.arange(5) < torch.tensor([5, 3, 0])[:, None]


@pytest.mark.parametrize("mask", [None, KEEP])
def test_anchors_are_their_formulas(mask):
    z, x = random(3, 5, 4), random(3, 5, 4, seed=1)
    kept, target = (t.reshape(-1, 4).numpy() if mask is None else t[mask].numpy() for t in (z, x))
    floor = np.maximum(0, 1.1 - np.sqrt(kept.var(0) + 1e-8)).mean()
    assert float(variance_floor(z, 1.1, mask)) == pytest.approx(floor) and floor > 0
    C = np.cov(kept, rowvar=False, ddof=0)
    assert float(decorrelation(z, mask)) == pytest.approx(sum(C[i, j] ** 2 for i, j in permutations(range(4), 2)) / 4)
    share = ((kept - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
    assert float(reconstruction(z, x, mask)) == pytest.approx(share)
    assert float(reconstruction(x, x, mask)) == 0


@pytest.mark.parametrize("anchor", [variance_floor, decorrelation, lambda z, mask=None: reconstruction(z, torch.ones(3, 5, 4).cumsum(1), mask=mask)])
def test_padding_reaches_no_anchor(anchor):
    z = torch.randn(3, 5, 4)
    dirty = z.masked_fill(~KEEP[..., None], float("nan")).requires_grad_()
    value = anchor(dirty, mask=KEEP)
    value.backward()
    assert value.equal(anchor(z, mask=KEEP)) and dirty.grad.isfinite().all() and dirty.grad[~KEEP].eq(0).all()


@pytest.mark.parametrize("anchor", [variance_floor, decorrelation, lambda z: reconstruction(z, z)])
def test_anchors_need_two_tokens(anchor):
    with pytest.raises(ValueError, match="tokens must hold at least two that count, got 1"):
        anchor(torch.randn(1, 4))


def test_anchors_of_a_collapsed_embedding_are_finite_and_push():
    z = torch.zeros(6, 3, requires_grad=True)
    variance_floor(z).backward()
    assert float(variance_floor(z.detach())) == pytest.approx(1, abs=1e-3) and z.grad.isfinite().all()


def test_anchors_in_half_precision_are_computed_in_float32():
    z = (300 * torch.randn(64, 4)).half()
    assert decorrelation(z).dtype == torch.float32 and decorrelation(z).isfinite()


def test_a_sphere_has_its_radius():
    torch.testing.assert_close(on_sphere(torch.randn(5, 3), 2.5).norm(dim=-1), torch.full((5,), 2.5))
    assert on_sphere(torch.zeros(2, 3)).eq(0).all()


# --- scores

labellings = st.integers(1, 30).flatmap(lambda n: st.tuples(*[st.lists(st.integers(0, 4), min_size=n, max_size=n)] * 2))


def best_matching(labels, predicted):
    "Accuracy over all one-to-one namings of at most five clusters by at most five classes."
    return max(np.mean([naming[c] == y for y, c in zip(labels, predicted)]) for naming in permutations(range(5)))


@given(labellings)
def test_accuracy_is_that_of_the_best_naming(pair):
    labels, predicted = map(np.array, pair)
    found = match_clusters(labels, predicted)
    assert clustering_accuracy(labels, predicted) == pytest.approx(best_matching(*pair))
    assert len(np.unique(found)) == len(np.unique(predicted))
    assert all(len(np.unique(found[predicted == c])) == 1 for c in predicted)


@given(labellings, st.permutations(range(5)))
def test_scores_do_not_depend_on_the_names_of_clusters(pair, naming):
    labels, predicted = map(np.array, pair)
    renamed = np.array(naming)[predicted] - 2
    for score in (clustering_accuracy, nmi, ari):
        assert score(labels, renamed) == pytest.approx(score(labels, predicted), abs=1e-12)


@given(labellings)
def test_a_partition_agrees_with_itself(pair):
    labels = np.array(pair[0])
    assert clustering_scores(labels, 7 - labels) == pytest.approx({"acc": 1, "nmi": 1, "ari": 1, "recall": 1})


@given(labellings)
def test_normalised_mutual_information_is_its_formula(pair):
    labels, predicted = pair

    def entropy(items):
        p = np.unique(items, return_counts=True, axis=0)[1] / len(items)
        return -(p * np.log(p)).sum()
    one, other, both = entropy(labels), entropy(predicted), entropy(list(zip(labels, predicted)))
    expected = 1.0 if one + other == 0 else 2 * (one + other - both) / (one + other)
    assert nmi(labels, predicted) == pytest.approx(expected, abs=1e-9)


@given(labellings.filter(lambda pair: len(pair[0]) > 1))
def test_adjusted_rand_is_its_formula(pair):
    pairs = list(combinations(range(len(pair[0])), 2))
    same = [np.array([items[i] == items[j] for i, j in pairs]) for items in pair]
    both, one, other = (same[0] & same[1]).sum(), same[0].sum(), same[1].sum()
    chance, most = one * other / len(pairs), (one + other) / 2
    assert ari(*pair) == pytest.approx(1.0 if most == chance else (both - chance) / (most - chance), abs=1e-9)


def test_recall_counts_rare_classes_as_much_as_common_ones():
    labels, predicted = [0] * 98 + [1] * 2, [5] * 100
    assert clustering_accuracy(labels, predicted) == pytest.approx(0.98) and mean_recall(labels, predicted) == pytest.approx(0.5)


def test_clusters_left_over_have_names_of_their_own():
    found = match_clusters([3, 3, 3, 8], [0, 0, 1, 2])
    assert found.tolist() == [3, 3, found[2], 8] and found[2] > 8


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_lists_arrays_and_tensors_are_labels(kind):
    assert clustering_accuracy(kind([0, 0, 1, 1]), kind([1, 1, 0, 1])) == 0.75


@pytest.mark.parametrize("score", [clustering_accuracy, mean_recall, nmi, ari])
@pytest.mark.parametrize("labels, predicted, message", [
    ([0, 1], [0], "same, positive length; got 2 and 1"), (np.zeros(0, int), np.zeros(0, int), "positive length; got 0 and 0"),
    ([0.5, 1], [0, 1], "labels must be a one-dimensional array of integers"), ([0, 1], [[0, 1]], r"predicted must be .* got shape \(1, 2\)")])
def test_bad_labels_are_named(score, labels, predicted, message):
    with pytest.raises(ValueError, match=message):
        score(labels, predicted)


# --- use

@given(st.lists(st.integers(-1, 4), max_size=20))
def test_counts_are_counts(indices):
    expected = [indices.count(k) for k in range(5)]
    assert usage_counts(np.array(indices, int), 5).tolist() == expected
    assert usage_counts(torch.tensor(indices, dtype=torch.int64).reshape(-1, 1), 5).tolist() == expected


@pytest.mark.parametrize("indices", [[0, 5], [-2]])
def test_indices_outside_the_bank_are_refused(indices):
    with pytest.raises(ValueError, match="indices must lie in -1 ... 4, got"):
        usage_counts(torch.tensor(indices), 5)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_perplexity_is_its_formula(counts):
    total = sum(counts)
    expected = math.prod((c / total) ** (-c / total) for c in counts if c) if total else 0.0
    assert perplexity(counts) == pytest.approx(expected) == pytest.approx(perplexity(torch.tensor(counts)))
    assert utilization(counts) == pytest.approx(sum(c > 0 for c in counts) / len(counts))


def test_perplexity_at_its_ends():
    assert perplexity([7, 7, 7, 7]) == pytest.approx(4) and perplexity([9, 0, 0]) == 1 and perplexity(torch.zeros(3)) == 0
