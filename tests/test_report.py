"The page of results: what it says, that it escapes everything and asks for nothing, and how it looks on a phone."
import base64, re
from html.parser import HTMLParser

import pytest
from hypothesis import given, strategies as st

from ddcl_nb.experiments.registry import Result
from ddcl_nb.report import COLUMNS, Html, best, comparison, keys_and_measures, number, page, strip, summary_table, tag, with_deviation, write_report

DOT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
METHODS = ("k-means", "DDCL, paper's setting", "DDCL cooled in tau, 32 prototypes and a tree over them")

def result(name="toy", title="A toy", seeds=5, **about):
    rows = [{"data": data, "method": method, "seed": seed, "acc": 0.6 + i / 10 + seed / 1000, "nmi": 0.5, "seconds": 1.5}
            for data in ("rings", "knots") for i, method in enumerate(METHODS) for seed in range(seeds)]
    lines = [{"data": data, "measure": measure, "paper": 0.772, "paper_kmeans": 0.756, "kmeans": [0.602, 0.0016], "papers_setting": [0.7, 0.01], "ours": [0.802, 0.0016]}
             for data in ("rings", "knots") for measure in ("acc", "nmi", "ari", "recall")]
    return Result(name, "quick", rows, {"title": title, "paper": "Table 3", "table": lines, "verdict": "Held with a change.", "sources": {"rings": "made here", "knots": "found in the cache"},
                  "figures": {"curve": "A caption."}, "date": "2030-01-01 12:00 UTC", "commit": "0123456789ab",
                  "versions": {"ddcl_nb": "0.1.0", "torch": "2.15.0"}, "hardware": {"processor": "a processor", "cores": 2, "threads": 2, "accelerator": None}, **about})

def written(tmp_path, *results, figure=True):
    for r in results if figure else ():
        r.folder(tmp_path).mkdir(parents=True, exist_ok=True)
        (r.folder(tmp_path) / f"{r.experiment}-curve.png").write_bytes(DOT)
    return write_report(results, tmp_path, tmp_path / "report" / "index.html")

class Tags(HTMLParser):
    "Elements that a browser would open, what addresses they ask for, and whether they are closed in order."
    VOID = {"img", "meta", "link"}
    def __init__(self, text):
        super().__init__()
        self.seen, self.addresses, self.open, self.ids, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open
    def handle_starttag(self, name, attributes):
        self.seen.append(name)
        self.addresses += [value for key, value in attributes if key in ("src", "href", "srcset", "action", "poster")]
        self.ids += [value for key, value in attributes if key == "id"]
        if name not in self.VOID: self.open.append(name)
    def handle_endtag(self, name): assert self.open.pop() == name
    def handle_data(self, text): self.text += text

def test_every_text_is_escaped(tmp_path):
    evil = "<script>alert('x')</script>\" onload=\"y"
    rows = [{"data": evil, "method": evil, "seed": 0, evil: 0.5, "note": evil}]
    r = Result("toy", "quick", rows, {"title": evil, "paper": evil, "question": evil, "verdict": evil, "sources": {evil: evil}, "figures": {"curve": evil}, "date": evil, "commit": evil,
               "table": [{"data": evil, "measure": evil, "ours": [0.5, 0.1]}], "versions": {evil: evil}, "hardware": {"processor": evil, "cores": evil}})
    text = written(tmp_path, r).read_text()
    tags = Tags(text)
    assert "script" not in tags.seen and "<script" not in text and "onload" not in re.sub(r'"[^"]*"', "", re.sub(r">[^<]*<", "><", text))
    assert tags.text.count(evil) > 10

@given(st.text(), st.text())
def test_an_element_gives_back_what_was_put_in(text, value):
    parsed = []
    parser = HTMLParser()
    parser.handle_starttag = lambda name, attributes: parsed.append((name, attributes))
    parser.handle_data = lambda data: parsed.append(data)
    parser.feed(tag("p", text.replace("\r", ""), title=value.replace("\r", "")))
    parser.close()
    assert parsed[0][0] == "p" and "".join(parsed[1:]) == text.replace("\r", "")

def test_the_page_is_whole_and_asks_for_nothing(tmp_path):
    tags = Tags(written(tmp_path, result("a"), result("b")).read_text())
    assert tags.seen.count("img") == 2 and tags.seen.count("h1") == 1 and {"main", "header", "nav", "details", "figcaption"} <= set(tags.seen)
    assert all(address.startswith(("data:", "#")) for address in tags.addresses)
    assert len(set(tags.ids)) == len(tags.ids) and {a[1:] for a in tags.addresses if a.startswith("#")} <= set(tags.ids)

def test_what_was_run_is_told(tmp_path):
    text = Tags(written(tmp_path, result()).read_text()).text
    for words in ("quick", "2030-01-01 12:00 UTC", "0123456789ab", "a processor, 2 cores", "torch 2.15.0", "Table 3 of the paper", "5 seeds", "Held with a change.", "found in the cache", "All 30 rows"):
        assert words in text

def test_no_folder_of_this_machine_is_told(tmp_path):
    assert str(tmp_path) not in written(tmp_path, result(), figure=False).read_text()

def test_results_that_lack_something(tmp_path):
    bare = Result("bare", "quick", [])
    odd = Result("odd", "full", [{"x": 1.0}, {"x": None, "y": "words"}, {"x": float("nan"), "seed": 1}], {"table": [{}], "figures": {}, "sources": None, "versions": {}, "hardware": {}})
    text = written(tmp_path, bare, odd, result(), figure=False).read_text()
    assert "toy-curve.png is not there" in Tags(text).text and "<img" not in text
    assert "<h1>" in write_report([], "results", tmp_path / "none.html").read_text()

