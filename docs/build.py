"""The documentation site, and README.md, from the notebooks.

    python docs/build.py                  the site, in _docs/
    python docs/build.py --readme         README.md
    python docs/build.py --check-readme   fails when README.md is not what the notebooks say
"""
import argparse, base64, os, shutil, subprocess, sys
from pathlib import Path

import nbformat

from entries import Entries, docstring, members
from names import Names
from pages import (CONFIG, NOTEBOOKS, PACKAGE, ROOT, defined_names, directives, fail, is_exported, is_hidden, is_meant, is_visible,
                   read_pages, shown_name, source_label, unquoted, visible_code)
from readme import readme_is_stale, write_readme
from translate import code_spans, mathematics, to_myst

STAGING = ROOT / "_site_src"
SECTIONS = {
    "theory": ("Theory", "Each claim with its proof, a measurement and a verdict."),
    "library": ("Library", "One notebook per module: the idea, the code, the tests, the pictures."),
    "experiments": ("Experiments", "What was run, what came out, and how it compares."),
    "guides": ("Guides", "How to put a prototype layer to work, and what to do when it misbehaves."),
}
ICONS = {"theory": "superscript", "library": "cubes", "experiments": "flask", "guides": "compass"}
MATHJAX = ["mathjax/tex-chtml.js", "mathjax/input", "mathjax/a11y", "mathjax/ui", "mathjax/sre",
           "@mathjax/mathjax-newcm-font/chtml", "@mathjax/mathjax-newcm-font/chtml.js"]
WIDE = 800  # pixels; on a phone, wider pictures scroll

def sections(pages):
    "The folders that have notebooks: those of SECTIONS first, in that order."
    found = sorted({page.section for page in pages} - {""})
    return [name for name in SECTIONS if name in found] + [name for name in found if name not in SECTIONS]

def heading(section):
    return SECTIONS.get(section, (section.replace("/", " · ").capitalize(), ""))

def shown_names(pages, names):
    "Everything that has an entry of its own, as full names: what has a docstring; of the rest the source is shown."
    shown = {names.resolve(short, page.name) for page in pages for short in map(shown_name, page.cells) if short}
    return {full for full in shown - {None} if docstring(names.object(full))}

def markdown_cell(text):
    return nbformat.v4.new_markdown_cell(text)

def as_text(lines):
    "What a notebook file may keep as a list of lines."
    return lines if isinstance(lines, str) else "".join(lines)

def picture_width(data):
    "Pixels, from the header of a PNG in an output's `data`; zero when there is none."
    return int.from_bytes(base64.b64decode(as_text(data.get("image/png", ""))[:32])[16:20], "big")

def code_settings(options, outputs=()):
    "MyST-NB's tags and metadata for Quarto's cell options; wide pictures get a class of their own."
    hides = [("echo", "remove-input"), ("output", "remove-output"), ("warning", "remove-stderr")]
    tags, settings = [tag for option, tag in hides if options.get(option) == "false"], {}
    if "code-fold" in options:
        tags.append("hide-input")
        summary = unquoted(options.get("code-summary", "Code"))
        settings |= {"code_prompt_show": summary, "code_prompt_hide": summary}
    if "fig-cap" in options:
        settings["figure"] = {"caption": unquoted(options["fig-cap"])}
        if "label" in options: settings["figure"]["name"] = options["label"]
    alt = options.get("fig-alt") or options.get("fig-cap")
    if alt: settings["image"] = {"alt": unquoted(alt).replace("$", "")}
    if any(picture_width(found.get("data", {})) > WIDE for found in outputs):
        settings["image"] = settings.get("image", {}) | {"classes": "wide"}
    return {"tags": tags, "mystnb": settings}

def output(raw):
    "A stored output as nbformat wants it."
    fields = {key: value for key, value in raw.items() if key not in ("execution_count", "metadata")}
    if fields["output_type"] in ("display_data", "execute_result"): fields["metadata"] = {}
    if fields["output_type"] == "execute_result": fields["execution_count"] = None
    return nbformat.from_dict(fields)

