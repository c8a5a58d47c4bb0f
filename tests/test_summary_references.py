"Subject lines: which references of a mail count."
from types import SimpleNamespace

import pytest

from ddcl_nb.experiments import summarisation as S

pytest.importorskip("rouge_score")


@pytest.fixture
def three_mails(monkeypatch):
    data = SimpleNamespace(inputs=["a body", " ", "body without a subject", "a  known body"], targets=[["own", "", "another"], ["no body"], [" ", "another"], ["own"]], source="made")
    others = SimpleNamespace(inputs=["another body", "a known body"], targets=[["own"], ["own"]], source="made")
    monkeypatch.setattr(S, "load_aeslc", lambda split: others if split == "train" else data)
    S.mails.cache_clear()
    yield
    S.mails.cache_clear()


def test_empty_references_halves_of_pairs_and_training_mails_are_left_out(three_mails):
    pairs = S.mails("test", 10)
    assert pairs.texts == ["a body"] and pairs.summaries == [["own", "another"]]


def test_the_best_of_the_references_counts():
    assert S.rouge(["gas contract"], [["lunch", "gas contract"]])["rougeL"] == pytest.approx(100)
    assert S.rouge(["gas contract"], [["lunch"]])["rougeL"] == 0
