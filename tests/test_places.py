"The bench of places: networks of equal size, verdicts that follow from rows, and a run that resumes to a whole result."
import numpy as np
import pytest
import torch

from ddcl_nb.experiments import places as P
from ddcl_nb.experiments.registry import experiments, read_result
from ddcl_nb.training import banks

NAMES = ("plain", "PrototypeFFN", P.FFN, "RMSNorm", "one bank and a residual", "split and merge", "context beside", "bank listens")
TINY = P.Extent(40, 20, 40, {"text": 1, "images": 1, "pairs": 1}, 20, range(1), (P.FFN,))


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(P, "EXTENTS", {"quick": TINY, "full": TINY})
    monkeypatch.setattr(P, "VARIANTS", {name: P.VARIANTS[name] for name in NAMES})
    monkeypatch.setattr(P, "draw", lambda result, out: None)


@pytest.fixture(scope="module")
def digits():
    return P.digit_bench(60, 20)


@pytest.mark.parametrize("name", [name for name, variant in P.VARIANTS.items() if variant.equal])
def test_variants_have_as_many_parameters(name, digits):
    plain, network = P.Network(digits), P.build(digits, name)
    assert abs(P.parameters(network) / P.parameters(plain) - 1) < 0.02
    assert abs(P.operations(network, digits) / P.operations(P.build(digits, "plain"), digits) - 1) < 0.6  # contexts read half of the tokens


def test_seeds_and_order_make_a_run_the_same(digits):
    runs = [P.trained(P.build(digits, "SerialDDCL", 3), digits, P.VARIANTS["SerialDDCL"], 1, 20, 3)[0] for _ in range(2)]
    for a, b in zip(runs[0].parameters(), runs[1].parameters()):
        assert torch.equal(a, b)


def test_padding_changes_nothing():
    bench = P.text_bench((["a b c a b", "c c a", "b a b c"], np.array([0, 1, 0])), (["a b"], np.array([1])), P.words, 6, "made")
    for name in ("SerialDDCL", "GatedDDCL", P.FFN, "PrototypeNorm", "bank listens, context beside", "causal, last token"):
        network = P.build(bench, name, 0).eval()
        P.place(network, bench.train, None, 0)
        before = network(bench.train[1:2])[0]
        network.stem.position.data[3:] += 7.0
        torch.testing.assert_close(network(bench.train[1:2])[0], before, atol=1e-4, rtol=1e-4)


def test_a_shared_bank_is_one_parameter_and_a_residual_starts_at_zero(digits):
    shared, residual = P.build(digits, "one bank for both blocks"), P.build(digits, "one bank and a residual")
    first, second = banks(shared).values()
    assert first.prototypes is second.prototypes
    first, second = banks(residual).values()
    assert torch.equal(first.prototypes, second.prototypes)
    assert sum(P.is_fast(name) for name, _ in residual.named_parameters()) == 2


def test_a_growing_bank_is_trained_on(digits):
    network = P.build(digits, "split and merge")
    P.trained(network, digits, P.VARIANTS["split and merge"], 3, 20, 0)
    for bank in banks(network).values():
        assert P.FEWEST < bank.n_prototypes == len(bank.prototypes) <= P.MOST


def test_a_bank_is_left_as_it_is_where_nothing_is_near_and_nothing_would_split():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0], [4, 0], [0, 4], [4, 4], [9, 9]])
    tokens = (centres[:, None] + 0.1 * torch.randn(5, 100, 2)).flatten(0, 1)
    assert torch.equal(P.resized(centres, tokens, torch.tensor(0.5)), centres)
    assert len(P.resized(torch.cat([centres, centres[:2] + 0.01]), tokens, torch.tensor(0.5))) == 5
    assert len(P.resized(centres[:4], tokens, torch.tensor(0.5))) == 5


def rows(method, shifts):
    control = P.VARIANTS[method].control
    return [{"data": d, "method": m, "seed": s, "accuracy": 0.6 + 0.02 * s + (m == method) * (shift + 0.001 * (-1) ** s)}
            for d, shift in shifts.items() for s in range(5) for m in (control, method)]


@pytest.mark.parametrize("shifts, said", [((0.02, 0.03), "helps"), ((-0.02, -0.03), "hurts"), ((0.02, 0.0), "better on text only"),
                                          ((0.02, -0.03), "better on text, worse on images"), ((0.0, 0.0), "no difference")])
def test_words_follow_from_paired_differences(shifts, said):
    made = rows("GatedDDCL", dict(zip(("text", "images"), shifts)))
    assert P.word(P.effects(made)["GatedDDCL"]) == said
    assert ("Helps on every task: GatedDDCL." in P.places_verdict(made)) == (said == "helps")


def test_one_seed_settles_nothing():
    made = [row for row in rows("GatedDDCL", {"text": 0.5}) if row["seed"] == 0]
    assert P.word(P.effects(made)["GatedDDCL"]) == "no difference" and "GatedDDCL no difference (text +50.1, one seed)" in P.places_verdict(made)


def test_a_run_resumes_and_its_result_is_whole(tiny, tmp_path):
    seen = []

    def advance(n=1, note=""):
        seen.append(note)
        if len(seen) == 4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): P.run("quick", out=tmp_path, advance=advance)
    result = P.run("quick", out=tmp_path, advance=advance)
    again = read_result(tmp_path / "quick" / "places.json")
    assert len(again.rows) == len(result.rows) == P.steps("quick") == len(P.plan(TINY, [0])) and len(seen) == 4 + P.steps("quick")
    assert [bool(row.get("status")) for row in again.rows] == [row["method"] == P.FFN and row["data"] == "images" for row in again.rows]
    assert again.about["verdict"].startswith("Points of test accuracy")


def test_it_is_registered():
    assert "open ends" in experiments()["places"].paper
