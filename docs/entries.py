"Sphinx entries for what the notebooks export: signature, docstring, parameters."
import inspect
from fastcore.docments import docments, empty

class Verbatim:
    "Shown in a signature as it was written."
    def __init__(self, text): self.text = text
    def __repr__(self): return self.text

def plain_annotation(value):
    "Annotations written as strings, without their quotes."
    text = getattr(value, "__forward_arg__", value)
    return Verbatim(text) if isinstance(text, str) else value

def plain_default(value):
    "Names for functions and classes; no address in memory, which would differ from build to build."
    if getattr(value, "__name__", "") == "<lambda>": return Verbatim("...")
    if hasattr(value, "__name__"): return Verbatim(value.__name__)
    return Verbatim(f"{type(value).__name__}()") if " at 0x" in repr(value) else value

def has_signature(found):
    "Whether it can be called with arguments of its own (a property cannot, nor an exception that adds nothing)."
    try: return bool(inspect.signature(found))
    except ValueError: return False

def signature_text(found):
    signature = inspect.signature(found)
    shown = [p.replace(annotation=plain_annotation(p.annotation), default=p.default if p.default is p.empty else plain_default(p.default))
             for p in signature.parameters.values() if p.name not in ("self", "cls")]
    return str(signature.replace(parameters=shown, return_annotation=plain_annotation(signature.return_annotation)))

def unwrapped(found):
    "The function inside a property, class method or static method; a class as it is."
    if inspect.isclass(found): return found
    if isinstance(found, property): return found.fget
    return inspect.unwrap(getattr(found, "__func__", getattr(found, "func", found)))

def kind(found, short):
    if inspect.isclass(found): return "class"
    if isinstance(found, property) or type(found).__name__ == "cached_property": return "property"
    return "method" if "." in short else "function"

def docstring(found):
    "The docstring, but not the one that Python writes for a data class or a named tuple."
    text = inspect.getdoc(unwrapped(found)) if not inspect.isclass(found) else inspect.cleandoc(found.__doc__ or "")
    return "" if not text or text.startswith(f"{getattr(found, '__name__', ' ')}(") else text

def members(found):
    "Names of the public methods and properties that a class itself documents."
    if not inspect.isclass(found): return []
    documented = (inspect.isroutine, lambda o: isinstance(o, property), lambda o: hasattr(o, "func"))
    return [name for name, member in vars(found).items()
            if not name.startswith("_") and any(test(member) for test in documented) and docstring(member)]

def field_list(found):
    "The comments beside the parameters, as Sphinx fields."
    fields = []
    for name, parameter in docments(found, full=True).items():
        text = parameter.docment
        if text in (None, empty) or name in ("self", "cls"): continue
        text = " ".join(text.split())
        fields.append(f":returns: {text}" if name == "return" else f":param {name}: {text}")
    return "\n".join(fields)

class Entries:
    "Writes entries; `names` says where things are, `translate` turns a docstring into MyST, `repository` is where files are read."
    def __init__(self, names, translate, repository):
        self.names, self.translate, self.repository = names, translate, repository

    def address(self, found, full):
        path = self.names.module[full].replace(".", "/") + ".py"
        return f"{self.repository}/blob/main/{path}#L{inspect.getsourcelines(found)[1]}"

    def entry(self, full, page, skip=()):
        "The entry of one name, with its documented members except those in `skip`, which have entries of their own."
        found, short = self.names.object(full), self.names.short(full)
        role, code = kind(found, short), unwrapped(found)
        called = role != "property" and has_signature(code)
        head = short + signature_text(code) if called else short
        options = [f":module: {self.names.module[full]}"]
        options += [f":{type(found).__name__}:"] * isinstance(found, (classmethod, staticmethod))
        parts = [self.translate(docstring(found), page), field_list(code) if called else ""]
        inside = [f"{full}.{name}" for name in members(found)]
        parts += [self.entry(name, page) for name in inside if name in self.names.module and name not in skip]
        parts.append(f"[Source on GitHub]({self.address(code, full)}){{.api-source}}")
        fence = ":" * (8 if role == "class" else 6)
        body = "\n\n".join(part for part in parts if part)
        anchor = self.names.anchor(full)
        opening = [f'<span id="{anchor}"></span>', ""] if anchor else []
        opening += [f":::{{py:currentmodule}} {self.names.module[full]}", ":::", ""]
        return "\n".join([*opening, f"{fence}{{py:{role}}} {head}", *options, "", body, fence])
