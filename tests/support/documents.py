"""The documents as tests read them: commands, code, links and headings, by markdown-it."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
WITH_COMMANDS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "serve").glob("**/README.md")),
]
ALL = [
    *WITH_COMMANDS,
    ROOT / "CHANGELOG.md",
    ROOT / "kernels" / "NOTES.md",
    ROOT / "configs" / "models" / "recall" / "README.md",
    ROOT / "configs" / "models" / "synthetic" / "README.md",
]
PROGRAMS = ("make", "python", "python3", "pip", "pytest", "vllm", "kimi-vllm", "curl", "docker", "kubectl", "ray")
SHELL, PLAIN = ("sh", "console"), ("text", "mermaid", "json", "yaml", "python")
_SETTING = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Code:
    """A piece of code in a document: a block with its language, or words in a line, with none."""

    document: Path
    line: int
    text: str
    language: str | None = None
    symptom: bool = False

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}: {self.text.splitlines()[0]}"


@dataclass(frozen=True)
class Command:
    """A command that a document shows, and the output shown under it."""

    where: Code
    text: str
    shown: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where.document.relative_to(ROOT)}:{self.where.line}: {self.text}"

    @property
    def words(self) -> list[str]:
        """As a shell splits it, without the variables before it and the path of its program."""
        words = shlex.split(self.text, comments=True)
        while words and _SETTING.fullmatch(words[0]):
            words.pop(0)
        return [Path(words[0]).name, *words[1:]] if words and words[0].startswith(".venv/bin/") else words


@cache
def _tokens(document: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(document.read_text())


@cache
def code(document: Path) -> list[Code]:
    """All code of a document, in order."""
    found: list[Code] = []
    symptoms, column, line = False, 0, 0
    for token in _tokens(document):
        line = token.map[0] + 1 if token.map else line
        if token.type in ("fence", "code_block"):
            found.append(Code(document, line, token.content, token.info.strip() if token.type == "fence" else ""))
        elif token.type == "tr_open":
            column = 0
        elif token.type in ("th_open", "td_open"):
            column += 1
        elif token.type == "table_close":
            symptoms = False
        elif token.type == "inline":
            if column == 1 and token.content == "symptom":
                symptoms = True
            for child in token.children or ():
                if child.type == "code_inline":
                    found.append(Code(document, line, child.content, None, symptoms and column == 1))
    return found


def commands(document: Path) -> Iterator[Command]:
    """The commands in shell blocks, and those among the words of a line."""
    for piece in code(document):
        if piece.language in SHELL:
            yield from _of_block(piece)
        elif piece.language is None and not piece.symptom:
            made = [Command(piece, part) for part in _parts(piece.text)] if _starts_a_command(piece.text) else []
            yield from (command for command in made if len(command.words) > 1)


def _starts_a_command(text: str) -> bool:
    words = [word for word in text.split() if not _SETTING.fullmatch(word)]
    return bool(words) and (words[0].removeprefix(".venv/bin/") in PROGRAMS or words[0] in ("source", "export"))


def commands_in_plain_text(document: Path) -> list[str]:
    """Lines of blocks that are no shell's and still look like commands, which nobody would check."""
    return [
        f"{document.name}: {line}"
        for piece in code(document)
        if piece.language in ("", *PLAIN)
        for line in piece.text.splitlines()
        if line.startswith("$ ") or (_starts_a_command(line) and len(line.split()) > 1)
    ]


def _of_block(block: Code) -> Iterator[Command]:
    """Lines, joined where they end in a backslash; in a console's, commands begin with ``$``, the rest is output."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "sh":
        yield from (Command(block, part) for line in lines for part in _parts(line))
        return
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield Command(block, lines[start].removeprefix("$ "), tuple(lines[start + 1 : end]))


def commands_in_sources() -> Iterator[Command]:
    """Those that comments of profiles and docstrings of scripts show, indented."""
    for path in (*sorted((ROOT / "configs" / "serve").glob("*.yaml")), *sorted((ROOT / "serve").glob("**/*.py"))):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = re.fullmatch(r"(?:#   |    )((?:\.venv/bin/)?(?:vllm|kimi-vllm|python3?) (?![=:,]).+)", line)
            if match and _starts_a_command(match[1]):
                yield Command(Code(path, number, match[1], "sh"), match[1])


def _parts(line: str) -> list[str]:
    return [part for part in (part.strip() for part in line.split(" && ")) if shlex.split(part, comments=True)]


def links(document: Path) -> list[str]:
    """Targets of links and pictures."""
    inline = (child for token in _tokens(document) for child in token.children or ())
    found = (child.attrGet("href") or child.attrGet("src") for child in inline if child.type in ("link_open", "image"))
    return [str(target) for target in found if target]


@cache
def anchors(document: Path) -> set[str]:
    """The names that GitHub gives the headings of a document."""
    tokens = _tokens(document)
    titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def pyproject() -> dict[str, Any]:
    """pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())
