"Build metadata from settings.ini; stops when pyproject.toml or the package disagrees with it."
import re, tomllib
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(root / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
package_version = re.search(r'__version__ = "(.+?)"', (root / settings["lib_path"] / "__init__.py").read_text())[1]

for where, found, wanted in [
        ("pyproject.toml: name", project["project"]["name"], settings["lib_name"]),
        ("pyproject.toml: description", project["project"]["description"], settings["description"]),
        ("pyproject.toml: requires-python", project["project"]["requires-python"], ">=" + settings["min_python"]),
        ("pyproject.toml: tool.nbdev.lib_path", project["tool"]["nbdev"]["lib_path"], settings["lib_path"]),
        ("pyproject.toml: tool.nbdev.tst_flags", project["tool"]["nbdev"]["tst_flags"], settings["tst_flags"]),
        ("__init__.py: __version__", package_version, settings["version"])]:
    if found != wanted:
        raise SystemExit(f"{where} is {found!r}, but settings.ini says {wanted!r}")

extras = {name.removesuffix("_requirements"): value.split() for name, value in settings.items() if name.endswith("_requirements")}
extras["all"] = sorted({need for name, needs in extras.items() if name != "dev" for need in needs})

setup(version=settings["version"], author=settings["author"], author_email=settings["author_email"],
      license=settings["license"], keywords=settings["keywords"].split(),
      packages=find_packages(include=[settings["lib_path"] + "*"]), package_data={settings["lib_path"]: ["py.typed", "assets/*"]},
      install_requires=settings["requirements"].split(), extras_require=extras,
      long_description=(root / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
      classifiers=["Development Status :: 4 - Beta", "Intended Audience :: Science/Research", "Programming Language :: Python :: 3",
                   "Topic :: Scientific/Engineering :: Artificial Intelligence", "Typing :: Typed"],
      entry_points={"console_scripts": settings["console_scripts"].split(),
                    "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"]})
