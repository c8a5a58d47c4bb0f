"The package's names: where each is documented, and which names in the prose do not exist."
import ast, builtins, importlib, inspect, math, re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

NAME = re.compile(r"([A-Za-z_][\w.]*)(\(.*\))?")

class Names:
    "Every name that the notebooks export, from the index that nbdev writes."
    def __init__(self, package):
        self.package = package
        index = importlib.import_module(f"{package}._modidx").d["syms"]
        self.module = {full: module for module, symbols in index.items() for full in symbols}
        self.place = {full: places[0] for symbols in index.values() for full, places in symbols.items()}
        self.by_short = {}
        for full in self.module:
            self.by_short.setdefault(self.short(full), []).append(full)
        self.parameters = set().union(*(parameters(importlib.import_module(name).__file__) for name in index))

    def short(self, full):
        return full.removeprefix(self.module[full] + ".")

    def page(self, full):
        return self.place[full].partition(".html#")[0]

    def anchor(self, full):
        "The anchor that nbdev's links use; the first of two names that differ only in capitals has it."
        owner = next(other for other, place in self.place.items() if place == self.place[full])
        return self.place[full].partition("#")[2] if owner == full else ""

    def resolve(self, name, page):
        "The full name that `name` stands for on `page`, or None when there is none or it is ambiguous."
        if name in self.module: return name
        found = self.by_short.get(name, [])
        here = [full for full in found if self.page(full) == page]
        candidates = here or found
        return candidates[0] if len(candidates) == 1 else None

    def find(self, span, page):
        "The full name behind a code span such as `fit`, `fit()` or `Anneal(0.9, 0.1)`."
        match = NAME.fullmatch(span)
        return self.resolve(match[1], page) if match else None

    def object(self, full):
        found = importlib.import_module(self.module[full])
        for part in self.short(full).split("."): found = inspect.getattr_static(found, part)
        return found

    def misspelled(self, span, page, local):
        "Whether a code span looks like a name of the package, or like a call, and is neither here nor in `local`."
        match = NAME.fullmatch(span)
        if not match or self.find(span, page): return False
        name, call = match.groups()
        root, _, attribute = name.partition(".")
        if root == self.package: return bool(attribute) and not exists(name)
        owner = self.resolve(root, page)
        if owner and attribute: return not self.mentions(owner, attribute.partition(".")[0])
        return bool(call) and not attribute and len(name) > 2 and name not in local and name not in familiar()

    def mentions(self, full, attribute):
        "Whether an object has an attribute, or its class ever names one (attributes set in `__init__`)."
        found = self.object(full)
        return hasattr(found, attribute) or re.search(rf"\b{attribute}\b", inspect.getsource(found)) is not None

def parameters(path):
    "Names of all arguments in a file."
    return {node.arg for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))) if isinstance(node, ast.arg)}

def exists(dotted):
    "Whether a dotted name is a module, or something in one."
    head, _, last = dotted.rpartition(".")
    if not head: return find_spec(dotted) is not None
    if not exists(head): return False
    try: return find_spec(dotted) is not None or hasattr(importlib.import_module(head), last)
    except ModuleNotFoundError: return hasattr_path(head, last)

def hasattr_path(head, last):
    module, _, name = head.rpartition(".")
    return hasattr(getattr(importlib.import_module(module), name, None), last)

@cache
def familiar():
    "Functions that prose may call by their bare name."
    import numpy, torch
    return {name for module in (builtins, math, numpy, torch, torch.nn, torch.nn.functional) for name in dir(module)}
