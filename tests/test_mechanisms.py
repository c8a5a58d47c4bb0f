"The mechanism table: collapses that are what they say, quantities that tell or do not, and a run that resumes."
import numpy as np
import pytest
import torch

from ddcl_nb.experiments import mechanisms as M
from ddcl_nb.experiments.registry import experiments, read_result

TINY = M.Extent(64, 40, 1, range(1), (16, 32, 64), 1)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(M, "SIZES", {"quick": TINY, "full": TINY})
    monkeypatch.setattr(M, "draw", lambda result, out: None)


def row(mechanism, condition, seed, **signs):
    return {"part": "training", "mechanism": mechanism, "condition": condition, "seed": seed, **signs}


def test_a_quantity_tells_only_if_a_threshold_parts_the_seeds():
    rows = [row("PMA", c, s, acc=a + 0.01 * s, distinct=d) for c, a, d in (("healthy", 0.9, 0.5), ("identical", 0.91, 0.0)) for s in range(3)]
    assert M.telling(rows, "PMA", "identical") .keys() == {"distinct"}
    assert M.gap([0, 1], [1.5, 2.5]) == 0.5 and M.gap([0, 1], [2, 3]) == 1 and M.gap([0, 1], [0.5, 2]) < 0


def test_flattened_logits_stay_flat_while_they_learn():
    torch.manual_seed(0)
    model = M.Reader("self-attention")
    before = model.mechanism.attention.in_proj_weight.detach().clone()
    M.make_hot(model.mechanism)
    after = model.mechanism.attention.in_proj_weight
    torch.testing.assert_close(after[:M.DIM], 0.01 * before[:M.DIM])
    torch.testing.assert_close(after[M.DIM:], before[M.DIM:])


@pytest.mark.parametrize("name", [name for name in M.COMPARED if M.wanted(name, "identical")])
def test_identical_queries_read_the_same(name):
    torch.manual_seed(0)
    model = M.Reader(name).eval()
    if name == M.OURS: model.mechanism.layer.init_from(model.tokens(M.digits()[0][:100]).detach(), "kmeans++")
    M.make_identical(model.mechanism)
    weights = model(M.digits()[0][:20])[1].assignments
    torch.testing.assert_close(weights, weights[..., :1].expand_as(weights), atol=1e-5, rtol=1e-4)


def test_kept_memory_of_a_fused_layer_does_not_grow_with_the_prototypes():
    tokens = torch.randn(1, 2048, 16, requires_grad=True)
    few, many = (M.kept_bytes(M.MECHANISMS[M.OURS](16, K), tokens) for K in (8, 256))
    assert many < 1.5 * few


def test_a_run_resumes_and_its_result_is_whole(tiny, tmp_path):
    seen = []

    def advance(n=1, note=""):
        seen.append(note)
        if len(seen) == 6: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): M.run("quick", out=tmp_path, advance=advance)
    kept = len((tmp_path / ".partial" / "mechanisms-quick.json").read_text())
    result = M.run("quick", out=tmp_path, advance=advance)
    assert kept > 100 and len(seen) == 6 + M.steps("quick")
    again = read_result(tmp_path / "quick" / "mechanisms.json")
    assert len(again.rows) == len(result.rows) == 3 * len(M.COMPARED) + M.steps("quick") - 3
    assert all(np.isfinite(line["ours"]).all() for line in result.about["table"]) and result.about["verdict"]
    assert [line["mechanism"] for line in M.table_1(again.rows)] == list(M.COMPARED)


def test_it_is_registered():
    assert experiments()["mechanisms"].paper == "Table 1"
