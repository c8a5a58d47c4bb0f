"The tree of prototypes by overlap: a slow oracle, what must not change it, edge cases and faults."
import numpy as np
import pytest
import torch

from ddcl_nb.assign import NonFiniteInput
from ddcl_nb.metrics import ari
from ddcl_nb.tree import Groups, _moments, merge_by_overlap, separations


def blobs(seed=0, n=60, m=3, K=4, width=0.3):
    g = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(K, m, generator=g)
    labels = torch.arange(K).repeat_interleave(n)
    tokens = centres[labels] + width * torch.randn(K * n, m, generator=g)
    return tokens, labels, tokens[torch.randperm(K * n, generator=g)[:12]]


def random_groups(seed, K=5, m=3):
    g = torch.Generator().manual_seed(seed)
    roots = torch.randn(K, m, m, generator=g).double()
    return Groups(torch.randn(K, m, generator=g).double(), roots @ roots.mT + 0.1 * torch.eye(m))


@pytest.mark.parametrize("seed", range(5))
def test_separations_against_a_loop(seed):
    groups = random_groups(seed)
    found = separations(groups)
    for i in range(5):
        for j in range(5):
            if i == j:
                assert found[i, j] == torch.inf
                continue
            d = (groups.means[i] - groups.means[j]).numpy()
            a, b = groups.covariances[i].numpy(), groups.covariances[j].numpy()
            expected = d @ np.linalg.solve((a + b) / 2, d) / 8 + 0.5 * np.log(np.linalg.det((a + b) / 2) / np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
            assert abs(float(found[i, j]) - expected) < 1e-9 and expected > 0


@pytest.mark.parametrize("seed", range(5))
def test_energies_against_scipy(seed):
    from scipy.stats import multivariate_normal
    groups, tokens = random_groups(seed), torch.randn(7, 3, generator=torch.Generator().manual_seed(seed)).double()
    for k in range(5):
        expected = -multivariate_normal(groups.means[k].numpy(), groups.covariances[k].numpy()).logpdf(tokens.numpy()) - 1.5 * np.log(2 * np.pi)
        np.testing.assert_allclose(groups.energies(tokens)[:, k], expected, rtol=1e-9, atol=1e-9)


def test_moments_against_numpy():
    g = torch.Generator().manual_seed(0)
    tokens, shares = torch.randn(50, 3, generator=g).double(), torch.rand(50, 4, generator=g).double()
    mass, means, covariances = _moments(tokens, shares, torch.zeros(4, 3).double())
    for k in range(4):
        np.testing.assert_allclose(covariances[k], np.cov(tokens.T, aweights=shares[:, k], bias=True), atol=1e-12)
        np.testing.assert_allclose(means[k], np.average(tokens, axis=0, weights=shares[:, k]), atol=1e-12)
    torch.testing.assert_close(mass, shares.sum(0))


@pytest.mark.parametrize("seed", range(4))
def test_order_shift_and_scale_change_nothing(seed):
    tokens, _, prototypes = blobs(seed)
    tree = merge_by_overlap(tokens, prototypes, 4)
    g = torch.Generator().manual_seed(seed + 10)
    rows, columns = torch.randperm(len(tokens), generator=g), torch.randperm(len(prototypes), generator=g)
    other = merge_by_overlap(1e3 + 20 * tokens[rows].double(), 1e3 + 20 * prototypes[columns].double(), 4)
    assert ari(tree.labels[rows], other.labels) == 1
    torch.testing.assert_close(other.separations, tree.separations, rtol=1e-3, atol=1e-4)
    order = tree.masses.argsort(), other.masses.argsort()
    torch.testing.assert_close(other.groups.means[order[1]], 1e3 + 20 * tree.groups.means[order[0]], rtol=1e-4, atol=1e-2)


def test_rotation_changes_nothing():
    tokens, _, prototypes = blobs(3)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    assert ari(merge_by_overlap(tokens, prototypes, 4).labels, merge_by_overlap(tokens @ turn, prototypes @ turn, 4).labels) == 1


@pytest.mark.parametrize("rare", [5, 20])
def test_a_rare_cluster_is_not_swallowed(rare):
    g = torch.Generator().manual_seed(0)
    tokens = torch.cat([torch.randn(5000, 2, generator=g) * torch.tensor([4.0, 0.3]), 0.1 * torch.randn(rare, 2, generator=g) + torch.tensor([0.0, 6.0])])
    prototypes = torch.cat([torch.stack([torch.linspace(-9, 9, 10), torch.zeros(10)], -1), torch.tensor([[0.0, 6.0]])])
    tree = merge_by_overlap(tokens, prototypes, 2)
    assert ari(tree.labels, (torch.arange(len(tokens)) >= 5000).long()) > 0.99


def test_duplicates_join_first_and_for_nothing():
    tokens, _, prototypes = blobs(1)
    doubled = torch.cat([prototypes, prototypes + 1e-4])
    tree = merge_by_overlap(tokens, doubled, 4)
    assert ari(tree.labels, merge_by_overlap(tokens, prototypes, 4).labels) == 1
    half = len(prototypes)
    assert ari(tree.prototype_labels[:half], tree.prototype_labels[half:]) == 1


def test_prototypes_without_tokens_follow_the_nearest_group():
    tokens, _, prototypes = blobs(2)
    tree = merge_by_overlap(tokens, torch.cat([prototypes, prototypes[:1] + torch.tensor([[0.0, 0.0, 1e-6]]), torch.full((1, 3), 100.0)]), 3)
    assert tree.prototype_labels[12] == tree.prototype_labels[0] and 0 <= tree.prototype_labels[13] < 3


def test_as_many_groups_as_prototypes_and_one_group():
    tokens, labels, _ = blobs(0, K=2)
    whole = merge_by_overlap(tokens, torch.stack([tokens[labels == k].mean(0) for k in range(2)]), 2)
    assert len(whole.separations) == 0 and ari(whole.labels, labels) == 1
    one = merge_by_overlap(tokens, tokens[:5], 1)
    assert not one.labels.any() and not one.prototype_labels.any()
    torch.testing.assert_close(one.groups.means[0], tokens.double().mean(0))
    torch.testing.assert_close(float(one.masses.sum()), float(len(tokens)))


def test_equal_tokens_and_a_single_token():
    tree = merge_by_overlap(torch.ones(8, 2), torch.zeros(3, 2) + torch.arange(3)[:, None], 1)
    assert tree.labels.tolist() == [0] * 8 and tree.groups.covariances.isfinite().all()
    assert merge_by_overlap(torch.ones(1, 2), torch.ones(1, 2), 1).labels.tolist() == [0]


def test_fewer_used_prototypes_than_groups():
    "Prototypes without tokens are no groups: fewer groups come back than were asked for."
    tokens = torch.zeros(10, 2) + torch.arange(10)[:, None] * 0.01
    tree = merge_by_overlap(tokens, torch.tensor([[0.0, 0.0], [50.0, 50.0], [60.0, 60.0]]), 3)
    assert len(tree.groups.means) == 1 and tree.prototype_labels.tolist() == [0, 0, 0]


@pytest.mark.parametrize("change, words", [
    (dict(n_clusters=0), "n_clusters must be"), (dict(n_clusters=13), "n_clusters must be"), (dict(n_clusters=2.0), "n_clusters must be"),
    (dict(tau=-1.0), "tau must be"), (dict(tau=float("nan")), "tau must be"), (dict(steps=0), "steps must be"),
    (dict(tokens=torch.zeros(0, 3)), "tokens must be"), (dict(prototypes=torch.zeros(4, 2)), "prototypes must be")])
def test_faults_are_named(change, words):
    tokens, _, prototypes = blobs(0)
    arguments = {"tokens": tokens, "prototypes": prototypes, "n_clusters": 4} | change
    with pytest.raises(ValueError, match=words):
        merge_by_overlap(**arguments)


@pytest.mark.parametrize("which", ["tokens", "prototypes"])
def test_not_finite(which):
    tokens, _, prototypes = blobs(0)
    arguments = {"tokens": tokens.clone(), "prototypes": prototypes.clone()}
    arguments[which][1, 2] = torch.inf
    with pytest.raises(NonFiniteInput, match=f"{which} hold 1"):
        merge_by_overlap(**arguments, n_clusters=2)
