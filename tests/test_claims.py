"Verdicts that follow from evidence, and the ledger of this repository."
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddcl_nb.experiments.claims import CLAIMS, VERDICTS, Evidence, Record, anchor, conditions, ledger, ledger_details, ledger_table, read_evidence, verdict

ROOT = Path(__file__).parents[1]
tests = st.lists(st.tuples(st.booleans(), st.sampled_from(["$a$", "$b$", "$c$"])), max_size=6)


def evidence(found):
    return [Evidence(3, "02_x", "A heading", "proof", "fact", "value", supports, when) for supports, when in found]


@given(tests)
def test_a_verdict_follows_from_the_outcomes_alone(found):
    outcomes = {supports for supports, _ in found}
    expected = {frozenset(): "open", frozenset({True}): "holds", frozenset({False}): "does not hold"}.get(frozenset(outcomes), "holds in part")
    assert verdict(evidence(found)) == expected and verdict(evidence(reversed(found))) == expected and expected in VERDICTS
    assert set(conditions(evidence(found), True)) == {when for supports, when in found if supports}


@given(st.text(), st.text(), st.booleans())
def test_a_record_is_read_as_it_was_written(tmp_path_factory, fact, value, supports):
    out = tmp_path_factory.mktemp("results")
    record = Record("01_x")
    record.measurement(1, "A heading", fact, supports, value)
    record.write(out)
    assert read_evidence(out) == record.evidence


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"claim": 99}]', "not json", '[{"claim": 1, "chapter": "x"}]'])
def test_a_record_that_is_none_is_named(tmp_path, text):
    (tmp_path / "theory").mkdir()
    (tmp_path / "theory" / "07_broken.json").write_text(text)
    with pytest.raises(ValueError, match="07_broken.json is not a record of evidence"):
        read_evidence(tmp_path)


def test_a_table_keeps_its_columns_whatever_the_texts_hold():
    record = Record("01_x")
    record.proof(1, "A heading", "bars $|x|$\nand lines", True, value="a | b")
    table = ledger_table(ledger(record.evidence)).splitlines()
    assert len(table) == len(CLAIMS) + 2 and {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {5}
    assert "(01_x.ipynb#a-heading)" in table[2] and "(01_x.ipynb#a-heading)" in ledger_details(ledger(record.evidence)[0])


def headings(chapter):
    cells = json.loads((ROOT / f"nbs/theory/{chapter}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return {anchor(found) for found in re.findall(r"^#+ (.*)$", text, flags=re.M)}


def test_every_claim_of_the_paper_was_tested_where_the_ledger_says():
    found = read_evidence(ROOT / "results")
    assert {e.claim for e in found} == set(CLAIMS)
    assert all(anchor(e.heading) in headings(e.chapter) for e in found)
    for line in ledger(found):
        assert line["verdict"] != "open" and {e.kind for e in line["evidence"]} <= {"proof", "measurement"}
