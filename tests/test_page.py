"The interactive page of a fitted clustering: numbers that are the model's own, texts that stay texts, and use by keyboard, on a phone, in light and dark."
import json
import re

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from ddcl_nb.estimators import DDCLClusterer
from ddcl_nb.page import LONGEST_TEXT, MOST_SHOWN, characteristic_words, cooling_path, fitted_stage, page_data, script_json, training_lines, write_model_page

EVIL = ["<script>window.broken = 1</script>", "</script><script>window.broken = 2</script>", "<img src=x onerror=\"window.broken = 3\">", "\" onfocus=\"window.broken = 4\" autofocus=\"",
        "]]><!-- <svg onload=window.broken=5>", "line\u2028separator\u2029here", "right\u202eto left", "w" * 5000, "nul\0 and half \ud800 a pair", "", "${window.broken = 6} {{7*7}} $title $data"]


def cloud(n=200, m=5, seed=0, groups=4):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(groups, m))[rng.integers(groups, size=n)] * 6 + rng.normal(size=(n, m))


def written(tmp_path, X, texts=None, k=4, **kwargs):
    model = DDCLClusterer(min(k, len(X)) if k != "auto" else k, random_state=0, **kwargs.pop("model", {})).fit(X)
    return write_model_page(tmp_path / "report.html", model, X, texts=texts, **kwargs), model


# --- what is in the file

def held(path):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)[1])


