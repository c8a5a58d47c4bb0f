"Explanations against loops and definitions, and on models that are not the ones in the notebook."
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

from ddcl_nb.assign import assignments
from ddcl_nb.estimators import DDCLClusterer
from ddcl_nb.explain import (Corpus, bank_agreement, contributions, explain, faithfulness, logits_of, matched_cosine, prototype_cards, sufficiency, survey,
                             token_evidence, token_scores, training_story, views, word_scores)
from ddcl_nb.layers import DDCLAttention, DDCLReadout

POOLS = ("histogram", "centroid", "residual")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Classifier(nn.Module):
    "A readout and a head of any kind."

    def __init__(self, pool="histogram", heads=1, K=4, head=None, proto_dim=None):
        super().__init__()
        self.readout = DDCLReadout(6, K, pool=pool, n_heads=heads, proto_dim=proto_dim, temperature=2.0)
        torch.manual_seed(1)
        self.head = head or nn.Linear(self.readout.out_dim, 3)

    def forward(self, tokens, mask=None):
        return self.head(self.readout(tokens, mask).output)


def batch(B=5, N=7, seed=0):
    return random(B, N, 6, seed=seed), torch.arange(N) < torch.tensor([N, N - 1, 3, 1, 0])[:B, None]


# --- evidence of tokens

