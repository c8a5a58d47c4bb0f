"Markdown as the notebooks write it (Quarto's) -> MyST for the site, GitHub's for the README."
import posixpath, re

CALLOUT = re.compile(r"^(:::+) *\{\.callout-(\w+)(.*?)\}\n(.*?)^\1 *$", re.M | re.S)
CODE = re.compile(r"(^```.*?^```[^\S\n]*$|`[^`\n]+`)", re.M | re.S)
LABEL = re.compile(r"\$\$\s*\{#(eq-[\w-]+)\}")
HEADING = re.compile(r"^(#+ .*?) *\{#(sec-[\w-]+)\} *$", re.M)
FIGURE = re.compile(r"^!\[(.*?)\]\((\S+?)\)\{#(fig-[\w-]+)(.*?)\} *$", re.M)
REFERENCE = re.compile(r"(?<![\w\[{/])@(eq|fig|sec)-([\w-]+)")
CITATIONS = re.compile(r"\[(@[a-z]+\d{4}[\w-]*(?:; *@[a-z]+\d{4}[\w-]*)*)(?:, ([^\]@]+))?\](?!\()")
CITATION = re.compile(r"(?<![\w\[/.;@])@([a-z]+\d{4}[\w-]*)")
NOTEBOOK = re.compile(r"(\]\()(?!\w+:)([^()#\s]*\.ipynb)")
PICTURE = re.compile(r"(!\[[^\]]*\]\(|<img[^>]*? src=\")(?!\w+:|/)([^\s\")]+)")
TEX = re.compile(r"(?<![\\\w$])\$(?=\S)([^$<>\n]+?)(?<=\S)\$(?![\w$])")
ROLES = {"eq": "eq", "fig": "numref", "sec": "ref"}
WORDS = {"eq": "the equation", "fig": "the figure", "sec": "the section"}

def code_spans(text):
    "Pieces of `text`: prose at even places, code spans and fences at odd ones."
    return CODE.split(text)

def outside_code(change, text):
    return "".join(piece if i % 2 else change(piece) for i, piece in enumerate(code_spans(text)))

def link_spans(text, link):
    "Replace each code span `x` by `link(x)` where that says something, but not in headings or inside the text of a link."
    pieces = code_spans(text)
    for i in range(1, len(pieces), 2):
        line = "".join(pieces[:i]).rpartition("\n")[2]
        in_link = line.rfind("[") > line.rfind("]")
        if not pieces[i].startswith("```") and not in_link and not line.startswith("#"):
            pieces[i] = link(pieces[i][1:-1]) or pieces[i]
    return "".join(pieces)

def page_name(path):
    "The page of a notebook, as nbdev names it: without its number."
    folder, _, name = path.rpartition("/")
    stem = re.sub(r"^\d+[a-zA-Z0-9]*_", "", name.lower()).removesuffix(".ipynb")
    return posixpath.join(folder, stem)

def attribute(attributes, name):
    found = re.search(rf'{name}="(.*?)"', attributes)
    return found[1] if found else None

def callout_parts(match):
    "Kind, title, body and attributes of a Quarto callout; its title is an attribute or a heading on its first line."
    _, kind, attributes, body = match.groups()
    title, heading = attribute(attributes, "title"), re.match(r"#+ +(.*)\n", body)
    if heading and not title: title, body = heading[1], body[heading.end():]
    return kind, title, body.strip(), attributes

def admonition(match):
    "A Quarto callout as a MyST admonition."
    kind, title, body, attributes = callout_parts(match)
    opening = f":::{{admonition}} {title}\n:class: {kind}\n" if title else f":::{{{kind}}}\n"
    folded = attribute(attributes, "collapse")
    if folded: opening += f":collapsible: {'closed' if folded == 'true' else 'open'}\n"
    return f"{opening}\n{body}\n:::"

def quote(match):
    "A Quarto callout as GitHub's alert."
    kind, title, body, _ = callout_parts(match)
    lines = [f"[!{kind.upper()}]", *([f"**{title}**", ""] if title else []), *body.splitlines()]
    return "\n".join(f"> {line}".rstrip() for line in lines)

def figure(match):
    caption, path, label, attributes = match.groups()
    alt = attribute(attributes, "fig-alt") or caption
    return f":::{{figure}} {path}\n:name: {label}\n:alt: {alt}\n\n{caption}\n:::"

def cited(match):
    keys = re.sub(r"[@ ]", "", match[1]).replace(";", ",")
    return f"({{cite:alp}}`{keys}`, {match[2]})" if match[2] else f"{{cite:p}}`{keys}`"

def author_year(key):
    "`rose1990statistical` as a reader would say it."
    name, year = re.match(r"@?([a-z]+)(\d{4})", key).groups()
    return f"{name.capitalize()} {year}"

def prose_to_myst(text):
    text = LABEL.sub(r"$$ (\1)", text)
    text = HEADING.sub(r"(\2)=\n\1", text)
    text = FIGURE.sub(figure, text)
    text = REFERENCE.sub(lambda m: f"{{{ROLES[m[1]]}}}`{m[1]}-{m[2]}`", text)
    text = CITATIONS.sub(cited, text)
    text = CITATION.sub(r"{cite:t}`\1`", text)
    return NOTEBOOK.sub(lambda m: f"{m[1]}{page_name(m[2])}.ipynb", text)

def to_myst(text, link):
    "Callouts, labels, references, citations, page links; `link` turns a code span into a typed reference or None."
    text = CALLOUT.sub(admonition, text)
    text = outside_code(prose_to_myst, text)
    return link_spans(text, link)

def mathematics(html):
    "HTML, such as a table of pandas, with `$x$` marked as MathJax expects it."
    return TEX.sub(r'<span class="math">\\(\1\\)</span>', html)

def to_github(text, link, site, folder):
    "The same for a README beside the folder of notebooks: pages become addresses of the site, pictures paths."
    def prose(piece):
        piece = re.sub(r" *\{#(?:eq|sec|fig)-[^}]*\}", "", piece)
        piece = REFERENCE.sub(lambda m: WORDS[m[1]], piece)
        piece = CITATIONS.sub(lambda m: f"([{'; '.join(map(author_year, re.findall('@[^;]+', m[1])))}]({site}references.html))", piece)
        piece = CITATION.sub(lambda m: f"[{author_year(m[1])}]({site}references.html)", piece)
        piece = PICTURE.sub(lambda m: m[1] + posixpath.join(folder, m[2]), piece)
        return NOTEBOOK.sub(lambda m: f"{m[1]}{site}{page_name(m[2])}.html", piece)
    text = outside_code(prose, CALLOUT.sub(quote, text))
    return link_spans(text, link)