class Site:
    "Stages the pages as MyST notebooks and has Sphinx make HTML of them."
    def __init__(self):
        self.names = Names(PACKAGE.name)
        self.pages = read_pages()
        self.shown = shown_names(self.pages, self.names)
        self.entries = Entries(self.names, self.translate, CONFIG.git_url)
        self.documented = self.shown | self.members_of(self.shown)

    def members_of(self, shown):
        return {f"{full}.{name}" for full in shown for name in members(self.names.object(full))} & self.names.module.keys()

    def reference(self, span, page):
        "A typed reference for a code span that names something documented."
        full = self.names.find(span, page.name)
        return f"{{py:obj}}`{span} <{full}>`" if full in self.documented and is_meant(span, full, page, self.names) else None

    def translate(self, text, page):
        return to_myst(text, lambda span: self.reference(span, page))

    def cells(self, page):
        "The staged cells: entries take the place of exported code, which is folded after them."
        source = None
        for cell in page.cells:
            if source and not shown_name(cell): yield source
            if not shown_name(cell): source = self.folded_source(cell)
            yield from self.staged(cell, page)
        if source: yield source

    def folded_source(self, cell):
        if cell.cell_type != "code" or is_hidden(cell) or not is_exported(cell): return None
        code = visible_code(cell)
        if not any(defined_names(code)): return None
        return self.code_cell(code, {"code-fold": "true", "code-summary": source_label(code)}, [])

    def staged(self, cell, page):
        if cell.cell_type == "markdown": yield markdown_cell(self.translate(cell.source, page))
        elif shown_name(cell): yield from self.entry(shown_name(cell), page)
        elif visible_code(cell) and not is_hidden(cell) and not is_exported(cell):
            yield self.code_cell(visible_code(cell), directives(cell), [self.output(raw, page) for raw in cell.outputs])

    def entry(self, short, page):
        full = self.names.resolve(short, page.name)
        if not full: fail(f"{page.source} documents `{short}`, which the package lacks: run `make export`")
        if full in self.shown: yield markdown_cell(self.entries.entry(full, page, skip=self.shown))

    def code_cell(self, code, options, outputs):
        return nbformat.v4.new_code_cell(code, metadata=code_settings(options, outputs), outputs=outputs)

    def output(self, raw, page):
        "A stored output; Markdown in it is translated like that of the page, and formulas in tables are marked."
        found = output(raw)
        changes = {"text/markdown": lambda text: self.translate(text, page), "text/html": mathematics}
        data = found.get("data", {})
        for kind in changes.keys() & data.keys(): data[kind] = changes[kind](as_text(data[kind]))
        return found

    def stage(self, page):
        lead = f"\n\n{{.lead}}\n{page.summary}" if page.summary else ""
        title = markdown_cell(self.translate(f"# {page.title}{lead}", page))
        write_notebook([title, *self.cells(page)], STAGING / f"{page.name}.ipynb")

    def stage_home(self, page):
        "The first page: its title, the moving picture, a card per section, then the notebook."
        lead = self.translate(f"# {page.title}\n\n{{.lead}}\n{page.summary}", page)
        hero = (ROOT / "docs/home.md").read_text(encoding="utf-8")
        cells = [markdown_cell(text) for text in (lead, hero, cards(sections(self.pages)))]
        write_notebook([*cells, *self.cells(page), markdown_cell(home_contents(sections(self.pages)))], STAGING / "index.ipynb")

    def check_spelling(self):
        "Stop at code spans in the prose that look like names of the package, and are none."
        found = [f"{page.source}: `{span}` is not a name of the package" for page in self.pages for span in self.misspelled(page)]
        if found: fail("\n".join(["names that do not exist", *found]))

    def misspelled(self, page):
        prose = "\n\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")
        spans = [span[1:-1] for span in code_spans(prose)[1::2] if not span.startswith("```")]
        return sorted({span for span in spans if self.names.misspelled(span, page.name, page.words)})

    def stage_all(self):
        shutil.rmtree(STAGING, ignore_errors=True)
        shutil.copytree(ROOT / "docs/src", STAGING)
        copy_mathjax()
        copy_pictures()
        for page in self.pages:
            self.stage_home(page) if page.name == "index" else self.stage(page)
        for section in sections(self.pages): self.write_section(section)

    def write_section(self, section):
        title, summary = heading(section)
        inside = [page for page in self.pages if page.section == section]
        lines = [f"1. [{page.title}]({page.name.rpartition('/')[2]}.ipynb)\\\n   {self.translate(page.summary, page)}" for page in inside]
        toctree = contents([page.name.rpartition("/")[2] for page in inside])
        index = "\n\nEvery name the package exports is in the {ref}`index of names <genindex>`." if section == "library" else ""
        text = f"# {title}\n\n{{.lead}}\n{summary}\n\n{{.pages}}\n" + "\n".join(lines) + f"{index}\n\n{toctree}\n"
        (STAGING / section / "index.md").write_text(text, encoding="utf-8")

