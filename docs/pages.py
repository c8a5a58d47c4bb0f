"The notebooks as pages: which there are, in what order, and what their cells are for."
import ast, os, re, sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html
from nbdev.processors import FilterDefaults, add_links, exec_show_docs, insert_warning, rm_export

CONFIG = get_config()
NOTEBOOKS = CONFIG.nbs_path
PACKAGE = CONFIG.lib_path
SITE = CONFIG.doc_url.rstrip("/") + "/"

class Notebook(FilterDefaults):
    "nbdev's processing of a notebook, except that nothing is run and exported code stays: the entries are made from the package."
    def base_procs(self):
        ours = {add_links, exec_show_docs, insert_warning, rm_export}
        return [processor for processor in super().base_procs() if processor not in ours]

@dataclass
class Page:
    path: Path
    name: str
    title: str
    summary: str
    cells: list

    @property
    def section(self): return self.name.rpartition("/")[0]

    @property
    def code(self): return "\n".join(cell.source for cell in self.cells if cell.cell_type == "code")

    @property
    def words(self): return set(re.findall(r"[A-Za-z_]\w*", self.code))

    def calls(self, name): return re.search(rf"(?<![\w.]){name}\(", self.code) is not None

    @property
    def source(self): return self.path.relative_to(ROOT).as_posix()

def fail(message):
    raise SystemExit(f"docs: {message}")

def read_page(path):
    if not path.exists(): fail(f"{path.relative_to(ROOT)} is missing")
    notebook = read_nb(path)
    Notebook()(notebook)
    front = getattr(notebook, "frontmatter_", {})
    if "title" not in front: fail(f"{path.relative_to(ROOT)} has no `# Title` in its first cell")
    cells = entries_in_order([cell for cell in notebook.cells if cell.cell_type != "raw"])
    name = nbpath2html(path.relative_to(NOTEBOOKS)).with_suffix("").as_posix()
    return Page(path, name, str(front["title"]), str(front.get("description") or ""), cells)

def entries_in_order(cells):
    "nbdev puts the entries of a cell after it, last name first; readers want them in the order of the code."
    def added(cell): return bool(cell.get("has_sd"))
    return [cell for is_entry, run in groupby(cells, added) for cell in (reversed(list(run)) if is_entry else run)]

def is_visible(path):
    return not any(part[0] in "._" for part in path.relative_to(NOTEBOOKS).parts)

def read_pages():
    "All pages, in the order of their files; page names drop the numbers, so two files may claim the same one."
    pages = {}
    for path in sorted(path for path in NOTEBOOKS.rglob("*.ipynb") if is_visible(path)):
        page = read_page(path)
        if page.name in pages: fail(f"{page.source} and {pages[page.name].source} would be the same page: rename one of them")
        pages[page.name] = page
    if "index" not in pages: fail(f"{NOTEBOOKS.name}/{CONFIG.readme_nb} is missing: the site begins there")
    return list(pages.values())

def directives(cell):
    return getattr(cell, "directives_", {})

def unquoted(text):
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else text

def visible_code(cell):
    return re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()

def shown_name(cell):
    "The name in a `show_doc(name)` cell."
    match = re.match(r"show_doc\(([\w.]+)", visible_code(cell)) if cell.cell_type == "code" else None
    return match[1] if match else None

def is_exported(cell):
    return bool({"export", "exporti"} & directives(cell).keys())

def is_hidden(cell):
    return bool({"hide", "default_exp"} & directives(cell).keys()) or directives(cell).get("include") == "false"

def defined_names(code):
    "What a cell defines: functions, classes, constants; imports do not count."
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)): yield ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)

def source_label(code, most=4):
    names = list(defined_names(code))
    return "Source: " + ", ".join(names[:most]) + ", …" * (len(names) > most)

def is_meant(span, full, page, names):
    "A word such as `bank` that is also an argument's name is a link only on its own page, and on pages whose code calls it."
    return span not in names.parameters or names.page(full) == page.name or page.calls(span)