def test_values_of_the_table(tmp_path):
    first = comparison([result()])[0]
    assert first["words"] == {"paper": "0.772", "paper_kmeans": "0.756", "kmeans": "0.602 ± 0.002", "papers_setting": "0.700 ± 0.010", "ours": "0.802 ± 0.002"}
    assert list(first["words"]) == list(COLUMNS) and first["best"] == {"ours"} and first["measure"] == "ACC"
    assert comparison([result(seeds=1)])[0]["words"]["ours"] == "0.802"

def test_the_best_of_every_line_is_strong():
    table = Html(summary_table([result()]))
    assert table.count("<strong>0.802") == table.count("<strong>") == 8
    assert summary_table([result()], "markdown").count("**0.802\u00a0±\u00a00.002**") == 8

@pytest.mark.parametrize("values, sign, expected", [
    ({"a": 1.0, "b": 2.0}, 1, {"b"}), ({"a": 1.0, "b": 2.0}, -1, {"a"}), ({"a": 1.0, "b": 2.0}, 0, set()), ({"a": 0.70001, "b": [0.7, 0.1], "c": 0.1}, 1, {"a", "b"}),
    ({"a": None, "b": 1.0}, 1, set()), ({"a": float("nan"), "b": 1.0, "c": 0.5}, 1, {"b"}), ({}, 1, set())])
def test_best(values, sign, expected): assert best(values, sign) == expected

def test_numbers():
    assert [number(v) for v in (0.5, 0, 12.34, 12345.6, 1e-5, -1e-5, None, float("inf"))] == ["0.500", "0.000", "12.3", "12,345.6", "1.0e-05", "-1.0e-05", "–", "inf"]
    assert with_deviation([12.3, 0.04]) == "12.3 ± 0.0" and with_deviation([0.5, 1e-9]) == "0.500 ± 0.000" and with_deviation(None) == "–"
    assert comparison([result(table=[{"measure": "ari", "kmeans": [0.3, 0.1], "ours": [1e-5, 1e-6]}])])[0]["words"]["ours"] == "0.000 ± 0.000"

def test_markdown_keeps_its_columns():
    lines = summary_table([result(table=[{"data": "a|b", "measure": "acc", "ours": [1, 0]}])], "markdown").splitlines()
    assert len(lines) == 3 and all(len(re.findall(r"(?<!\\)\|", line)) == 8 for line in lines)

def test_columns_before_the_seed_tell_rows_apart():
    assert keys_and_measures([{"data": "a", "K": 4, "seed": 0, "acc": 1, "best": True, "note": "x"}]) == (["data", "K"], ["acc"])
    assert keys_and_measures([{"method": "a", "acc": 1.0}, {"method": "b", "acc": 1.0, "gap": 2}]) == (["method"], ["acc"])
    rows = [{"method": m, "seed": s, name: 1.0} for s in range(2) for m, name in (("a", "acc"), ("b", "acc"), ("c", "test"), ("d", "test"), ("e", "alone"))]
    assert keys_and_measures(rows) == (["method"], ["acc", "test"])
    assert keys_and_measures([{"method": "a", "seed": s, "acc": 1.0} for s in range(2)]) == (["method"], ["acc"])
    assert keys_and_measures([]) == ([], [])

def test_pictures_of_lines_stay_in_their_box():
    for values in ({"paper": 0.7, "ours": [0.9, 0.2], "kmeans": [0.1, 0.3]}, {"ours": [0.0, 0.0]}, {"paper": 1e6, "ours": [2e6, 1.0]}):
        places = [float(x) for x in re.findall(r"translate\((-?[\d.]+),0\)", strip(values))]
        assert places and all(0 <= x <= 104 for x in places)

def test_errors_name_the_argument(tmp_path):
    with pytest.raises(ValueError, match="format must be 'html' or 'markdown', got 'pdf'"): summary_table([], "pdf")
    with pytest.raises(ValueError, match="one for each of 1 results, got 2"): write_report([result()], ["a", "b"], tmp_path / "x.html")

def test_a_page_of_anything():
    assert Tags(page("Title", "Lead", tag("p", "text"))).seen.count("p") == 2

CONTRAST = """() => {
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                         return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$/.test(c)) return c; } return 'rgb(255,255,255)'; };
    const words = [...document.querySelectorAll('h1, h2, h3, h4, p, a, td, th, dt, dd, strong, .deviation, figcaption, summary, footer')];
    return Math.min(...words.map(e => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))]; return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05); }));
}"""

@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(browser, tmp_path, width, scheme):
    path = written(tmp_path, result("a", title="A title that is long enough to need more than one line on a telephone"), result("b"))
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    tab, complaints = context.new_page(), []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
    tab.goto(path.as_uri())
    for fold in tab.locator("summary").all(): fold.press("Enter")
    assert tab.locator("details[open]").count() == 2
    assert tab.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth") <= 0
    assert tab.evaluate("[...document.images].every(image => image.naturalWidth)")
    assert tab.evaluate(CONTRAST) >= 4.5
    if width == 390:
        box = tab.locator(".box").first
        box.focus()
        tab.keyboard.press("ArrowRight")
        tab.wait_for_timeout(500)
        assert box.evaluate("box => box.scrollLeft") > 0
    assert (tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)") == (scheme == "dark")
    context.close()
    assert not complaints
