"""What the documents name exists: links, files, options, variables, metrics, and the messages they quote."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from support import documents
from support.documents import ALL, ROOT, WITH_COMMANDS, Code

from kimi_vllm.options import KimiOptions

sys.path.insert(0, str(ROOT / "docs"))
import regions

SOURCES = ("kimi_vllm", "kernels", "serve", "docs", "requirements")
SITE = Path(pytest.__file__).parents[1]
OF_CUDA = ("no kernel image is available for execution on the device",)
OF_OTHERS = {
    # Options of programs that are not here, in words that `test_commands.py` does not see as commands.
    "--extra-index-url": "pip install",
    "--ipc=host": "docker run",
    "--shm-size": "docker run",
    "--head": "ray start",
    "--record": "pytest, by tests/conftest.py",
}


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", ALL, ids=ids)
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for link in documents.links(document):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in documents.anchors(target)):
            broken.append(link)
    assert broken == []


def test_a_page_that_nobody_links_to_is_lost() -> None:
    linked = {
        (document.parent / link.partition("#")[0]).resolve() for document in ALL for link in documents.links(document)
    }
    assert [ids(page) for page in (ROOT / "docs").glob("*.md") if page not in linked] == []


def spans(document: Path) -> Iterator[Code]:
    return (piece for piece in documents.code(document) if piece.language is None)


PATH = re.compile(r"(?:[\w.*-]+/)+[\w.*-]*|[\w*-]+\.(?:py|md|yaml|lock|sh|jsonl?|toml)")
OUTSIDE = re.compile(r"parts/|info/|[/~]|[A-Z$]|answers\.|questions\.|rows\.|before/|after/|config\.json")


@pytest.mark.parametrize("document", [*WITH_COMMANDS, ROOT / "CHANGELOG.md"], ids=ids)
def test_files_exist(document: Path) -> None:
    roots = (ROOT, ROOT / "kimi_vllm", document.parent)
    missing = [
        str(piece)
        for piece in spans(document)
        if PATH.fullmatch(piece.text) and not OUTSIDE.match(piece.text)
        if not any(list(root.glob(piece.text.rstrip("/"))) for root in roots)
        and not ("/" not in piece.text and any(path.match(piece.text) for path in _files()))
    ]
    assert missing == []


def test_the_tree_shows_files_that_exist() -> None:
    [tree] = [piece.text for piece in documents.code(ROOT / "CONTRIBUTING.md") if (piece.language or "") == "text"]
    names = re.findall(r"(?<![\w/.])[\w*]+\.(?:py|md|lock|sh)\b|(?<![\w/.])[\w]+/(?!\w)", tree)
    assert len(names) > 40
    known = _files() | {parent for path in _files() for parent in path.parents}
    assert [name for name in names if not any(path.match(name.rstrip("/")) for path in known)] == []
    folders = {path.parts[0] for path in _files() if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    assert {f"{folder}/" for folder in folders} <= set(names)


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=ids)
def test_options_exist(document: Path) -> None:
    found = {option for piece in spans(document) for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", piece.text)}
    allowed = _options() | {option.split("=")[0] for option in OF_OTHERS}
    assert sorted(found - allowed) == []


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=ids)
def test_options_of_the_plugin_exist(document: Path) -> None:
    known = set(KimiOptions.model_fields)
    keys = (re.search(r'"kimi": \{(.*?)\}', piece.text) for piece in documents.code(document))
    named = {key for match in keys if match for key in re.findall(r'"(\w+)":', match[1])}
    named |= {name for piece in spans(document) for name in re.findall(r"\bkimi\.([a-z_]+)", piece.text)}
    assert named <= known


def test_every_option_and_variable_of_the_plugin_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    variables = set(re.findall(r"\bKIMI_VLLM_\w+", "\n".join(_texts("kimi_vllm"))))
    assert [name for name in (*variables, *KimiOptions.model_fields) if name not in text] == []


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=ids)
def test_variables_exist(document: Path) -> None:
    text = "\n".join(piece.text for piece in documents.code(document))
    ours = "\n".join(_texts(*SOURCES, "tests"))
    assert [name for name in re.findall(r"\bKIMI_[A-Z_]+", text) if name not in ours] == []
    theirs = (SITE / "vllm" / "envs.py").read_text()
    assert [name for name in re.findall(r"\bVLLM_[A-Z_]+", text) if name not in theirs] == []


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=ids)
def test_metrics_exist(document: Path) -> None:
    named = {name for piece in spans(document) for name in re.findall(r"\bkimi_state_\w+", piece.text)}
    assert [name for name in named if f"`{name}" not in _metrics()] == []


def symptoms() -> list[Code]:
    """What the tables of troubles quote: messages, and options that explain them."""
    return [piece for document in WITH_COMMANDS for piece in documents.code(document) if piece.symptom]


@pytest.mark.parametrize("symptom", symptoms(), ids=str)
def test_a_quoted_message_is_raised_somewhere(symptom: Code) -> None:
    parts = [re.escape(part) for part in re.split("…", symptom.text)]
    pattern = re.compile(".*".join(parts), re.S)
    if any(pattern.search(message) for message in _messages()):
        return
    assert _is_known(symptom.text), "no source has this text"


def test_a_message_of_nobody_is_not_found() -> None:
    assert not _is_known("this is not a message of anybody")
    assert not any("this is not a message of anybody" in message for message in _messages())


def _is_known(text: str) -> bool:
    """Whether it is an option, a metric or a name here, or a message of vLLM or of CUDA."""
    if text in OF_CUDA or text.split()[0] in _options():
        return True
    if re.fullmatch(r"\w*_\w*", text):
        return any(f"{text}" in source for source in (_metrics(), *_texts("kimi_vllm")))
    longest = max(text.split("…"), key=len).strip()
    # aiohttp is the client of vLLM's load generator.
    places = (SITE / name for name in ("vllm/renderers", "vllm/entrypoints", "vllm/v1/engine", "aiohttp"))
    return any(longest in path.read_text() for place in places for path in place.glob("*.py"))


@cache
def _metrics() -> str:
    return regions.metrics()


@cache
def _files() -> set[Path]:
    found = (path for folder in (*SOURCES, "configs", "tests") for path in (ROOT / folder).rglob("*"))
    inside = {path.relative_to(ROOT) for path in found if path.is_file() and "__pycache__" not in path.parts}
    return inside | {path.relative_to(ROOT) for path in ROOT.iterdir() if path.is_file()}


@cache
def _texts(*folders: str) -> tuple[str, ...]:
    return tuple(path.read_text() for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))


@cache
def _options() -> set[str]:
    """Of vLLM's server, and of everything here that has a command line."""
    from vllm.entrypoints.cli.serve import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = set(make_arg_parser(FlexibleArgumentParser())._option_string_actions)
    for text in _texts(*SOURCES):
        if "typer" in text:
            found |= set(re.findall(r'"(--[a-z-]+)"', text))
            annotated = re.findall(r"^    (\w+): (?:Annotated\[|_[A-Z]|Json\b)", text, re.M)
            names = {name.replace("_", "-") for name in annotated}
            found |= {f"--{start}{name}" for name in names for start in ("", "no-")}
    return found


@cache
def _messages() -> tuple[str, ...]:
    """All strings of the sources; what an f-string or a logger fills in is any text."""
    found = []
    for text in _texts(*SOURCES):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.JoinedStr):
                values = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]", "…", node.value))
    return tuple(message.replace("`", "") for message in found)
