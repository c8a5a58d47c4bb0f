"The package as others get it: what an import costs, what a wheel holds, and when a build stops."
import json
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["transformers", "sentence_transformers", "matplotlib", "seaborn", "sympy", "pandas", "pyarrow", "torchvision", "sklearn", "scipy", "PIL",
         "IPython", "nbdev", "vector_quantize_pytorch"]
ON_PURPOSE = {"estimators", "adapters"}  # they extend classes of scikit-learn, sentence-transformers and transformers


def python(*arguments, cwd=None):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=cwd)


def modules():
    "Dotted names of all modules of the package."
    paths = sorted((ROOT / "ddcl_nb").rglob("*.py"))
    return [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths if p.stem != "_modidx"]


# --- imports

def heavy_after(imports):
    "Which heavy packages are there after `import torch` and each further import."
    code = f"""
import importlib, json, sys, torch
before = set(sys.modules)
for name in {imports!r}:
    importlib.import_module(name)
    print(json.dumps([name, [h for h in {HEAVY!r} if h in sys.modules and h not in before]]))
"""
    found = python("-c", code)
    assert found.returncode == 0, found.stderr
    return dict(map(json.loads, found.stdout.splitlines()))


def test_importing_the_package_imports_next_to_nothing():
    found = python("-c", "import sys; before = set(sys.modules); import ddcl_nb; print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))")
    assert found.stdout.strip() == "['ddcl_nb']", found.stdout + found.stderr


def test_no_module_imports_what_it_may_not_need():
    light = [name for name in modules() if name.split(".")[-1] not in ON_PURPOSE]
    assert {"ddcl_nb", "ddcl_nb.assign", "ddcl_nb.training", "ddcl_nb.experiments.registry"} <= set(light)
    assert heavy_after(light) == {name: [] for name in light}


def test_the_watch_for_heavy_imports_sees_one():
    assert {"sklearn", "scipy"} <= set(heavy_after(["sklearn"])["sklearn"])


# --- builds

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A copy of what a build can see, so that nothing is built among the sources."
    copy = tmp_path_factory.mktemp("tree")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, copy)
    for name in ("ddcl_nb", "nbs", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    "A wheel made from the source archive, as package indexes want both."
    out = tmp_path_factory.mktemp("wheel")
    found = python("-m", "build", "--no-isolation", "--outdir", out, tree)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    return next(out.glob("*.whl"))


def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def text_in(wheel, name):
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith(name))).decode()


def test_a_wheel_holds_every_module_and_nothing_else(tree, wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(tree)) for pattern in ("*.py", "assets/*") for path in (tree / "ddcl_nb").rglob(pattern)}
    assert {"ddcl_nb/assign.py", "ddcl_nb/experiments/__init__.py", "ddcl_nb/experiments/registry.py", "ddcl_nb/assets/page.js"} <= sources
    beside = {name for name in held if not name.split("/")[0].endswith(".dist-info")}
    assert beside == sources | {"ddcl_nb/py.typed"}


def test_a_wheel_says_what_the_settings_say(wheel):
    metadata, wanted = Parser().parsestr(text_in(wheel, "METADATA")), settings()
    assert (metadata["Name"], metadata["Version"], metadata["Summary"]) == (wanted["lib_name"], wanted["version"], wanted["description"])
    assert metadata["Requires-Python"] == ">=" + wanted["min_python"]
    needs = metadata.get_all("Requires-Dist")
    assert sorted(n for n in needs if "extra ==" not in n) == sorted(wanted["requirements"].split())
    extras = {name.removesuffix("_requirements") for name in wanted if name.endswith("_requirements")}
    assert set(metadata.get_all("Provides-Extra")) == extras | {"all"}
    for extra in extras:
        named = {re.split(r"\s*;", n)[0] for n in needs if re.search(rf"""extra == ["']{extra}["']""", n)}
        assert named == set(wanted[f"{extra}_requirements"].split())
    assert "ddcl = ddcl_nb.cli:main" in text_in(wheel, "entry_points.txt")


def test_an_unpacked_wheel_works_without_the_sources(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ddcl_nb.training, ddcl_nb.experiments.registry as r; print(ddcl_nb.__file__, r.provenance()['commit'])"
    found = python("-c", code, cwd=tmp_path)
    assert found.stdout.split() == [str(tmp_path / "ddcl_nb" / "__init__.py"), "None"], found.stderr


@pytest.mark.parametrize("file, old, new, message", [
    (None, "", "", None),
    ("pyproject.toml", 'name = "ddcl_nb"', 'name = "other"', "pyproject.toml: name is 'other'"),
    ("pyproject.toml", 'description = "', 'description = "Not ', "pyproject.toml: description is 'Not"),
    ("pyproject.toml", 'requires-python = ">=', 'requires-python = ">=2', "pyproject.toml: requires-python is '>=2"),
    ("pyproject.toml", 'lib_path = "ddcl_nb"', 'lib_path = "lib"', "pyproject.toml: tool.nbdev.lib_path is 'lib'"),
    ("pyproject.toml", 'tst_flags = "notest', 'tst_flags = "', "pyproject.toml: tool.nbdev.tst_flags is"),
    ("settings.ini", "version = ", "version = 9", "__init__.py: __version__ is")])
def test_a_build_stops_where_two_files_disagree(tree, tmp_path, file, old, new, message):
    shutil.copytree(tree, tmp_path / "edited", ignore=shutil.ignore_patterns("nbs", "tests", "*.egg-info", "build"))
    if file:
        path = tmp_path / "edited" / file
        before = path.read_text(encoding="utf-8")
        path.write_text(re.sub(rf"(?m)^{re.escape(old)}", new, before, count=1), encoding="utf-8")
        assert path.read_text(encoding="utf-8") != before
    found = python("setup.py", "--version", cwd=tmp_path / "edited")
    if message is None:
        assert found.returncode == 0 and found.stdout.strip().endswith(settings()["version"]), found.stderr
    else:
        assert found.returncode and message in found.stderr and "but settings.ini says" in found.stderr
