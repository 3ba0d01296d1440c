"""The documents as tests read them: their code and commands, by markdown-it."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "serve").glob("**/README.md")),
]
_SETTING = re.compile(r"[A-Z_]+=\S*")
_IN_A_LINE = re.compile(rf"({_SETTING.pattern} )*(\.venv/bin/)?(make|python|pip|pytest|vllm|kimi-vllm|curl|ray) ")


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
        """As a shell splits it, without the variables before it and the folder of its program."""
        words = shlex.split(self.text, comments=True)
        while words and _SETTING.fullmatch(words[0]):
            words.pop(0)
        return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


@cache
def code(document: Path) -> list[Code]:
    """All code of a document, in order; what stands in the first column of a table of symptoms is one."""
    found: list[Code] = []
    symptoms, header, column, line = False, False, 0, 0
    for token in MarkdownIt("commonmark").enable("table").parse(document.read_text()):
        line = token.map[0] + 1 if token.map else line
        if token.type == "fence":
            found.append(Code(document, line, token.content, token.info.strip()))
        elif token.type in ("tr_open", "table_close"):
            column = 0
        elif token.type in ("th_open", "td_open"):
            column += 1
            header = token.type == "th_open"
        elif token.type == "inline":
            if column == 1 and header:
                symptoms = token.content == "symptom"
            for child in token.children or ():
                if child.type == "code_inline":
                    found.append(Code(document, line, child.content, None, symptoms and column == 1))
    return found


def commands(document: Path) -> Iterator[Command]:
    """The commands in shell blocks, and those among the words of a line."""
    for piece in code(document):
        if piece.language == "console":
            *_, first = re.split(r"^\$ ", piece.text, flags=re.M)
            text, *shown = first.splitlines()
            yield Command(piece, text, tuple(shown))
        elif piece.language == "sh":
            for line in piece.text.replace("\\\n", " ").splitlines():
                yield from parts(piece, line)
        elif piece.language is None and not piece.symptom and _IN_A_LINE.match(piece.text):
            yield from parts(piece, piece.text)


def commands_in_sources() -> Iterator[Command]:
    """Those that comments of profiles and docstrings of tools show, indented."""
    for path in (*sorted((ROOT / "configs" / "serve").glob("*.yaml")), *sorted((ROOT / "serve").glob("**/*.py"))):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            match = re.fullmatch(r"(?:#   |    )((?:\.venv/bin/)?(?:vllm|kimi-vllm|python) (?![=:,]).+)", line)
            if match:
                yield Command(Code(path, number, match[1], "sh"), match[1])


def parts(where: Code, line: str) -> Iterator[Command]:
    """The commands of a line that are joined by ``&&``."""
    made = (Command(where, part.strip()) for part in line.split(" && "))
    return (command for command in made if command.words)
