"Clusters of posts without labels: the agreement, its neighbours, and a run that is interrupted and goes on."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

pytest.importorskip("transformers")
from ddcl_nb.experiments import newsgroups as n


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(4, 40), st.integers(0, 10**6))
def test_agreement_is_a_mutual_information(K, B, seed):
    g = torch.Generator().manual_seed(seed)
    q, other = (torch.rand(2, B, K, generator=g, dtype=torch.float64) * 6).softmax(-1)
    value, order = float(n.agreement(q, other)), torch.randperm(K, generator=g)
    assert -1e-9 <= value <= math.log(K) + 1e-9
    assert value == pytest.approx(float(n.agreement(other, q)), abs=1e-12)
    assert value == pytest.approx(float(n.agreement(q[:, order], other[:, order])), abs=1e-12)


def test_agreement_of_hard_clusters_is_the_score_of_scikit_learn():
    from sklearn.metrics import mutual_info_score
    a, b = np.random.default_rng(0).integers(0, 4, (2, 200))
    both = np.concatenate([a, b]), np.concatenate([b, a])
    hard = lambda x: F.one_hot(torch.from_numpy(x)).double()
    assert float(n.agreement(hard(a), hard(b))) == pytest.approx(mutual_info_score(*both), abs=1e-8)


def test_a_post_is_never_its_own_neighbour_even_among_copies():
    x = F.normalize(torch.randn(5, 8)).repeat_interleave(4, 0)
    near = n.neighbours(x, 3, rows=7)
    assert not (near == torch.arange(20)[:, None]).any()
    assert (near // 4 == torch.arange(20)[:, None] // 4).all()


def test_pooled_vectors_are_kept_and_made_once(tmp_path, monkeypatch):
    encoder = n.Encoder("offline")
    texts = [f"text number {i}" for i in range(5)]
    monkeypatch.setattr(n, "PIECE", 2)
    made = n.pooled(encoder, texts, 16, tmp_path)
    assert made["mean"].shape == (5, encoder.dim) and len(list(tmp_path.glob("*.safetensors"))) == 3
    torch.testing.assert_close(made["mean"], encoder.tokens(texts, 16, cache=False, keep="float32").mean(), atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(n, "_pooled", lambda *args: pytest.fail("made again"))
    assert torch.equal(n.pooled(encoder, texts[:4], 16, tmp_path)["cls"], made["cls"][:4])


@pytest.fixture
def blobs(monkeypatch):
    labels = np.arange(4).repeat(30)
    g = torch.Generator().manual_seed(0)
    x = F.normalize(torch.eye(4, 24).repeat_interleave(30, 0) + 0.12 * torch.randn(120, 24, generator=g))
    data = n.Posts("blobs", [str(i) for i in range(120)], [""] * 120, labels, list("abcd"), "made here")
    monkeypatch.setattr(n, "inputs", lambda size, encoder: ({name: x for name in n.INPUTS}, data))
    return n.Size(120, 8, range(2), 20, 64, thorough=False)


def test_every_method_finds_what_is_there_and_the_verdict_says_so(blobs, tmp_path):
    result = n.run("quick", out=tmp_path, size=blobs)
    scored = [row for row in result.rows if "nmi" in row and row["method"] != n.PAPERS]
    assert len(scored) == 2 * (2 + 2 * 7) and min(row["nmi"] for row in scored) > 0.9
    assert "missed in both" in result.about["verdict"] and all(row["stability"] > 0.8 for row in result.rows if "stability" in row and row["method"] != n.PAPERS)
    assert not list((tmp_path / ".partial").iterdir())


def test_an_interrupted_run_goes_on_to_the_same_rows(blobs, tmp_path, monkeypatch):
    whole = n.run("quick", out=tmp_path / "whole", size=blobs)

    def stop(_=1, note=""):
        if "Gaussian" in note:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        n.run("quick", out=tmp_path / "parts", size=blobs, advance=stop)
    calls, real = [], n.kmeans
    monkeypatch.setattr(n, "kmeans", lambda *args: calls.append(1) or real(*args))
    parts = n.run("quick", out=tmp_path / "parts", size=blobs)
    timeless = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert timeless(parts.rows) == timeless(whole.rows)
    assert len(calls) == 3 * 2 + 2 * 2 - 2  # the first seed's k-means on CLS and body were there
