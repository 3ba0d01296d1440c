"""Classes of ours that derive from vLLM's: nothing abstract is left, and what they override exists and is called so.

`make compat` runs this on every supported release. What moved shows here by name, before an engine starts.
"""

import ast
import importlib
import inspect
import pkgutil
from abc import ABC, abstractmethod
from inspect import Parameter
from pathlib import Path

import pytest
import torch
import vllm
from support.flash import import_mla_flash

import kimi_vllm

OURS, VLLM = Path(kimi_vllm.__file__).parent, Path(vllm.__file__).parent
WHO_ASKS_A_MODEL = ("v1/worker", "model_executor/model_loader")
"""Folders of vLLM that call methods on a model which no base class declares, such as `compute_logits`."""
VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def package(cls):
    return cls.__module__.split(".")[0]


def derived_classes():
    """What our modules define, benchmarks left out, and vLLM has a base for."""
    for module in pkgutil.walk_packages(kimi_vllm.__path__, "kimi_vllm."):
        if module.name == "kimi_vllm.__main__" or ".bench" in module.name:
            continue
        for value in vars(importlib.import_module(module.name)).values():
            is_class_of_it = inspect.isclass(value) and value.__module__ == module.name
            if is_class_of_it and any(package(base) == "vllm" for base in value.__mro__):
                yield value


def calls(*folders):
    """Attributes that these sources read, except through ``super()``, and what they call by a bare name."""
    for folder in folders:
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                        pass
                    case ast.Attribute(attr=name, ctx=ast.Load()) | ast.Call(func=ast.Name(id=name)):
                        yield name


def function_of(value):
    """The function behind a method, class method or property; None for anything else."""
    function = getattr(value, "__func__", getattr(value, "fget", value))
    return function if inspect.isfunction(function) else None


def methods(cls):
    """Names and functions that a class of ours or its mix-ins define. What decorators of vLLM put there is vLLM's."""
    for owner in cls.__mro__:
        for name, value in vars(owner).items():
            function = function_of(value)
            if package(owner) == "kimi_vllm" and function and package(function) == "kimi_vllm":
                yield name, function


def hidden(cls, name):
    """What a method of ours hides in a base class of somebody else's, or None."""
    others = (base for base in cls.__mro__ if package(base) not in ("kimi_vllm", "builtins"))
    return next((vars(base)[name] for base in others if name in vars(base)), None)


def mismatch(ours, theirs):
    """Why a call that fits `theirs` may not fit `ours`; empty if each does."""
    mine, base = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    named = [name for name, parameter in base.items() if parameter.kind not in VARIABLE]
    takes_any_name = any(parameter.kind == Parameter.VAR_KEYWORD for parameter in mine.values())
    if not takes_any_name and (missing := [name for name in named if name not in mine]):
        return f"does not take {missing}"
    required = [n for n, p in mine.items() if p.kind not in VARIABLE and p.default is Parameter.empty]
    if len(named) == len(base) and (extra := [name for name in required if name not in named]):
        return f"wants {extra}"
    if [name for name in mine if name in named] != [name for name in named if name in mine]:
        return f"takes {list(mine)} instead of {list(base)}"
    return ""


def problems(cls, called):
    """What is wrong with a class of ours. `called`: names by which somebody calls what no base class declares."""
    yield from (f"{name} is abstract" for name in sorted(getattr(cls, "__abstractmethods__", ())))
    for name, ours in methods(cls):
        theirs = hidden(cls, name)
        if name == "__init__" and (theirs is None or cls.__name__ in called):
            continue  # only we construct it
        if theirs is None and name not in called:
            yield f"{name} overrides nothing, and nobody calls it"
        elif function_of(theirs) and (why := mismatch(ours, function_of(theirs))):
            yield f"{name} {why}"


def test_our_classes_fit_those_of_vllm(monkeypatch):
    import_mla_flash(monkeypatch)
    classes = list(derived_classes())
    names = {cls.__name__ for cls in classes}
    assert {"KimiWorker", "KDAStateManager", "_KimiAsyncScheduler", "SplitFlashAttnMLAMetadataBuilder"} <= names
    by_us, on_models = (
        set(calls(OURS, OURS.parent / "serve")),
        set(calls(*(VLLM / folder for folder in WHO_ASKS_A_MODEL))),
    )
    found = [
        f"{cls.__name__}: {problem}"
        for cls in classes
        for problem in problems(cls, by_us | on_models if issubclass(cls, torch.nn.Module) else by_us)
    ]
    assert found == []


THEIRS = """
class Base(ABC):
    @abstractmethod
    def get_output(self): ...
    def step(self, tokens, fast=False): ...
    @classmethod
    def find(cls, hashes, length): ...
"""
FITS = """
class Ours(Base):
    def get_output(self): ...
    def step(self, tokens, fast=False, more=None): ...
    @classmethod
    def find(cls, hashes, length): ...
    def called(self): ...
"""


@pytest.mark.parametrize(
    ("side", "old", "new", "expected"),
    [
        (THEIRS, "", "", []),
        (THEIRS, "def step", "def status(self): ...\n    def step", []),
        (THEIRS, "def get_output", "def get_connector(self): ...\n    @abstractmethod\n    def get_output",
         ["get_connector is abstract"]),
        (THEIRS, "def step", "def run", ["step overrides nothing, and nobody calls it"]),
        (THEIRS, "fast=", "fast=False, slow=", ["step does not take ['slow']"]),
        (THEIRS, "hashes, length", "hashes", ["find wants ['length']"]),
        (THEIRS, "hashes, length", "length, hashes", ["find takes ['cls', 'hashes', 'length'] instead of"]),
        (FITS, "def find(cls, hashes, length)", "def find(cls, **more)", []),
        (FITS, "fast=False, more=None", "fast", []),
        (FITS, "def called", "def forgotten", ["forgotten overrides nothing, and nobody calls it"]),
    ],
)  # fmt: skip
def test_a_class_that_does_not_fit_is_reported(side, old, new, expected):
    abstract = {"ABC": ABC, "abstractmethod": abstractmethod}
    theirs = abstract | {"__name__": "vllm.base"}
    exec(THEIRS.replace(old, new, 1) if side is THEIRS else THEIRS, theirs)
    ours = {"__name__": "kimi_vllm.ours", "Base": theirs["Base"]}
    exec(FITS.replace(old, new, 1) if side is FITS else FITS, ours)
    found = list(problems(ours["Ours"], {"called"}))
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found