def contents(documents):
    return "\n".join(["```{toctree}", ":hidden:", "", *documents, "```"])

def home_contents(found):
    return contents([f"{section}/index" for section in found] + ["references"])

def cards(found):
    "A card per section."
    lines = [f"::::{{grid}} 1 2 2 {max(2, min(4, len(found)))}", ":gutter: 3", ":class-container: sections", ""]
    for section in found:
        title, summary = heading(section)
        icon = f"{{fas}}`{ICONS.get(section, 'book')}` "
        lines += [f":::{{grid-item-card}} {icon}{title}", f":link: {section}/index", ":link-type: doc", "", summary, ":::", ""]
    return "\n".join([*lines, "::::"])

def write_notebook(cells, path):
    "A notebook with numbered cells, so that two builds agree."
    for i, cell in enumerate(cells): cell["id"] = f"cell-{i}"
    language = {"name": "python", "pygments_lexer": "ipython3"}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": language})
    nbformat.validate(notebook)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)

def copy_mathjax():
    "MathJax and its font beside the pages, from where npm put them."
    source, target = ROOT / "docs/node_modules", STAGING / "_static"
    for name in MATHJAX:
        if not (source / name).exists(): fail("MathJax is missing: run `sh docs/vendor.sh`")
        copy = shutil.copytree if (source / name).is_dir() else copy_file
        copy(source / name, target / name)

def copy_file(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)

def copy_pictures():
    "What the notebooks show from files."
    for path in NOTEBOOKS.rglob("*"):
        if path.is_file() and path.suffix in (".png", ".svg", ".jpg", ".gif") and is_visible(path):
            copy_file(path, STAGING / path.relative_to(NOTEBOOKS))

def run_sphinx(target):
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", STAGING / ".doctrees", STAGING, target]
    return subprocess.call(list(map(str, command)), env={**os.environ, "PYTHONPATH": str(ROOT)})

def build_site(target):
    site = Site()
    site.check_spelling()
    site.stage_all()
    status = run_sphinx(Path(target))
    if status == 0: print(f"{len(site.pages)} notebooks -> {target}/index.html")
    return status

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write README.md")
    parser.add_argument("--check-readme", action="store_true", help="fail when README.md is stale")
    parser.add_argument("--output", default=CONFIG.doc_path, help="folder of the site")
    options = parser.parse_args()
    if options.readme: write_readme()
    elif options.check_readme:
        if readme_is_stale(): fail("README.md is not what nbs/index.ipynb says: run `make export`")
    else: raise SystemExit(build_site(options.output))

if __name__ == "__main__": main()