@given(N=st.integers(1, 6), K=st.integers(1, 5), T=st.floats(0.05, 50), seed=st.integers(0, 1000))
def test_evidence_is_the_log_odds_of_the_mean(N, K, T, seed):
    z, p = random(2, N, 3, seed=seed, dtype=torch.float64), random(K, 3, seed=seed + 1, dtype=torch.float64)
    mask = torch.arange(N) < torch.tensor([N, max(1, N // 2)])[:, None]
    found = token_evidence(z, mask, p, T)
    for b in range(2):
        x = z[b, mask[b]].mean(0)
        log_q = -(x - p).square().sum(-1) / T
        log_q = log_q - log_q.logsumexp(0)
        torch.testing.assert_close(found[b].sum(0), log_q - log_q.mean(), atol=1e-8, rtol=1e-8)
    by_distance = -(z[:, :, None] - p).square().sum(-1) / T
    by_hand = (by_distance - by_distance.mean(-1, keepdim=True)) * mask[..., None] / mask.sum(-1)[:, None, None]
    torch.testing.assert_close(found, by_hand, atol=1e-8, rtol=1e-8)


def test_evidence_survives_padding_translation_and_bad_input():
    z, p, mask = random(1, 4, 3, dtype=torch.float64), random(3, 3, seed=1, dtype=torch.float64), torch.tensor([[True, True, False, False]])
    dirty = z.masked_fill(~mask[..., None], math.nan)
    torch.testing.assert_close(token_evidence(dirty, mask, p, 1.0)[:, :2], token_evidence(z[:, :2], None, p, 1.0))
    torch.testing.assert_close(token_evidence(z + 1e4, mask, p + 1e4, 1.0), token_evidence(z, mask, p, 1.0), atol=1e-6, rtol=1e-6)
    assert not token_evidence(z, torch.zeros_like(mask), p, 1.0).any()
    with pytest.raises(ValueError, match=r"prototypes must be \(K, m\), got \(1, 3, 3\)"): token_evidence(z, mask, p[None], 1.0)
    with pytest.raises(ValueError, match="temperature must be positive"): token_evidence(z, mask, p, 0.0)


# --- pieces of the logits

@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("proto_dim", [None, 4])
def test_pieces_add_up_to_the_logits(pool, heads, proto_dim):
    model, (z, mask) = Classifier(pool, heads, proto_dim=proto_dim), batch()
    found = contributions(model, z, mask)
    assert found.exact and found.pieces.shape == (5, heads, 7, 4, 3)
    torch.testing.assert_close(found.base + found.by_prototype.sum((1, 2)), model(z, mask).detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.base + found.by_token.sum(1), model(z, mask).detach(), atol=1e-4, rtol=1e-4)
    assert not found.pieces[~mask[:, None].expand(-1, heads, -1)].any()


def test_pieces_of_a_histogram_are_weights_times_shares():
    model, (z, mask) = Classifier(), batch()
    found, W = contributions(model, z, mask), model.head.weight.detach()
    q = assignments(z, model.readout.bank.prototypes.detach(), 2.0, mask=mask)
    for c in range(3):
        for k in range(4):
            expected = (W[c, k] - W[c].mean()) * q[..., k] / mask.sum(-1, keepdim=True).clamp_min(1)
            torch.testing.assert_close(found.pieces[:, 0, :, k, c], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pool", POOLS)
def test_padding_changes_no_piece(pool):
    model, (z, mask) = Classifier(pool), batch()
    longer = torch.cat([z, torch.full((5, 3, 6), math.nan)], 1), torch.cat([mask, torch.zeros(5, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(contributions(model, *longer).pieces[:, :, :7], contributions(model, z, mask).pieces, atol=1e-5, rtol=1e-4)


def test_a_bent_head_is_called_a_tangent():
    bent = Classifier(head=nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)))
    with torch.no_grad():
        bent.head[0].weight *= 20
    found = explain(bent, *batch())
    assert not found.contributions.exact and "tangent" in found.note


def test_the_model_is_left_as_it_was():
    model, (z, mask) = Classifier(), batch()
    model.train()
    model.head.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    explain(model, z, mask, train=Corpus(z, mask))
    faithfulness(model, z, mask)
    sufficiency(model, z, mask, keep=(2,))
    assert model.training and not model.head.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dropout_and_frozen_parameters_are_no_obstacle():
    model = Classifier(head=nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3))).requires_grad_(False).train()
    z, mask = batch()
    assert contributions(model, z, mask).exact and set(token_scores(model, z, mask)) == {"prototype evidence", "gradient"}


def test_a_failing_model_keeps_its_mode_and_loses_the_hooks():
    class Failing(Classifier):
        def forward(self, tokens, mask=None):
            super().forward(tokens, mask)
            raise RuntimeError("no")
    model, (z, mask) = Failing(), batch()
    with pytest.raises(RuntimeError, match="no"): views(model, z, mask)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_logits_are_found_where_classifiers_put_them():
    x = random(2, 3)
    class Output(tuple): logits = x
    assert logits_of(x) is x and logits_of((x, "loss")) is x and logits_of(Output()) is x and logits_of(()) is None and logits_of("x") is None
    assert logits_of(DDCLReadout(6, 3, temperature=1.0)(batch()[0])) is None


# --- views, surveys, cards

def test_a_network_with_integer_inputs_is_seen_through_its_banks():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.readout, self.head = nn.Embedding(11, 6), DDCLAttention(6, 4, n_heads=2), DDCLReadout(6, 3), nn.Linear(3, 2)

        def forward(self, ids, mask=None):
            return {"ignored": 1}, self.head(self.readout(self.mix(self.embed(ids), mask).output, mask).output)
    ids = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(0))
    net = Network()
    for bank in (net.mix.bank, net.readout.bank):
        bank.set_temperature(1.0)
    found = explain(net, ids, batch()[1], train=Corpus(ids, batch()[1]))
    assert [(r.name, r.head, tuple(r.shares.shape)) for r in found.readings] == [("mix.bank", 0, (5, 7, 4)), ("mix.bank", 1, (5, 7, 4)), ("readout.bank", None, (5, 7, 3))]
    assert found.contributions is None and "must return logits" in found.note
    json.dumps([found.as_dict(i) for i in range(5)], allow_nan=False)


def test_a_bare_readout_a_bare_attention_and_vectors_are_explained():
    z, mask = batch()
    for model in (DDCLReadout(6, 3, temperature=1.0), DDCLAttention(6, 3, temperature=1.0)):
        found = explain(model, z, mask)
        torch.testing.assert_close(found.readings[0].shares, assignments(z, model.bank.prototypes.detach(), 1.0, mask=mask))
        assert found.contributions is None and found.readings[0].likeness is None
    vectors = explain(DDCLAttention(6, 3, temperature=1.0), z[:, 0])
    assert vectors.readings[0].shares.shape == (5, 1, 3)
    half = explain(DDCLReadout(6, 3, temperature=1.0), z.half(), mask)
    assert half.readings[0].shares.dtype == torch.float32


def test_nearest_examples_are_those_of_brute_force_over_batches():
    z, p = random(300, 4, 6), random(5, 6, seed=1)
    model = DDCLReadout(6, 5, temperature=1.0)
    model.bank.prototypes.data = p
    found, = survey(model, Corpus(z), n_examples=7)
    d = torch.cdist(z, p)  # (300, 4, 5)
    for k in range(5):
        best = d[:, :, k].min(1)
        assert [e.document for e in found.examples[k]] == best.values.argsort()[:7].tolist()
        assert [e.token for e in found.examples[k]] == [int(best.indices[e.document]) for e in found.examples[k]]
    assert found.tokens == 1200 and torch.equal(found.nearest, torch.bincount(d.argmin(-1).flatten(), minlength=5))
    assert float(found.rank(torch.tensor([0.0, 1e9]))[1]) == 1 and float(found.rank(torch.tensor([0.0]))[0]) == 0


def test_the_same_text_is_one_example():
    z = random(1, 1, 6).expand(20, 3, 6) + 1e-3 * random(20, 3, 6)
    z = torch.cat([z, random(4, 3, 6, seed=2)])
    texts = ["the same"] * 20 + [f"other {i}" for i in range(4)]
    model = DDCLReadout(6, 2, temperature=1.0)
    found, = survey(model, Corpus(z, texts=texts), n_examples=5)
    for k in range(2):
        shown = [e.text for e in found.examples[k]]
        assert len(set(shown)) == len(shown)


def test_cards_count_words_and_labels_by_shares():
    far = torch.tensor([[9.0, 0], [-9, 0]])
    z = far[torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]])] + 0.01 * random(3, 3, 2)
    model = DDCLReadout(2, 2, temperature=1.0)
    model.bank.prototypes.data = far
    names = [["cat", "cat", "of"], ["cat", "of", "of"], ["of", "dog", "dog"]]
    right, left = prototype_cards(model, Corpus(z, names=names, labels=[0, 1, 1], label_names=["a", "b"]))
    assert (right.prototype, right.nearest, right.usage) == (1, 6, pytest.approx(2 / 3)) and left.words[0][0] == "cat"
    assert left.classes[0] == ("a", pytest.approx(2 / 3), pytest.approx(1 / 3)) and left.purity == pytest.approx(2 / 3)
    assert right.classes[0][:2] == ("b", pytest.approx((2 / 3 + 1) / 2)) and right.neighbours == [(0, pytest.approx(18))]
    assert "[" in left.examples[0].text and "prototype 0 of bank" in str(left)
    json.dumps(right.as_dict(), allow_nan=False)


