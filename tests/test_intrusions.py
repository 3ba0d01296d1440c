"""The ledger of intrusions: every target exists in the vLLM at hand, and our sources touch none that is not listed."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest
from support.flash import import_mla_flash
from vllm import envs

import kimi_vllm
from kimi_vllm.intrusions import INTRUSIONS

TARGETS = [target for intrusion in INTRUSIONS for target in intrusion.targets]
OURS = Path(kimi_vllm.__file__).parent
NOT_SERVING = ("kernels", "bench", "cli")
AS_VLLMS_MODELS_DO = {"static_forward_context", "e_score_correction_bias"}
"""What vLLM's own layers and models set in the same way."""


def assigned(found, name):
    """Whether a class has such a field, or a method that sets such an attribute: neither is on the class."""
    [tree] = ast.parse(textwrap.dedent(inspect.getsource(found))).body
    fields = [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    attributes = [
        node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    ]
    names = {ast.unparse(node) for node in [*fields, *attributes]}
    return bool(names & {name, f"self.{name}"})


def exists(target):
    module, _, dotted = target.partition(":")
    if module == "env":
        return dotted in envs.environment_variables or dotted.startswith("TRITON_")
    found = importlib.import_module(module)
    for name in dotted.split("."):
        if not hasattr(found, name):
            return inspect.isclass(found) and assigned(found, name)
        found = getattr(found, name)
    return True


@pytest.mark.parametrize("target", TARGETS)
def test_target_exists(target, monkeypatch):
    import_mla_flash(monkeypatch)
    assert exists(target)


def test_a_target_that_moved_is_found_missing():
    assert not exists("vllm.v1.request:Request.drop_stale_outputs")


def test_an_attribute_that_is_only_read_is_found_missing(monkeypatch):
    target = "vllm.v1.worker.gpu_model_runner:GPUModelRunner.input_batch"
    source = inspect.getsource
    monkeypatch.setattr(
        inspect, "getsource", lambda found: re.sub(r"self\.input_batch(?= =|:)", "self.x", source(found))
    )
    assert not exists(target)


def test_every_entry_is_complete():
    assert len(TARGETS) == len(set(TARGETS))
    for intrusion in INTRUSIONS:
        assert all((intrusion.what, intrusion.targets, intrusion.why, intrusion.check, intrusion.exit))


def touched(tree, own):
    """Names of other people's objects that a file assigns to, or uses although they are private.

    Args:
        own: Names that our classes define.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name) if name[0] == "_" != name[1]:
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), ctx=ast.Store()):
                pass
            case ast.Attribute(attr=name, ctx=ast.Store()) if name not in own:
                yield name
            case ast.Attribute(attr=name) if name[0] == "_" != name[1:2] and name not in own:
                yield name
            case ast.Call(func=ast.Attribute(attr="setdefault", value=ast.Attribute(attr="environ")), args=arguments):
                yield arguments[0].value
            case ast.Call(func=ast.Name(id="setattr"), args=[ast.Attribute(attr=name), *_]):
                yield name
            case ast.Assign(targets=[ast.Subscript(value=ast.Name(id=name))]) if name.isupper():
                yield name
            case ast.Assign(targets=[ast.Subscript(value=ast.Attribute(attr=name, value=value))]):
                if ast.unparse(value) not in ("self", "cls") and name not in own:
                    yield name


def test_nothing_else_is_touched():
    paths = [path for path in OURS.rglob("*.py") if path.relative_to(OURS).parts[0] not in NOT_SERVING]
    trees = {path: ast.parse(path.read_text()) for path in paths}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    stored = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    own |= {node.attr for node in stored if ast.unparse(node.value) in ("self", "cls")}
    listed = {re.split(r"[:.]", target)[-1] for target in TARGETS} | AS_VLLMS_MODELS_DO
    found = {f"{path.relative_to(OURS)}: {name}" for path, tree in trees.items() for name in touched(tree, own)}
    assert {line for line in found if line.split(": ")[1] not in listed} == set()


@pytest.mark.parametrize(
    "line",
    [
        "config.cache_config.mode = 1",
        "runner._execute(1)",
        "os.environ.setdefault('VLLM_NEW', '1')",
        "setattr(model.hf_config, name, 1)",
        "TABLE[name] = 1",
        "super()._step()",
    ],
)
def test_an_intrusion_is_seen(line):
    assert list(touched(ast.parse(line), set()))
