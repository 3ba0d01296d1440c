"""What the documents name in code exists: files, options, variables, metrics, and the messages they quote."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from support.documents import PAGES, ROOT, Code, code

SOURCES = ("kimi_vllm", "kernels", "serve", "docs", "requirements", "tests")
SITE = Path(pytest.__file__).parents[1]
PATH = re.compile(r"(?:kimi_vllm|kernels|serve|docs|tests|requirements|configs|cache|layers)/[\w./*-]*")
SPANS = [piece for page in PAGES for piece in code(page) if piece.language is None]
SYMPTOMS = [piece for page in PAGES for piece in code(page) if piece.symptom]


def test_files_exist() -> None:
    named = {piece.text for piece in SPANS if PATH.fullmatch(piece.text)}
    assert [name for name in named if not any(list(root.glob(name)) for root in (ROOT, ROOT / "kimi_vllm"))] == []


def test_options_exist() -> None:
    named = {option for piece in SPANS for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", piece.text)}
    # Typer makes options of parameters: `--block-size` of `block_size`.
    others = "\n".join((*_texts(), *((ROOT / name).read_text() for name in ("Makefile", "Dockerfile"))))
    missing = {name for name in named - _of_vllm() if name not in others and name[2:].replace("-", "_") not in others}
    assert missing <= {"--extra-index-url"}


@cache
def _of_vllm() -> set[str]:
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return set(make_arg_parser(FlexibleArgumentParser())._option_string_actions)


def test_variables_exist() -> None:
    text = "\n".join(piece.text for page in PAGES for piece in code(page))
    ours, theirs = "\n".join(_texts()), (SITE / "vllm" / "envs.py").read_text()
    assert [name for name in re.findall(r"\bKIMI_[A-Z_]+", text) if name not in ours] == []
    assert [name for name in re.findall(r"\bVLLM_[A-Z_]+", text) if name not in theirs] == []


def test_every_variable_of_the_plugin_is_documented() -> None:
    variables = {name for text in _texts("kimi_vllm") for name in re.findall(r"\bKIMI_VLLM_[A-Z]+", text)}
    assert [name for name in variables if name not in (ROOT / "docs" / "options.md").read_text()] == []


@pytest.mark.parametrize("symptom", SYMPTOMS, ids=str)
def test_a_quoted_message_exists(symptom: Code) -> None:
    assert _exists(symptom.text), "no source has this text"


def test_a_message_of_nobody_does_not_exist() -> None:
    assert not _exists("this is not a message of anybody")


def _exists(text: str) -> bool:
    """Whether it is a message or a name here, an option or a message of vLLM, or CUDA's."""
    pattern = re.compile(".*".join(re.escape(part) for part in text.split("…")), re.S)
    if any(pattern.search(message) for message in _messages()) or "no kernel image is available" in text:
        return True
    if text.split()[0] in _of_vllm():
        return True
    if text.startswith("kimi_state_"):
        return any(text.removesuffix("_total").removeprefix("kimi_state_") in some for some in _texts("kimi_vllm"))
    longest = max(text.split("…"), key=len).strip()
    # aiohttp is the client of vLLM's load generator.
    vllm = (
        "renderers",
        "entrypoints",
        "utils",
        "v1/core",
        "v1/engine",
        "v1/executor",
        "distributed/device_communicators",
    )
    places = (SITE / name for name in (*(f"vllm/{part}" for part in vllm), "aiohttp"))
    return any(longest in path.read_text() for place in places for path in place.glob("*.py"))


@cache
def _texts(*folders: str) -> tuple[str, ...]:
    return tuple(path.read_text() for folder in folders or SOURCES for path in sorted((ROOT / folder).rglob("*.py")))


@cache
def _messages() -> tuple[str, ...]:
    """All strings of the sources; what an f-string or a logger fills in is any text."""
    found = []
    for text in _texts("kimi_vllm", "kernels", "serve"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.JoinedStr):
                values = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]", "…", node.value))
    return tuple(message.replace("`", "") for message in found)