def test_cards_of_texts_of_nothing_and_of_one_prototype():
    X = np.concatenate([np.random.default_rng(0).normal(size=(30, 3)) + 5, np.random.default_rng(1).normal(size=(30, 3)) - 5])
    texts = [f"ball goal {i}" for i in range(30)] + [f"rocket moon {i}" for i in range(30)]
    model = DDCLClusterer(2, random_state=0).fit(X)
    cards = prototype_cards(model, Corpus(X, texts=texts))
    assert {frozenset(w for w, _ in card.words[:2]) for card in cards} == {frozenset({"ball", "goal"}), frozenset({"rocket", "moon"})}
    assert prototype_cards(model, Corpus(X, texts=["!"] * 60))[0].words == []
    one, = prototype_cards(DDCLClusterer(1, random_state=0).fit(X), Corpus(X))
    assert one.neighbours == [] and one.usage == pytest.approx(1) and one.purity is None


def test_word_scores_are_their_formula():
    counts = torch.tensor([[5.0, 1], [2, 2], [0, 7]]).double()
    n, total, prior = counts.sum(0), counts.sum(1), 10.0
    for k in range(2):
        for w in range(3):
            alpha = prior * total[w] / total.sum()
            y, rest, own, other = counts[w, k], total[w] - counts[w, k], n[k], n.sum() - n[k]
            odds = math.log((y + alpha) / (own + prior - y - alpha)) - math.log((rest + alpha) / (other + prior - rest - alpha))
            expected = odds / math.sqrt(1 / (y + alpha) + 1 / (rest + alpha))
            assert float(word_scores(counts, prior)[w, k]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="counts must be"): word_scores(-counts)


