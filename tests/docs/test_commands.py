"""Every command that a document shows is parsed by the program that would run it; where output is shown it runs.

A command that no rule knows fails. What the commands do is tested where their code is, under tests/engine and tests/.
"""

import argparse
import json
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from packaging.requirements import Requirement
from support.documents import PAGES, ROOT, Code, Command, commands, commands_in_sources, parts
from typer.testing import CliRunner

from kimi_vllm.cli import app

COMMANDS = {
    # The same words in several documents are checked once.
    (command.text, command.shown): command
    for command in (*(command for page in PAGES for command in commands(page)), *commands_in_sources())
}.values()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_HERE = ("ray",)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone as far as commands look at it; what they write does not land in this one."""
    for entry in ROOT.iterdir():
        if (not entry.name.startswith(".") and entry.name != "load-results") or entry.name in (".venv", ".ci"):
            (tmp_path / entry.name).symlink_to(entry)
    for name in ("questions.jsonl", "rows.jsonl", "before/run.json", "after/run.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sessions").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_works(command: Command, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(command, monkeypatch)


@pytest.mark.parametrize(
    "text",
    [
        "vllm serve MODEL --max-num-sequences 8",
        "vllm serve MODEL --config configs/serve/no-such.yaml",
        "kimi-vllm plan --modell configs",
        "python -m serve.load quick --urls http://127.0.0.1",
        "python -m serve.batch missing.jsonl answers.jsonl",
        "python -m serve.bench.cache caches",
        "python -m serve.no_such",
        "python -m pytest -m no_such_mark tests",
        "pytest tests/no_such.py",
        "pip install 'kimi-vllm[tpu]'",
        "pip install --no-such-option .",
        "make no-such-target",
        "docker run kimi-vllm",
    ],
)
def test_a_wrong_command_fails(text: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception, SystemExit, FileNotFoundError)):
        _check(Command(Code(ROOT / "README.md", 1, text, "sh"), text), monkeypatch)


def test_other_output_fails(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = Code(ROOT / "README.md", 1, "kimi-vllm --version", "console")
    with pytest.raises(AssertionError):
        _check(Command(piece, piece.text, ("other words",)), monkeypatch)


def _check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = command.words
    if command.shown:
        _prints(arguments, command.shown, monkeypatch)
    if program in ("vllm", "kimi-vllm") and command.where.language is None and _is_name(arguments):
        arguments = [*arguments, "--help"]
    if program not in NOT_HERE:
        assert program in CHECKS, f"nothing here can check a command of {program}"
        CHECKS[program](arguments, monkeypatch)


def _is_name(arguments: list[str]) -> bool:
    """Words in a line that name a command, such as `vllm serve`, and do not call it."""
    return all(re.fullmatch(r"[a-z][a-z-]*", word) for word in arguments)


def _prints(arguments: list[str], shown: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kimi-vllm prints these lines but for their numbers, and others only where a line is ``…``."""
    monkeypatch.setenv("COLUMNS", "120")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    expected = r"\s*".join(".*" if line == "…" else re.escape(_words(line)) for line in shown)
    assert re.fullmatch(expected, "\n".join(map(_words, done.stdout.strip().splitlines())), re.S), done.stdout


def _words(line: str) -> str:
    return " ".join(re.sub(r"─+", "─", re.sub(r"-?\d[\d,]*(\.\d+)?", "0", line)).split())


def _make(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The targets exist, and what their recipes call takes the arguments."""
    for line in _recipe(*(word for word in arguments if "=" not in word)):
        if re.match(r"\.venv/bin/python -m (serve|docs)", line):
            for command in parts(Code(ROOT / "Makefile", 1, line, "sh"), line):
                _check(command, monkeypatch)


@cache
def _recipe(*targets: str) -> tuple[str, ...]:
    """The lines that make would run for targets; `-o` leaves out what makes .venv."""
    make = ["make", "-n", "-o", ".venv/.installed", "--no-print-directory", *targets]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(done.stdout.splitlines())


class _Parsed(Exception):  # noqa: N818
    """The arguments are right; nothing ran."""


def _python(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a module or script until its own parser has taken all arguments."""
    if arguments[:2] == ["-m", "pytest"]:
        _pytest(arguments[2:], monkeypatch)
        return
    is_module = arguments[0] == "-m"
    name, *rest = arguments[is_module:]
    rest = rest or ["--help"]
    original = argparse.ArgumentParser.parse_known_args

    def parse(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        original(self, *args, **options)
        raise _Parsed

    def invoke(self: Any, context: Any) -> None:
        if not hasattr(self, "commands"):
            raise _Parsed

    with monkeypatch.context() as patch:
        # What typer calls once a command's arguments are right; a group's own function is skipped, its parser is not.
        patch.setattr(typer.core.TyperCommand.__mro__[1], "invoke", invoke)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(sys, "argv", [name, *rest])
        try:
            if is_module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(name, run_name="__main__")
        except _Parsed:
            return
        except (ImportError, SystemExit) as end:
            if isinstance(end, ImportError) or end.code or not {"--help", "--version"} & set(rest):
                pytest.fail(f"{name} does not take {rest}: {end}")
            return
        pytest.fail(f"{name} never parsed its arguments")


def _kimi_vllm(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _python(["-m", "kimi_vllm", *arguments], monkeypatch)


@cache
def _vllm_parser(subcommand: str) -> Any:
    """As `vllm.entrypoints.cli.main` makes it; what is under `bench` is there only if sys.argv asks for it."""
    from vllm.entrypoints.cli import run_batch, serve
    from vllm.entrypoints.cli.benchmark import main as benchmark
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    subparsers = parser.add_subparsers(required=True, dest="subparser")
    for module in (serve, benchmark, run_batch):
        for made in module.cmd_init():
            made.subparser_init(subparsers)
    return parser


def _vllm(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm", *arguments])
    try:
        _vllm_parser(arguments[0]).parse_args(arguments)
    except SystemExit as end:
        if end.code:
            pytest.fail(f"vllm does not take {arguments}")


def _pip(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pip._internal.commands import create_command

    options, requirements = create_command(arguments[0]).parse_args(arguments[1:])
    for requirement in requirements:
        folder, _, extras = requirement.rstrip("]").partition("[")
        if folder.startswith("."):
            assert (Path(folder) / "pyproject.toml").exists()
        if folder in (".", "kimi-vllm"):
            wanted = Requirement(f"kimi-vllm[{extras}]").extras
            assert wanted <= PROJECT["project"]["optional-dependencies"].keys()
    assert all(Path(path).is_file() for path in getattr(options, "requirements", ()))


def _pytest(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    expression = arguments[arguments.index("-m") + 1] if "-m" in arguments else ""
    assert set(re.findall(r"\w+", expression)) - {"not", "and", "or"} <= marks
    assert all(Path(word).exists() for word in arguments if word.startswith("tests"))


def _curl(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(word.startswith("http://127.0.0.1:8000/v1/") for word in arguments)
    json.loads(arguments[arguments.index("-d") + 1])


CHECKS: dict[str, Callable[[list[str], pytest.MonkeyPatch], None]] = {
    "make": _make,
    "python": _python,
    "kimi-vllm": _kimi_vllm,
    "vllm": _vllm,
    "pip": _pip,
    "pytest": _pytest,
    "curl": _curl,
}
