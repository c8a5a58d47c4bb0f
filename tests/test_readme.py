import subprocess, sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

from translate import to_github

SITE = "https://site/"

def convert(text):
    return to_github(text, {"ddcl": "[`ddcl`](https://site/library/assign.html#ddcl)"}.get, SITE, "nbs")

def test_readme_is_what_the_first_notebook_says():
    done = subprocess.run([sys.executable, "docs/build.py", "--check-readme"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_pictures_are_found_beside_the_readme():
    assert convert("![a curve](images/x.png)") == "![a curve](nbs/images/x.png)"
    assert convert('<img alt="a" src="images/x.png">') == '<img alt="a" src="nbs/images/x.png">'
    assert convert("![badge](https://b/x.svg)") == "![badge](https://b/x.svg)"

def test_notebooks_become_pages_and_names_become_links():
    assert convert("[why](theory/02_collapse.ipynb#the-saddle)") == "[why](https://site/theory/collapse.html#the-saddle)"
    assert convert("use `ddcl`, not `other`") == "use [`ddcl`](https://site/library/assign.html#ddcl), not `other`"
    assert convert("[`ddcl`](library/00_assign.ipynb)") == "[`ddcl`](https://site/library/assign.html)"

def test_callouts_citations_and_labels():
    assert convert('::: {.callout-note title="Cold"}\nSay it.\n:::') == "> [!NOTE]\n> **Cold**\n>\n> Say it."
    assert convert("[@rose1990statistical; @wu2021centroid]") == "([Rose 1990; Wu 2021](https://site/references.html))"
    assert convert("$$x$$ {#eq-x} and @eq-x") == "$$x$$ and the equation"

def test_code_is_left_alone():
    fence = "```python\n@eq-x  # [@rose1990] `ddcl`\n```"
    assert convert(fence) == fence