# --- clusterers

def test_a_clusterer_is_explained_by_its_tokens():
    z = random(40, 5, 3, dtype=torch.float64) + 6 * torch.eye(3, dtype=torch.float64)[torch.arange(40) % 3][:, None]
    mask = torch.arange(5) < (1 + torch.arange(40) % 5)[:, None]
    mean = torch.stack([x[m].mean(0) for x, m in zip(z, mask)])
    model = DDCLClusterer(3, n_prototypes=6, random_state=0).fit(mean.numpy())
    found = explain(model, z, mask, train=Corpus(mean))
    q = found.readings[0].shares[:, 0]
    groups = torch.nn.functional.one_hot(torch.from_numpy(model.prototype_labels_)).double()
    np.testing.assert_allclose(q @ groups, model.predict_proba(mean.numpy()), atol=1e-6)
    torch.testing.assert_close(found.readings[0].evidence.sum(1).softmax(-1), q, atol=1e-8, rtol=1e-6)
    with pytest.raises(ValueError, match=r"inputs must be \(B, 3\) or \(B, N, 3\)"): explain(model, z[..., :2])


@pytest.mark.parametrize("model, error", [(object(), "model must be a torch module"), (nn.Linear(2, 2), "no tokens reached a prototype bank")])
def test_what_cannot_be_explained_says_so(model, error):
    with pytest.raises((TypeError, ValueError), match=error): explain(model, torch.randn(3, 2))


def test_wrong_corpora_and_foreign_surveys_are_refused():
    z, mask = batch()
    with pytest.raises(ValueError, match="texts must have one entry for each of 5 documents, got 1"): Corpus(z, texts=["a"])
    with pytest.raises(ValueError, match="inputs hold no documents"): Corpus(z[:0])
    foreign = survey(DDCLReadout(6, 9, temperature=1.0), Corpus(z, mask))
    with pytest.raises(ValueError, match="train is a survey of other banks: bank"): explain(Classifier(), z, mask, train=foreign)


# --- faithfulness

def test_curves_are_those_of_a_loop():
    model, (z, mask) = Classifier(), batch()
    scores = random(5, 7, seed=3)
    found = faithfulness(model, z, mask, rankings={"given": scores}, fractions=(0.5, 1.0))
    predicted = model(z, mask).argmax(-1)
    for b in range(5):
        order = sorted(torch.nonzero(mask[b])[:, 0].tolist(), key=lambda n: -scores[b, n])
        for column, fraction in enumerate((0.0, 0.5, 1.0)):
            n = round(fraction * len(order))
            for kind, stay in (("deletion", order[n:]), ("insertion", order[:n])):
                keep = torch.zeros_like(mask[b]).index_fill(0, torch.tensor(stay, dtype=torch.int64), True)
                p = model(z[b:b + 1], keep[None]).detach().softmax(-1)[0, predicted[b]]
                assert float(getattr(found, kind)["given"][b, column]) == pytest.approx(float(p), abs=1e-6)
    mean, error = found.gain("deletion", "given")
    d = found.area("deletion", "random") - found.area("deletion", "given")
    assert mean == pytest.approx(float(d.mean())) and error == pytest.approx(float(d.std()) / math.sqrt(5))


def test_only_candidates_go_and_perturb_sees_what_stays():
    model, (z, mask) = Classifier(), batch()
    candidates, seen = mask.clone(), []
    candidates[:, 0] = False

    def perturb(keep):
        seen.append(keep)
        return z, keep
    faithfulness(model, z, mask, candidates=candidates, perturb=perturb, fractions=(0.4, 1.0), repeats=1)
    assert all((keep[:, 0] == mask[:, 0]).all() and not (keep & ~mask).any() for keep in seen) and len(seen) == 2 + 3 * 2 * 2


@pytest.mark.parametrize("fractions", [(), (0.5, 0.2), (0.0, 0.5), (0.5, 1.5), (0.2, 0.2)])
def test_wrong_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions must rise"): faithfulness(Classifier(), *batch(), fractions=fractions)


