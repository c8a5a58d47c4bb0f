"Subject lines from centroids: what a decoder reads and writes, references, and a run that resumes."
import numpy as np
import pytest
import torch

from ddcl_nb.experiments import summarisation as S
from ddcl_nb.experiments.registry import experiments, read_result

pytest.importorskip("rouge_score")
pytest.importorskip("tokenizers")
TINY = S.SummaryExtent(60, 20, 16, 1, 16, 300, range(1), 6, 10)
NAMES = list(S.writers(TINY))


@pytest.fixture
def docstrings(monkeypatch):
    def missing(split):
        raise S.DataNotFound(split)
    monkeypatch.setattr(S, "load_aeslc", missing)
    for cached in (S.mails, S.summary_material):
        cached.cache_clear()
    yield
    for cached in (S.mails, S.summary_material):
        cached.cache_clear()


def made(name, seed=0):
    torch.manual_seed(seed)
    return S.Writer(TINY, 50, S.writers(TINY)[name]()).eval()


@pytest.mark.parametrize("name", NAMES)
def test_only_what_counts_is_read(name):
    writer, texts = made(name), torch.randint(3, 50, (3, 16))
    texts[:, 9:] = S.PAD
    summaries = torch.tensor([[S.START, 5, 6, S.END, S.PAD]] * 3)
    shorter = writer.scores(summaries, *writer.remember(texts))
    with torch.no_grad():
        writer.places[9:] += 7
    torch.testing.assert_close(writer.scores(summaries, *writer.remember(texts)), shorter, atol=1e-5, rtol=1e-4)
    other = texts.clone()
    other[:, 3] = 3 + (texts[:, 3] - 2) % 47
    changed = (writer.scores(summaries, *writer.remember(other)) - shorter).abs().max()
    assert changed == 0 if name == "no encoder" else changed > 1e-6


@pytest.mark.parametrize("name", ["full", "shares N/4", "no encoder"])
def test_what_is_written_is_the_likeliest_piece_each_time(name):
    writer, texts = made(name, 3), torch.randint(3, 50, (4, 16))
    memory, mask = writer.remember(texts)
    for i, row in enumerate(writer.write(texts)):
        assert len(row) <= TINY.summary and not {S.PAD, S.START, S.END} & set(row)
        logits = writer.scores(torch.tensor([[S.START, *row]]), *(None if x is None else x[i:i + 1] for x in (memory, mask)))[0]
        logits[:, [S.PAD, S.START]] = -torch.inf
        expected = [*row, S.END][:TINY.summary]
        assert logits.argmax(-1)[:len(expected)].tolist() == expected


def test_the_loss_counts_the_end_and_not_the_padding():
    writer, texts = made("full"), torch.randint(3, 50, (2, 16))
    short, longer = torch.tensor([[S.START, 5, S.END]] * 2), torch.tensor([[S.START, 5, S.END, S.PAD, S.PAD]] * 2)
    torch.testing.assert_close(writer(texts, short), writer(texts, longer))
    by_hand = -torch.log_softmax(writer.scores(short[:, :-1], *writer.remember(texts)), -1).gather(-1, short[:, 1:, None]).mean()
    torch.testing.assert_close(writer(texts, short), by_hand)


def test_docstrings_stand_in_and_no_pair_is_in_both_parts(docstrings):
    train, held, test = S.mails("train", 300), S.mails("dev", 100), S.mails("test", 100)
    assert len(train.texts) == 300 and len(test.texts) == 100 and not set(train.texts) & set(test.texts) | set(held.texts) & set(test.texts)
    assert all(text.strip() and own[0].strip() for text, own in zip(train.texts, train.summaries)) and "docstrings" in train.source


def test_a_run_resumes_to_the_same_rows(docstrings, monkeypatch, tmp_path):
    whole = S.run("quick", out=tmp_path / "whole", size=TINY)
    measure, left = S.summary_row, [2]

    def tired(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return measure(*args)
    monkeypatch.setattr(S, "summary_row", tired)
    with pytest.raises(KeyboardInterrupt):
        S.run("quick", out=tmp_path / "parts", size=TINY)
    left[0] = 100
    parts = S.run("quick", out=tmp_path / "parts", size=TINY)
    assert left[0] == 100 - (len(NAMES) - 2)
    for a, b in zip(whole.rows, parts.rows, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert read_result(tmp_path / "parts" / "quick" / "summarisation.json").about["verdict"] == whole.about["verdict"]
    assert np.isfinite([row["rougeL"] for row in parts.rows]).all() and "2102.08606" in experiments()["summarisation"].paper
