"The site as a reader meets it: built from the notebooks, served from a local address, opened in a browser."
import functools, http.server, re, shutil, subprocess, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

from ddcl_nb.experiments.claims import anchor, read_evidence
from names import Names
from translate import mathematics, page_name, to_myst

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
READY = """async () => {
    const unset = () => [...document.querySelectorAll('.math')].some(e => !e.querySelector('mjx-container'));
    for (let tries = 0; tries < 200 && unset(); tries++) await new Promise(done => setTimeout(done, 50));
    await Promise.all([...document.images].map(image => image.decode().catch(() => 0)));
}"""
FAULTS = """() => ({
    'formulas left as text': [...document.querySelectorAll('article :is(p, li, td, th, figcaption, h1, h2, h3)')].flatMap(e => [...e.childNodes])
        .filter(n => n.nodeType === Node.TEXT_NODE && n.data.includes('$')).map(n => n.data),
    'formulas not rendered': [...document.querySelectorAll('.math')].filter(e => !e.querySelector('mjx-container')).length,
    'formulas with errors': document.querySelectorAll('mjx-merror, [data-mjx-error]').length,
    'pictures not shown': [...document.images].filter(i => !i.naturalWidth).map(i => i.src),
    'pictures too small to read': [...document.querySelectorAll('.cell_output img')].filter(i => i.clientWidth < 0.4 * i.naturalWidth).map(i => i.alt),
    'pixels too wide': Math.max(0, document.documentElement.scrollWidth - innerWidth),
})"""

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not shutil.which("npm"): pytest.skip("the site needs npm for its mathematics, and npm was not found")
    target = tmp_path_factory.mktemp("site") / "html"
    for command in (["sh", "docs/vendor.sh"], [sys.executable, "docs/build.py", "--output", str(target)]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return target

class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()

@pytest.fixture
def tab(browser, address):
    "A tab that fails the test when a page complains, misses a file, or asks another machine for anything."
    context = browser.new_context(viewport=DESK)
    tab, complaints = context.new_page(), []
    def at_home(route):
        if route.request.url.startswith((address, "data:", "blob:")): return route.continue_()
        complaints.append(f"asked for {route.request.url}")
        route.abort()
    context.route("**/*", at_home)
    tab.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("response", lambda response: response.status >= 400 and complaints.append(f"{response.status} {response.url}"))
    yield tab
    context.close()
    assert not complaints

class Page(HTMLParser):
    "The addresses a page links to, and the anchors it has."
    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        self.links |= {attributes[key] for key in ("href", "src") if attributes.get(key)}

def is_internal(link):
    return not link.startswith(("http:", "https:", "mailto:", "data:", "javascript:", "//"))

def dead_links(folder):
    pages = {path.resolve(): Page(path) for path in folder.rglob("*.html") if "_static" not in path.parts}
    for path, page in pages.items():
        for link in filter(is_internal, page.links):
            address, anchor = urldefrag(unquote(link).split("?")[0])
            target = (path.parent / address).resolve() if address else path
            missing_anchor = anchor and target in pages and anchor not in pages[target].anchors
            if not target.exists() or missing_anchor: yield f"{path.relative_to(folder.resolve())}: {link}"

def content_pages(site):
    names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html") if "_static" not in path.parts)
    return [name for name in names if name not in ("search.html", "genindex.html")]

def test_notebook_markdown_becomes_myst():
    def convert(text): return to_myst(text, {"ddcl": "{py:obj}`ddcl <ddcl_nb.assign.ddcl>`"}.get)
    assert convert("$$x$$ {#eq-x}\n\nby @eq-x and @fig-y") == "$$x$$ (eq-x)\n\nby {eq}`eq-x` and {numref}`fig-y`"
    assert convert("[@rose1990a; @wu2021b]") == "{cite:p}`rose1990a,wu2021b`"
    assert convert("[@rose1990a, Eq. 3]") == "({cite:alp}`rose1990a`, Eq. 3)"
    assert convert("## `ddcl`\n\n`ddcl`, [`ddcl`](00_assign.ipynb)") == "## `ddcl`\n\n{py:obj}`ddcl <ddcl_nb.assign.ddcl>`, [`ddcl`](assign.ipynb)"
    assert convert("::: {.callout-tip}\n## Cold\nSay it.\n:::") == ":::{admonition} Cold\n:class: tip\n\nSay it.\n:::"
    assert convert("mail a@b2020.org, code `@eq-x`") == "mail a@b2020.org, code `@eq-x`"

def test_formulas_in_tables_are_marked_and_prices_are_not():
    assert mathematics("<th>median $S_{min}$ / start</th>") == r'<th>median <span class="math">\(S_{min}\)</span> / start</th>'
    assert mathematics("<td>$5</td><td>from $5 to $6</td>") == "<td>$5</td><td>from $5 to $6</td>"

@pytest.mark.parametrize("span, wrong", [
    ("ddcl(tokens, prototypes, 1.0)", False), ("assignements(tokens)", True), ("ddcl_nb.assign.ddcl", False), ("ddcl_nb.asign", True),
    ("PrototypeBank.separation", False), ("PrototypeBank.seperation", True), ("softmax(x)", False), ("f(x)", False), ("K = 3", False)])
def test_misspelled_names_are_found(span, wrong):
    assert Names("ddcl_nb").misspelled(span, "index", local={"tokens"}) is wrong

def test_dead_links_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">1</a><a href="b.html#gone">2</a><a href="c.html">3</a><a href="https://x.org">4</a>')
    (tmp_path / "b.html").write_text('<p id="here">')
    assert sorted(dead_links(tmp_path)) == ["a.html: b.html#gone", "a.html: c.html"]

def test_no_link_is_dead(site):
    assert not list(dead_links(site))

def test_the_ledger_leads_to_the_heading_of_every_test(site):
    links = Page(site / "theory" / "ledger.html").links
    expected = {f"{page_name(e.chapter)}.html#{anchor(e.heading)}" for e in read_evidence(ROOT / "results")}
    assert expected and expected <= links

def test_figures_count_from_one_on_every_page(site):
    for name in content_pages(site):
        found = re.findall(r'class="caption-number">Figure (\d+)', (site / name).read_text(encoding="utf-8"))
        assert list(map(int, found)) == list(range(1, len(found) + 1)), name

def test_every_page_is_whole_and_fits_a_phone(site, address, tab):
    tab.set_viewport_size(PHONE)
    faults = {}
    for name in content_pages(site):
        tab.goto(address + name)
        tab.evaluate(READY)
        found = {fault: value for fault, value in tab.evaluate(FAULTS).items() if value}
        if found: faults[name] = found
    assert not faults

@pytest.mark.parametrize("section, mark, shown", [
    ("theory", 'class="math', "mjx-container"), ("library", 'class="math', "mjx-container"),
    ("library", "_images/", "article img"), ("experiments", "_images/", "article img")])
def test_formulas_and_figures_are_shown(section, mark, shown, site, address, tab):
    if not (site / section).exists(): pytest.skip(f"there is no {section} yet")
    pages = [name for name in content_pages(site) if name.startswith(section) and mark in (site / name).read_text(encoding="utf-8")]
    assert pages, f"no page of {section} has {mark}: are its notebooks saved with their outputs?"
    tab.goto(address + pages[0])
    tab.evaluate(READY)
    assert tab.locator(shown).first.is_visible()

@pytest.mark.parametrize("words, found", [("ddcl", "ddcl_nb.assign.ddcl"), ("critical temperature", "Collapse and the critical temperature")])
def test_search_finds_names_and_titles(words, found, address, tab):
    tab.goto(address)
    tab.wait_for_load_state("load")
    tab.locator("button.search-button__button:visible").first.click()
    tab.locator("dialog input[type=search]").fill(words)
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/search.html*")
    tab.locator("ul.search li a", has_text=found).first.wait_for()

def test_dark_and_light(address, tab):
    def brightness(scheme):
        tab.emulate_media(color_scheme=scheme)
        tab.goto(address)
        return tab.evaluate("() => Math.max(...getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3))")
    assert brightness("dark") < 80 < 200 < brightness("light")

def test_the_bank_merges_when_hot_and_splits_when_cold(address, tab):
    tab.emulate_media(reduced_motion="reduce")
    tab.goto(address)
    verdict, slider = tab.locator(".bank-verdict"), tab.locator(".bank-slider")
    slider.fill("1")
    tab.wait_for_function("document.querySelector('.bank-verdict').textContent.startsWith('Above')")
    slider.fill("0.3")
    tab.wait_for_function("/ [2-8] distinct/.test(document.querySelector('.bank-verdict').textContent)", timeout=30_000)
    assert "out of 8" in verdict.inner_text()
