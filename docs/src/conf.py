"How Sphinx makes the site; run by docs/build.py on the staged pages."
import ast, importlib.util
from functools import cache
from pathlib import Path

from sphinx.domains.python import PythonDomain

import ddcl_nb

project = "ddcl_nb"
author = "The ddcl_nb authors"
copyright = author
version = release = ddcl_nb.__version__
html_title = project

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_copybutton", "sphinx_design", "sphinxcontrib.bibtex"]
exclude_patterns = [".doctrees"]
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath", "fieldlist", "html_image", "smartquotes"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
bibtex_default_style = "plain"
numfig = True
numfig_format = {"figure": "Figure %s"}
math_numfig = False
math_eqref_format = "({number})"

nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 72
toc_object_entries_show_parents = "hide"

mathjax_path = "mathjax/tex-chtml.js"
mathjax4_config = {"loader": {"paths": {"fonts": "[mathjax]/../@mathjax"}}, "output": {"displayOverflow": "scroll"}}

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_js_files = [("bank.js", {"defer": "defer"})]
html_favicon = "_static/logo.svg"
html_copy_source = False
html_show_sourcelink = False
html_context = {"default_mode": "auto"}
html_sidebars = {"**": ["sidebar-nav-bs"], "index": [], "references": []}
html_theme_options = {
    "logo": {"text": project, "image_light": "_static/logo.svg", "image_dark": "_static/logo.svg", "alt_text": ""},
    "github_url": "https://github.com/ddcl-nb/ddcl_nb",
    "navbar_align": "left",
    "show_nav_level": 2,
    "show_toc_level": 2,
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

def number_figures_by_page(app, env):
    "Each page is read alone: its figures count from one."
    for figures in env.toc_fignumbers.values():
        for labels in figures.values(): labels.update({label: (i,) for i, label in enumerate(labels, 1)})

@cache
def imports(module):
    "What a module imports from others, for type checkers too: pairs of a name and its full name."
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))
    package = module.rpartition(".")[0]
    source = lambda node: importlib.util.resolve_name("." * node.level + (node.module or ""), package)
    return {(alias.name, f"{source(node)}.{alias.name}") for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}

class Domain(PythonDomain):
    "Of several objects with one name, the one that the module at hand imports."
    def find_obj(self, env, modname, classname, name, type, searchmode=0):
        found = super().find_obj(env, modname, classname, name, type, searchmode)
        if len(found) < 2 or not modname: return found
        return [match for match in found if (name, match[0]) in imports(modname)] or found

def setup(app):
    app.connect("env-check-consistency", number_figures_by_page)
    app.add_domain(Domain, override=True)