def test_wrong_rankings_are_refused():
    with pytest.raises(ValueError, match=r"rankings: mine must have shape \(5, 7\), got \(5, 6\)"): faithfulness(Classifier(), *batch(), rankings={"mine": torch.zeros(5, 6)})


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("heads", [1, 2])
def test_keeping_every_prototype_keeps_every_prediction(pool, heads):
    z, mask = batch(B=4)
    assert sufficiency(Classifier(pool, heads), z, mask, keep=(4 * heads,)) == {"contribution": [1.0], "share": [1.0], "random": [1.0]}


def test_what_is_kept_is_the_base_and_the_kept_pieces():
    model, (z, mask) = Classifier(), batch(B=4)
    found, q = contributions(model, z, mask), views(model, z, mask)[0]
    share = q.shares.sum(1) / mask.sum(-1, keepdim=True)
    kept = torch.zeros(4, 4).scatter(1, share.topk(2, -1).indices, 1)
    logits = found.base + (found.by_prototype[:, 0] * kept[..., None]).sum(1)
    expected = float((logits.argmax(-1) == found.logits.argmax(-1)).float().mean())
    assert sufficiency(model, z, mask, keep=(2,))["share"] == [expected]


def test_agreement_knows_permutations_and_chance():
    a = random(6, 50)
    assert matched_cosine(a, a[torch.randperm(6)]) == pytest.approx(1)
    rows = bank_agreement([a, a.flip(0), random(6, 50, seed=1), random(4, 50, seed=2)])
    assert len(rows) == 6 and rows[0]["excess"] == pytest.approx(1) and all(abs(row["excess"]) < 0.2 for row in rows[1:3])
    with pytest.raises(ValueError, match="two or more of one width"): bank_agreement([a])


def test_a_story_needs_the_rows_of_diagnostics():
    row = {"loss": 2.0, "variance": 1.0, "separation_min": 1e-9, "tau": 1.2, "critical": 4.0, "perplexity": 1.0}
    story = training_story([row, {**row, "critical": 0.04}])
    assert "as good as merged" in story[-1] and "nothing held the encoder" in story[2] and "1 or more in 2 epochs" in story[1]
    with pytest.raises(ValueError, match="got none"): training_story([])
    with pytest.raises(ValueError, match="rows without tau"): training_story([{k: v for k, v in row.items() if k != "tau"}])


# --- the experiment

def rows_of(seeds, pools=("histogram", "residual")):
    for pool in pools:
        for seed in range(seeds):
            key = {"data": "toy", "readout": pool, "seed": seed}
            yield key | {"test": "model", "ranking": "-", "test_acc": 0.8}
            for test in ("text", "embeddings"):
                yield key | {"test": test, "ranking": "prototype evidence", "deletion_gain": 0.1 + seed / 100, "deletion_over_gradient": -0.05}
            for ranking, kept in (("share", 0.9), ("random", 0.4)):
                yield key | {"test": "prototypes", "ranking": ranking, "kept_2": kept}
            yield key | {"test": "seeds", "ranking": "matched"} | ({"words_ari": 0.2} if seeds > 1 else {})


def test_the_verdict_of_the_experiment_says_what_its_rows_say():
    from ddcl_nb.experiments.faithfulness import verdict
    words = verdict(list(rows_of(3)))
    assert "by +0.110 ± 0.006 (toy, histogram), +0.110 ± 0.006 (toy, residual)" in words and "-0.050 ± 0.000 (toy, histogram)" in words
    assert "0.90 ± 0.00 (toy, residual)" in words and "alike to 0.20" in words
    alone = verdict(list(rows_of(1)))
    assert "±" not in alone and "alike" not in alone and "nan" not in alone


def test_without_data_sets_the_experiment_reads_docstrings(tmp_path, monkeypatch):
    import ddcl_nb.data as data
    from ddcl_nb.experiments import faithfulness as experiment
    monkeypatch.setattr(data, "data_folders", lambda: [("an empty folder", tmp_path)])
    assert experiment.at_hand() == [] and experiment.steps("quick", [0]) == 2 * (2 + 2 * 3 + 3)
    (train, test), = experiment.corpora()
    assert train.name == test.name and len(train) == pytest.approx(2 * len(test), abs=2) and min(len(t.split()) for t in test.inputs) >= 8