def test_one_file_that_asks_for_nothing(tmp_path):
    path, _ = written(tmp_path, cloud(), title="A <b>title</b>")
    text = path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", text.split('<script type="application/json"')[0]) and "fetch(" not in text and "XMLHttpRequest" not in text
    assert "default-src 'none'" in text and "unsafe-inline" not in text and "unsafe-eval" not in text
    assert "A &lt;b&gt;title&lt;/b&gt;" in text and "<b>title" not in text.split("<script")[0]


def test_what_a_document_says_cannot_leave_its_place():
    text = script_json(EVIL[:-3])
    assert not set("<>&\u2028\u2029") & set(text) and json.loads(text) == EVIL[:-3]


def test_the_cooling_is_real_and_the_last_stage_is_the_model(tmp_path):
    X = cloud()
    path, model = written(tmp_path, X)
    data, stages = held(path), held(path)["picture"]["stages"]
    taus = [stage["tau"] for stage in stages[:-1]]
    assert taus[0] == 1 and all(a > b for a, b in zip(taus, taus[1:])) and taus[-1] <= model.tau_ * 1.001
    assert stages[0]["count"] == 1 and stages[-1]["count"] == 4 and stages[-1]["tau"] == pytest.approx(model.tau_, rel=1e-4)
    real = cooling_path(model, X)
    assert [s["count"] for s in stages[:-1]] == [len(s.prototypes) for s in real]
    assert data["picture"]["left_out"] < 0.01
    assert stages[-2]["distortion"] < 0.5 * stages[0]["distortion"] and stages[-2]["entropy"] < 0.05


def test_shares_and_columns_are_those_of_the_data(tmp_path):
    X = cloud()
    raw = X * [1, 10, 100, 1000, 1] + 5
    path, model = written(tmp_path, X, values=raw, columns=["a", "b", "c", "d", "e"])
    data = held(path)
    assert [card["share"] for card in data["cards"]] == pytest.approx((np.bincount(model.labels_, minlength=4) / len(X)).tolist())
    for k, card in enumerate(data["cards"]):
        for column, mean, apart in card["columns"]:
            assert mean == pytest.approx(raw[model.labels_ == k, column].mean(), rel=1e-4)
            assert apart == pytest.approx((raw[model.labels_ == k, column].mean() - raw[:, column].mean()) / raw[:, column].std(), rel=1e-3)


def test_a_large_sample_is_cut_and_says_so(tmp_path):
    X = cloud(MOST_SHOWN + 500, 8)
    texts = [f"document number {i} " + "word " * 300 for i in range(len(X))]
    path, _ = written(tmp_path, X, texts, total=10**7)
    data = held(path)
    assert (data["shown"], data["given"], data["total"], len(data["texts"])) == (MOST_SHOWN, len(X), 10**7, MOST_SHOWN)
    assert max(map(len, data["texts"])) == LONGEST_TEXT and path.stat().st_size < 4e6
    assert all(data["texts"][i].startswith(f"document number {row - 1} ") for i, row in enumerate(data["rows"]))


@pytest.mark.parametrize("n, m, k, more", [(1, 1, 1, {}), (1, 3, 1, {}), (2, 1, 2, {}), (60, 1, 3, {}), (60, 2, 1, {}), (300, 3, 150, {}), (30, 60, 5, {}), (200, 5, "auto", {}), (200, 5, 3, {"n_prototypes": 24}), (200, 5, 4, {"tau": 0.3}), (80, 300, 6, {})])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_any_shape_makes_a_page(tmp_path, n, m, k, more, dtype):
    path, model = written(tmp_path, cloud(n, m).astype(dtype), k=k, model=more)
    data = held(path)
    assert data["picture"]["left_out"] < (0.6 if k == 150 else 0.01) and sum(card["share"] for card in data["cards"]) == pytest.approx(1)
    assert len(data["cards"]) == len(fitted_stage(model).stage.prototypes) <= len(model.prototypes_)


@pytest.mark.filterwarnings("ignore:n_clusters")
def test_data_without_spread_make_a_page(tmp_path):
    for X in (np.ones((20, 3)), np.ones((60, 1)), np.repeat([[0.0, 0], [1, 1]], 40, 0)):
        path, _ = written(tmp_path, X, k=2)
        assert held(path)["picture"]["left_out"] < 0.01


def test_errors_name_the_argument(tmp_path):
    X = cloud(20)
    model = DDCLClusterer(2, random_state=0).fit(X)
    out = tmp_path / "x.html"
    with pytest.raises(NotFittedError): write_model_page(out, DDCLClusterer(), X)
    with pytest.raises(ValueError, match="texts must be one for each of 20 documents, got 3"): write_model_page(out, model, X, texts=["a"] * 3)
    with pytest.raises(ValueError, match="ids must be one for each of 20 documents, got 1"): write_model_page(out, model, X, ids=["a"])
    with pytest.raises(ValueError, match="columns must be one for each of 5 columns, got 1"): write_model_page(out, model, X, columns=["a"])
    with pytest.raises(ValueError, match="values must be finite numbers"): write_model_page(out, model, X, values=np.full((20, 2), np.nan))
    with pytest.raises(ValueError, match="values must be finite numbers"): write_model_page(out, model, X, values=X[:3])
    with pytest.raises(ValueError, match="4 features"): write_model_page(out, model, X[:, :4])
    with pytest.raises(ValueError, match="NaN"): write_model_page(out, model, np.full_like(X, np.nan))
    assert not out.exists()


def test_words_of_a_class_are_those_that_others_lack():
    texts = ["moon orbit launch the", "orbit moon rocket", "don't bake bread the", "bread flour oven oven oven oven"] * 20
    words = characteristic_words(texts, np.tile([0, 0, 1, 1], 20), 2)
    assert words[0][:2] == ["moon", "orbit"] and words[1][0] == "bread" and not {"the", "don"} & {*words[0], *words[1]}


def test_a_history_of_any_kind_is_drawn_or_left_out():
    assert training_lines([]) == [] and training_lines([{}, {}]) == [] and training_lines([{"epoch": 1, "loss": 1.0}]) == []
    odd = [{"loss": np.float32(2.0), "x.y": 1.0, "flag": True, "bad": float("inf")}, {"loss": 1.0, "note": None}]
    assert training_lines(odd) == [{"name": "L_q per token", "x": "row", "lines": {"": [(1, 2.0), (2, 1.0)]}}]
    assert len(training_lines([{"step": i, "tau": 1 / (i + 1)} for i in range(5000)])[0]["lines"][""]) <= 400


# --- what a browser makes of it

CONTRAST = """() => {
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                         return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/^rgba.*, 0\\)$/.test(c)) return c; } return 'rgb(255,255,255)'; };
    const words = [...document.body.querySelectorAll('*')].filter(e => !(e instanceof SVGElement) && e.checkVisibility() && [...e.childNodes].some(c => c.nodeType === 3 && c.data.trim()));
    const found = words.map(e => { const [a, b] = [light(getComputedStyle(e).color), light(behind(e))]; return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 80)]; });
    return [found.length, ...found.sort((a, b) => a[0] - b[0])[0]];
}"""


class Tab:
    "A page in a browser, with everything it complains about or asks for."
    def __init__(self, browser, path, width=1280, scheme="light", **more):
        self.context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce", **more)
        self.page, self.complaints = self.context.new_page(), []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: request.url.startswith(("file:", "data:")) or self.complaints.append(request.url))
        self.page.goto(path.as_uri())
    def __enter__(self): return self.page
    def __exit__(self, kind, *_):
        self.context.close()
        if kind is None: assert not self.complaints


