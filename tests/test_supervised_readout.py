"Readouts trained on labels: texts without padding, one frame for all, readings that add up, and a run that is interrupted and goes on."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

pytest.importorskip("transformers")
from ddcl_nb.data import DataSet
from ddcl_nb.encoders import TokenEmbeddings
from ddcl_nb.experiments import supervised_readout as S

EXTENT = S.Extent(None, None, 60, 6, 5, 2, 16, 3)


def documents(n, seed=0, dim=72, classes=3):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    x = torch.randn(n, 6, dim, generator=g) + 2 * torch.nn.functional.one_hot(labels, dim)[:, None]
    return S.Documents.of(TokenEmbeddings(x.half(), torch.arange(6) < torch.randint(2, 7, (n, 1), generator=g)), labels.numpy())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 7), st.integers(0, 999))
def test_every_text_is_walked_once_and_its_tokens_are_its_own(n, size, most, seed):
    torch.manual_seed(seed)
    docs = documents(n, seed, dim=4)
    docs = docs.__class__(docs.tokens, docs.starts, docs.lengths, docs.means, torch.arange(n))
    walked = S.Batches(docs, size, most)
    seen = []
    for tokens, mask, _, rows in walked:
        assert (mask.sum(1) == docs.lengths[rows].clamp_max(most)).all()
        for x, keep, row in zip(tokens, mask, rows.tolist()):
            own = docs.tokens[docs.starts[row]:docs.starts[row] + docs.lengths[row]].float()
            assert all((own == token).all(1).any() for token in x[keep])
        seen += rows.tolist()
    assert sorted(seen) == list(range(n)) and len(walked) == -(-n // size)


def test_half_of_the_pieces():
    assert S.half(torch.tensor([[1., -5, 1, 1], [2, 2, -2, 2], [0, 0, 0, -1]])).tolist() == [1, 2, 1]


@pytest.mark.parametrize("method", S.MECHANISMS)
def test_a_reader_knows_no_padding_and_learns(method):
    docs = documents(90)
    reader, _ = S.learn(method, S.Setting(1e-2, False, 4), docs, 3, EXTENT, 0)
    together = reader.eval()(*docs.batch(torch.arange(9))[:3])[0]
    alone = torch.cat([reader(*docs.batch(torch.tensor([i]))[:3])[0] for i in range(9)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert S.accuracy(S.predict(reader, docs), docs) > 0.45


def test_texts_to_choose_on_are_none_of_those_that_trials_learn_from():
    docs = documents(50, dim=4)
    tried, choice = S.parted(docs, None, 30)
    assert len(choice) == 10 and len(tried) == 30 and not set(tried.starts.tolist()) & set(choice.starts.tolist())
    assert S.parted(docs, choice, 100)[1] is choice and len(S.parted(docs, choice, 100)[0]) == 50


class Words:
    "What a study asks of an encoder beside the embeddings."
    def token_names(self, texts, length):
        return [[*text.split(), "[SEP]"] for text in texts]


@pytest.fixture
def tiny(monkeypatch):
    def made(name, extent, encoder):
        train, test = documents(60), documents(30, 1)
        texts = [DataSet(name, ["some words of a text"] * len(part), part.labels.numpy(), list("abc"), "made here", "none") for part in (train, test)]
        return S.Material(name, EXTENT, texts, Words(), train, *S.parted(train, None, EXTENT.tried), test)
    monkeypatch.setattr(S, "material", made)
    monkeypatch.setattr(S, "Encoder", lambda name: None)
    monkeypatch.setattr(S, "at_hand", lambda size: {"blobs": EXTENT})
    monkeypatch.setattr(S, "told", lambda docs, answers: [0, 1])
    monkeypatch.setattr(S, "draw", lambda result, out: None)
    monkeypatch.setattr(S, "TRIALS", (S.Setting(1e-2, True, 3), S.Setting(1e-2, False, 4)))
    monkeypatch.setattr(S, "papers_row", lambda found, seed, row=S.papers_row: row(found, seed, epochs=2))


def test_an_interrupted_run_goes_on_to_the_same_rows(tiny, tmp_path):
    whole = S.run("quick", range(2), tmp_path / "whole")
    seen = []

    def stop(n=1, note=""):
        seen.append(note)
        if len(seen) == 31: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): S.run("quick", range(2), tmp_path / "parts", stop)
    parts = S.run("quick", range(2), tmp_path / "parts")
    timeless = lambda rows: [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]
    assert timeless(parts.rows) == timeless(whole.rows) and parts.about["readings"] == whole.about["readings"]
    assert not any("right" in row for row in parts.rows) and len(seen) == 31
    found = parts.about["readings"]["blobs"]
    assert 1 <= found["half_prototypes"] <= found["number"] and len(found["texts"]) == 2
    for one in found["texts"]:
        for adds in ([x for _, x in one["tokens"]], [*(p["adds"] for p in one["prototypes"]), one["others"]]):
            assert one["constant"] + sum(adds) == pytest.approx(one["margin"], abs=1e-3)
    assert all(list(row)[:3] == ["data", "method", "seed"] for row in parts.rows) and "blobs: " in parts.about["verdict"]
    assert len(parts.about["trials"]) == 2 * 4 + 6 * 2 and len(parts.about["pairs"]) == 3 * 5


def made(accuracies, n=203, seeds=5):
    "Rows of a study in which a method is right on the first texts, one text more with every seed."
    rows = [{"data": "blobs", "method": m, "choice_acc": a} for m, a in accuracies.items()]
    for seed in range(seeds):
        for m, a in accuracies.items():
            right = np.arange(n) < round(a * n) + seed
            rows.append({"data": "blobs", "method": m, "seed": seed, "test_acc": right.mean(), "right": np.packbits(right).tobytes().hex()})
        rows += [{"data": "blobs", "method": m, "seed": seed, "test_acc": 0.7, "nmi": 0.1, "ari": 0.1, "right": "00"} for m in (S.PAPERS, S.BASE)]
    return S.flat(rows)


def test_paired_differences_are_those_of_the_bits():
    rows = made(dict.fromkeys((*S.VECTORS, *S.MECHANISMS), 0.5) | {"DDCL residual": 0.6, "PMA": 0.55})
    row = S.gap(rows, "blobs")
    assert (row["method"], row["other"]) == ("DDCL residual", "PMA")
    assert row["difference"] == pytest.approx((round(0.6 * 203) - round(0.55 * 203)) / 203) and row["se_seeds"] == pytest.approx(0, abs=1e-12)
    share = row["difference"]
    assert row["se_texts"] == pytest.approx((share * (1 - share) / 203)**0.5, rel=0.2)


def test_the_verdict_says_what_the_rows_say():
    plain = dict.fromkeys((*S.VECTORS, *S.MECHANISMS), 0.5)
    assert "best: reached." in S.verdict(made(plain | {"DDCL residual": 0.8}))
    behind = S.verdict(made(plain | {"NetVLAD": 0.8}))
    assert "best: not reached." in behind and "outside what another test set could change" in behind and "NetVLAD 0.8" in behind
    assert S.our_pool(made(plain | {"DDCL centroid": 0.7}), "blobs") == "DDCL centroid"
    lines = S.table(made(plain))
    assert [line["measure"] for line in lines] == ["test accuracy (against the best other readout)", "nmi", "ari"] and lines[0]["ours"] is not None
