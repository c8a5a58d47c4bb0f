"README.md from the first notebook."
from names import Names
from pages import CONFIG, NOTEBOOKS, PACKAGE, ROOT, SITE, directives, is_exported, is_hidden, is_meant, read_page, shown_name, visible_code
from translate import to_github

README = ROOT / "README.md"

def text_of(parts):
    return parts if isinstance(parts, str) else "".join(parts or "")

def readme_output(raw):
    "An output as markdown: markdown as it is, text in a fence, nothing for pictures (a README links to files)."
    data = raw.get("data", {})
    if "text/markdown" in data: return text_of(data["text/markdown"]).strip()
    if any(kind.startswith("image/") for kind in data): return ""
    text = text_of(raw.get("text") or data.get("text/plain")).rstrip()
    return f"```text\n{text}\n```" if text else ""

def readme_parts(page, convert):
    yield "<!-- Made from nbs/index.ipynb: edit that and run `make export`. -->"
    yield convert(f"# {page.title}\n\n> {page.summary}")
    for cell in page.cells:
        if cell.cell_type == "markdown": yield convert(cell.source)
        elif not is_hidden(cell) and not is_exported(cell) and not shown_name(cell):
            if visible_code(cell) and directives(cell).get("echo") != "false": yield f"```python\n{visible_code(cell)}\n```"
            if directives(cell).get("output") != "false": yield from (convert(readme_output(raw)) for raw in cell.outputs)

def readme():
    page, names = read_page(NOTEBOOKS / CONFIG.readme_nb), Names(PACKAGE.name)
    def link(span):
        full = names.find(span, page.name)
        return f"[`{span}`]({SITE}{names.place[full]})" if full and is_meant(span, full, page, names) else None
    def convert(text): return to_github(text, link, SITE, NOTEBOOKS.name)
    return "\n\n".join(part for part in readme_parts(page, convert) if part) + "\n"

def readme_is_stale():
    return not README.exists() or README.read_text(encoding="utf-8") != readme()

def write_readme():
    README.write_text(readme(), encoding="utf-8")