def press(page, *keys):
    for key in keys: page.keyboard.press(key)


def test_probabilities_in_the_browser_are_those_of_the_model(browser, tmp_path):
    for k, more in ((4, {}), (3, {"n_prototypes": 24}), (3, {"tau": 0.4})):
        X = cloud()
        path, model = written(tmp_path, X, k=k, model=more)
        with Tab(browser, path) as page:
            q = np.array(page.evaluate("Array.from({length: n}, (_, i) => { const q = Array(K).fill(0); for (const [k, x] of sharesOf(i, FITTED)) q[k] = x; return q; })"))
            labels = np.array(held(path)["model"]["labels"])
            clusters = np.stack([q[:, labels == c].sum(1) for c in range(model.n_clusters_)], 1)
            np.testing.assert_allclose(clusters, model.predict_proba(X), atol=0.01)


def test_documents_appear_as_text(browser, tmp_path):
    X = cloud(len(EVIL) * 6)
    texts = EVIL * 6
    path, _ = written(tmp_path, X, texts, ids=[f"{text[:40]}{i}" for i, text in enumerate(texts)], title=EVIL[1], warnings=EVIL[:3], history=[{"step": s, EVIL[2]: s, "bank": EVIL[0]} for s in range(3)])
    with Tab(browser, path) as page:
        page.fill("#search", "onerror")
        page.locator("#results .pick", has_text="img src").first.click()
        assert page.locator("#selected blockquote").inner_text() == EVIL[2]
        for text in EVIL:
            page.evaluate("i => select({document: i})", texts.index(text))
            assert page.locator("#selected blockquote").text_content() == (held(path)["texts"][texts.index(text)] or "(empty)")
        assert page.evaluate("window.broken") is None and page.title() == " ".join(EVIL[1].split())
        assert page.evaluate("document.querySelectorAll('img, iframe, object, main script, svg[onload], [onerror], [autofocus]').length") == 0
        assert page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth") <= 0


def test_the_policy_stops_a_script_that_got_in(browser, tmp_path):
    path, _ = written(tmp_path, cloud(40))
    tab = Tab(browser, path)
    tab.page.evaluate("const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s); const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i)")
    tab.page.wait_for_timeout(200)
    assert tab.page.evaluate("window.broken") is None and sum("Content Security Policy" in complaint for complaint in tab.complaints) == 2
    tab.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_readable_everywhere(browser, tmp_path, width, scheme):
    history = [{"step": s, "bank": "encoder.bank", "head": h, "tau": 1 / (s + 1), "separation_min": s} for s in range(9) for h in (0, 1)]
    path, _ = written(tmp_path, cloud(300), [f"text about subject {i % 7} and a-very-long-word-{'x' * 60}" for i in range(300)], k=12, warnings=["step 3: tau of bank rose above 1"], history=history)
    with Tab(browser, path, width, scheme, has_touch=width == 390) as page:
        for summary in page.locator("summary").all(): summary.press("Enter")
        page.focus("#map")
        press(page, "ArrowRight", "ArrowDown")
        count, least, where = page.evaluate(CONTRAST)
        assert count > 80 and least >= 4.5, where
        assert page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth") <= 0
        assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)") == (scheme == "dark")
        page.click("#theme")
        assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)") != (scheme == "dark")
        assert page.evaluate(CONTRAST)[1] >= 4.5
        if width == 390: assert page.evaluate("Math.min(...[...document.querySelectorAll('button, select, input')].filter(e => e.checkVisibility()).map(e => e.getBoundingClientRect().height))") >= 36


def test_everything_has_a_name(browser, tmp_path):
    path, _ = written(tmp_path, cloud(120), k=5)
    with Tab(browser, path) as page:
        nameless = page.evaluate("[...document.querySelectorAll('button, select, input, canvas:not([aria-hidden]), svg[role=img]')].filter(e => e.checkVisibility() && !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)")
        assert nameless == []
        assert page.evaluate("(ids => ids.length === new Set(ids).size)([...document.querySelectorAll('[id]')].map(e => e.id))")
        assert page.evaluate("[...document.querySelectorAll('[aria-labelledby], [aria-describedby]')].every(e => `${e.getAttribute('aria-labelledby') ?? ''} ${e.getAttribute('aria-describedby') ?? ''}`.trim().split(/\\s+/).every(id => document.getElementById(id)))")


