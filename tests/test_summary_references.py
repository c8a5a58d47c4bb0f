"Subject lines: which references of a mail count."
from types import SimpleNamespace

import pytest

from ddcl_nb.experiments import summarisation as S

pytest.importorskip("rouge_score")


@pytest.fixture
def three_mails(monkeypatch):
    data = SimpleNamespace(inputs=["a body", " ", "body without a subject"], targets=[["own", "", "another"], ["no body"], [" ", "another"]], source="made")
    monkeypatch.setattr(S, "load_aeslc", lambda split: data)
    S.mails.cache_clear()
    yield
    S.mails.cache_clear()


def test_empty_references_and_halves_of_pairs_are_left_out(three_mails):
    pairs = S.mails("test", 10)
    assert pairs.texts == ["a body"] and pairs.summaries == [["own", "another"]]


def test_the_best_of_the_references_counts():
    assert S.rouge(["gas contract"], [["lunch", "gas contract"]])["rougeL"] == pytest.approx(100)
    assert S.rouge(["gas contract"], [["lunch"]])["rougeL"] == 0
