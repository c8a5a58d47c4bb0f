"Position 2: bits that are counted, a prior that sees the past only, and a run that resumes."
import numpy as np
import pytest
import torch

from ddcl_nb.experiments import bottleneck as B
from ddcl_nb.experiments.registry import experiments, read_result

pytest.importorskip("vector_quantize_pytorch")
TINY = B.Allowance(128, 40, 2, (64, 2), 6000, 5, 4, range(1), 16, 64, warm=1)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(B, "ALLOWANCES", {"quick": TINY, "full": TINY})
    monkeypatch.setattr(B, "PARTS_OF", {"course": ((B.OURS, B.BASE, "straight-through"), B.course_row), "text": ((B.OURS, B.BASE, "FSQ"), B.text_row), "images": (B.IMAGE, B.image_row)})
    monkeypatch.setattr(B, "draw", lambda *args: None)


@pytest.mark.parametrize("M", [1, 3, 16])
def test_rounded_weights_add_up_and_keep_their_order(M):
    torch.manual_seed(M)
    q = torch.rand(200, 7).pow(3)
    parts = B.whole_shares(q, M)
    assert (parts.sum(1) == M).all() and (parts >= 0).all()
    assert (parts.gather(1, q.argmax(1, keepdim=True)) == parts.max(1, keepdim=True).values).all()


def test_bits_are_those_of_an_ideal_coder():
    torch.manual_seed(0)
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    train, test = (torch.multinomial(p, 40_000, replacement=True).reshape(-1, 2) for _ in range(2))
    assert abs(B.table_bits(train, test, 4) - 2 * 1.75) < 0.02
    unseen = B.table_bits(torch.zeros(100, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.long), 2)
    assert np.isclose(unseen, -np.log2(0.5 / 101))


def test_finer_mixtures_cost_more_and_come_nearer_to_the_model():
    torch.manual_seed(0)
    images = B.labelled("quick", "train")[0]
    model = B.trained(B.Softly(8, 4, 2, 0, tau=0.3), images[:128], 3, 0)
    points = {(p["how"], p["level"]): p for p in B.sendings(model, images[:128], images[128:256], 8)}
    weights = [points["weights", M] for M in B.PARTS]
    assert all(a["bits"] < b["bits"] for a, b in zip(weights, weights[1:]))
    exact = points["as floats", 32.0]["mse"]
    assert abs(weights[-1]["mse"] - exact) <= abs(weights[0]["mse"] - exact) + 1e-7


def test_a_prior_draws_what_it_was_shown():
    shown = torch.tensor([[0, 1, 2, 3]]).repeat(32, 1)
    prior = B.fitted_prior(shown, 4, 60, 0)
    assert B.prior_bits(prior, shown) < 0.6
    assert torch.equal(prior.sample(3, 5), prior.sample(3, 5))


def test_distances_between_distributions():
    torch.manual_seed(0)
    a = torch.randn(500, 4)
    assert B.frechet_distance(a, a) < 1e-6 < B.frechet_distance(a, a + 1)
    assert np.isclose(B.frechet_distance(a, a + 1), 4, atol=1e-4)
    text = torch.randint(0, 3, (20, 30))
    assert B.trigram_distance(text, text) == 0 and 0 < B.trigram_distance(text, torch.randint(0, 3, (20, 30))) < 1


def test_a_run_resumes_and_its_result_is_whole(tiny, tmp_path):
    seen = []

    def advance(n=1, note=""):
        seen.append(note)
        if len(seen) == 6: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): B.run("quick", out=tmp_path, advance=advance)
    result = B.run("quick", out=tmp_path, advance=lambda n=1, note="": seen.append(note))
    assert len(seen) == 6 + B.bottleneck_steps("quick") and len(result.rows) == 14
    kept = read_result(tmp_path / "quick" / "bottleneck.json")
    assert kept.rows == result.rows and kept.about["verdict"].startswith("Rate: DDCLQuantize")
    assert {row["part"] for row in kept.rows} == {"course", "text", "images"} and len(kept.about["tuning"]) == 4
    assert "bottleneck" in experiments()