def test_by_keyboard_alone(browser, tmp_path):
    path, _ = written(tmp_path, cloud(120), [f"apple {i}" if i % 2 else f"pear {i}" for i in range(120)], k=5)
    with Tab(browser, path) as page:
        reached = set()
        for _ in range(40):
            press(page, "Tab")
            reached.add(page.evaluate("document.activeElement.id"))
        assert {"map", "tau", "search", "theme", "play", "fitted"} <= reached
        page.focus("#map")
        press(page, "p")
        assert "Prototype" in page.inner_text("#spoken") and page.evaluate("state.prototype") == 0
        press(page, "ArrowRight", "ArrowRight")
        assert page.evaluate("state.document") >= 0 and "prototype" in page.inner_text("#spoken")
        scale = page.evaluate("view.scale")
        press(page, "+", "+", "Shift+ArrowLeft")
        assert page.evaluate("view.scale") > scale
        press(page, "0", "Escape")
        assert page.evaluate("[view.scale, state.document]") == [1, -1]
        page.focus("#search")
        page.keyboard.type("apple")
        assert page.inner_text("#found").startswith("60 documents")
        press(page, "ArrowDown", "ArrowDown", "Enter")
        assert page.evaluate("state.document >= 0 || state.prototype >= 0") and page.evaluate("document.activeElement.className") == "pick"
        press(page, "Escape")
        assert page.evaluate("document.activeElement.id") == "search" and page.input_value("#search") == ""


def test_the_slider_goes_through_the_cooling(browser, tmp_path):
    path, _ = written(tmp_path, cloud(), k=4)
    with Tab(browser, path) as page:
        page.focus("#tau")
        press(page, "Home")
        assert page.evaluate("[state.stage, members(0, 0).length]") == [0, 4] and "tau 1, 1 prototype" in page.get_attribute("#tau", "aria-valuetext")
        hot = page.evaluate("assigned(0).sure.every(x => x === 1)")
        assert hot and "still one with" in page.locator(".together").first.inner_text()
        counts, unsure = [], []
        for _ in range(page.evaluate("COLDEST")):
            press(page, "ArrowRight")
            counts.append(page.evaluate("prototypesShown().length")); unsure.append(page.evaluate("stages[state.stage].entropy"))
        assert counts[-1] == 4 and unsure[-1] < max(unsure) and page.evaluate("state.stage === COLDEST")
        page.click("#fitted")
        assert page.evaluate("state.stage === FITTED") and page.get_attribute("#fitted", "aria-pressed") == "true"
        page.click("#river", position={"x": 30, "y": 20})
        assert page.evaluate("state.stage < FITTED")


def test_a_finger_chooses_and_a_wheel_leaves_the_page_alone(browser, tmp_path):
    path, _ = written(tmp_path, cloud(), k=4)
    with Tab(browser, path, 390, has_touch=True) as page:
        page.evaluate("document.getElementById('map').scrollIntoView({block: 'center', behavior: 'instant'})")
        x, y = page.evaluate("(() => { const i = [...Array(n).keys()].find(i => under(...placeOf(i))?.document !== undefined), b = map.getBoundingClientRect(), [x, y] = placeOf(i); return [x + b.left, y + b.top]; })()")
        page.touchscreen.tap(x, y)
        assert page.evaluate("state.document") >= 0
        page.evaluate("document.activeElement.blur()")
        page.mouse.move(x, y)
        page.mouse.wheel(0, 200)
        page.wait_for_timeout(200)
        assert page.evaluate("view.scale") == 1


@pytest.mark.parametrize("n, m, k, more", [(1, 1, 1, {}), (1, 4, 1, {}), (60, 1, 3, {}), (400, 3, 200, {}), (200, 5, "auto", {}), (200, 5, 3, {"n_prototypes": 24})])
def test_any_shape_draws(browser, tmp_path, n, m, k, more):
    path, _ = written(tmp_path, cloud(n, m), k=k, model=more)
    with Tab(browser, path, 390) as page:
        page.focus("#tau")
        press(page, "Home", "ArrowRight", "PageUp", "End")
        page.focus("#map")
        press(page, "p", "P", "ArrowLeft", "ArrowUp", "-", "0")
        assert page.evaluate("[...map.getContext('2d').getImageData(0, 0, map.width, map.height).data].some(x => x)")
        assert page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth") <= 0
        if k == 200:
            before = page.locator(".card").count()
            page.get_by_role("button", name=re.compile("Show all")).click()
            assert page.locator(".card").count() > before
