"""Every command that a document shows is run, or parsed by the program that would run it; none is left out.

Commands whose output is shown run, and must print it. What takes minutes or a GPU is parsed by its own parser, and the
tables below name the test that runs it. A command that no rule knows fails.
"""

import argparse
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from packaging.requirements import Requirement
from support import documents
from support.documents import ROOT, Command
from typer.testing import CliRunner

from kimi_vllm.cli import app

COMMANDS = {
    # The same words in several documents are checked once.
    (command.text, command.shown): command
    for command in (
        *(command for document in documents.WITH_COMMANDS for command in documents.commands(document)),
        *documents.commands_in_sources(),
    )
}.values()

RUN_BY = {
    "serve/demo/demo.py": "tests/test_demo.py::test_all_answers_are_right",
    "serve/load_test.py": "tests/engine/test_load.py::test_a_scenario_is_measured_and_reported",
    "serve/offline.py": "tests/engine/test_offline.py::test_killed_in_the_middle_and_run_again_every_id_is_there_once",
    "serve/bench/engine_bench.py": "tests/engine/test_engine_bench.py::test_every_measurement_leaves_a_row",
    "serve/bench/soak.py": "tests/engine/test_soak.py::test_nothing_leaks_and_nothing_is_wrong",
    "serve/gpu/pack.py": "tests/test_gpu_pack.py::test_what_is_packed_is_unpacked",
    "tests/synthetic/evaluate.py": "tests/engine/test_synthetic.py::test_the_command_measures_every_mode",
    "requirements/compat.py": "tests/test_compat.py::test_the_installed_vllm_has_all_we_use",
    "docs/generate.py": "tests/docs/test_generated.py::test_no_part_is_stale",
    "kimi_vllm doctor": "tests/cli/test_cli.py::test_doctor_reports_an_active_plugin",
    "kimi_vllm plan": "tests/cli/test_cli.py::test_plan_of_the_48b_model",
    "kimi_vllm inspect-state": "tests/cli/test_inspection.py::test_json_is_one_object_with_every_head",
    "kimi_vllm.bench cache": "tests/bench/test_traces.py::test_vllms_own_rules_run_in_the_same_replay",
    "kimi_vllm.bench concurrency": "tests/bench/test_concurrency.py::test_ours_runs_what_slots_and_pages_allow",
    "curl": "tests/engine/test_api.py::test_what_the_documents_ask_is_answered",
}
"""Scripts and modules, and the test that runs them or what they are made of."""

PARSED_ONLY = {
    "serve/bench/versus_transformers.py": "a benchmark of minutes",
    "serve/container/rehearse.sh": "builds an image as root, 20 minutes; shellcheck reads it",
    "serve/load/screenshot.py": "drives a browser",
    "serve/gpu/smoke.py": "serves from packed files on a GPU machine",
    "tests/synthetic/train.py": "trains for minutes on a GPU",
    "kimi_vllm.bench scheduler": "a benchmark",
    "kimi_vllm.kernels.bench cpu": "a benchmark of minutes",
    "kimi_vllm.kernels.bench cuda": "needs a GPU",
}
"""What no test runs, and why."""

NOT_HERE = {"ray": "Not run by us"}
"""Programs that are not installed here, and what a document that shows them has to say."""

REPORT = "load-results/quick-20260101-120000/report.html"

TOLERANCE = {"inspect-state": 0.02}
"""Relative, of numbers that are shown: sums of floats depend on the machine."""


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone as far as commands look at it; what they write does not land in this one."""
    for entry in ROOT.iterdir():
        if (not entry.name.startswith(".") and entry.name != "load-results") or entry.name == ".venv":
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "parts").symlink_to(ROOT / "serve" / "gpu")  # pack.py puts its scripts beside what it packs
    for name in ("questions.jsonl", "rows.jsonl", "before/run.json", "after/run.json", REPORT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_works(command: Command, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _check(command, monkeypatch)


def test_no_command_hides_in_a_block_of_another_language() -> None:
    assert [line for document in documents.WITH_COMMANDS for line in documents.commands_in_plain_text(document)] == []
    languages = {piece.language for document in documents.WITH_COMMANDS for piece in documents.code(document)}
    assert languages <= {None, *documents.SHELL, *documents.PLAIN}


@pytest.mark.parametrize("test", sorted(set(RUN_BY.values())))
def test_the_test_that_runs_a_command_exists(test: str) -> None:
    path, name = test.split("::")
    assert f"def {name}(" in (ROOT / path).read_text()


@pytest.mark.parametrize(
    "text",
    [
        "vllm serve MODEL --max-num-sequences 8",
        "vllm serve MODEL --config configs/serve/no-such.yaml",
        "vllm server MODEL",
        "kimi-vllm plan --modell configs",
        "kimi-vllm inspect",
        "python serve/load_test.py quick --urls http://127.0.0.1",
        "python serve/offline.py missing.jsonl answers.jsonl",
        "python serve/no_such.py",
        "python -m kimi_vllm.bench caches",
        "python -m pytest -m no_such_mark tests",
        "pytest tests/no_such.py",
        "pip install 'kimi-vllm[tpu]'",
        "pip install --no-such-option .",
        "make no-such-target",
        "source parts/no-such.sh",
        "docker run kimi-vllm",
    ],
)
def test_a_wrong_command_fails(text: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = documents.Code(ROOT / "README.md", 1, text, "sh")
    with pytest.raises((AssertionError, pytest.fail.Exception, SystemExit, FileNotFoundError)):
        _check(Command(piece, text), monkeypatch)


def test_other_output_fails(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piece = documents.Code(ROOT / "README.md", 1, "kimi-vllm --version", "console")
    with pytest.raises(AssertionError):
        _check(Command(piece, piece.text, ("kimi-vllm 0.0.0",)), monkeypatch)


def _check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *arguments = command.words
    if command.shown:
        assert program == "kimi-vllm", "only this program's output can be shown: nothing else is run here"
        _prints(arguments, command.shown, monkeypatch)
    if program in ("vllm", "kimi-vllm") and command.where.language is None and _is_name(arguments):
        arguments = [*arguments, "--help"]
    if program.endswith(".sh"):
        _known(program)
        program, arguments = "source", [program, *arguments]
    if program in NOT_HERE:
        assert NOT_HERE[program] in command.where.document.read_text()
        return
    assert program in CHECKS, f"nothing here can check a command of {program}"
    CHECKS[program](command, arguments, monkeypatch)


def _is_name(arguments: list[str]) -> bool:
    """Words in a line that name a command, such as `vllm serve`, and do not call it."""
    return all(re.fullmatch(r"[a-z][a-z-]*", word) for word in arguments)


def _prints(arguments: list[str], shown: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """It prints these lines; where a line is ``…``, others may be."""
    monkeypatch.setenv("COLUMNS", "120")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    printed = iter([line.rstrip() for line in done.stdout.strip("\n").splitlines()])
    gap = False
    for expected in shown:
        if expected == "…":
            gap = True
            continue
        line = next((line for line in printed if not gap or _words(line) == _words(expected)), "nothing more")
        assert _words(line) == _words(expected)
        assert _numbers(line) == pytest.approx(_numbers(expected), rel=TOLERANCE.get(arguments[0], 0))
        gap = False
    assert gap or not list(printed), "more is printed than shown; a line with … says so"


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def _numbers(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(line)]


def _words(line: str) -> list[str]:
    return re.sub("─+", "─", _NUMBER.sub("0", line)).split()


def _make(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the target would run is what CI runs anyway, or can be checked line by line."""
    targets = [word for word in arguments if "=" not in word]
    for target in targets:
        if target == "help":
            subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True)
            continue
        for line in _recipe(target) - _recipe(*_ci_targets()):
            for part in documents._parts(line):
                _check(Command(command.where, part), monkeypatch)


@cache
def _recipe(*targets: str) -> set[str]:
    """The lines that make would run, with everything they need."""
    # As if .venv were new: then its recipe is in all of them, and in CI's.
    done = subprocess.run(
        ["make", "-n", "-B", "--no-print-directory", *targets], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines())


def _ci_targets() -> list[str]:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    return [word for line in lines if line.startswith("make ") for word in line.split()[1:]]


class _Parsed(Exception):  # noqa: N818
    """The arguments are right; nothing ran."""


def _python(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if arguments[0] == "-m":
        _, module, *rest = arguments
        if module == "pytest":
            _pytest(command, rest, monkeypatch)
            return
        assert (ROOT / module.replace(".", "/")).exists(), f"there is no module {module}"
        subcommand = next((word for word in rest if not word.startswith("-")), "")
        _known(f"{module} {subcommand}".strip())
        _parse(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), module, rest, monkeypatch)
    else:
        script, *rest = arguments
        _known(Path(script).resolve().relative_to(ROOT).as_posix())
        _parse(lambda: runpy.run_path(script, run_name="__main__"), script, rest, monkeypatch)


def _known(name: str) -> None:
    assert name in RUN_BY or name in PARSED_ONLY, f"no test is known to run {name}; name it, or say why there is none"


def _parse(run: Callable[[], Any], name: str, rest: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script until its own parser has taken all arguments."""
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
        patch.setattr(sys, "path", [str(Path(name).resolve().parent), *sys.path])
        try:
            run()
        except _Parsed:
            return
        except SystemExit as end:
            if end.code or not {"--help", "--version"} & set(rest):
                pytest.fail(f"{name} does not take {rest}")
            return
        pytest.fail(f"{name} never parsed its arguments")


def _kimi_vllm(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _python(command, ["-m", "kimi_vllm", *arguments], monkeypatch)


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


def _vllm(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm", *arguments])
    try:
        _vllm_parser(arguments[0]).parse_args(arguments)
    except SystemExit as end:
        if end.code:
            pytest.fail(f"vllm does not take {arguments}")


def _pip(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from pip._internal.commands import create_command

    options, requirements = create_command(arguments[0]).parse_args(arguments[1:])
    project = documents.pyproject()["project"]
    for requirement in requirements:
        if requirement.startswith("."):
            folder, extras = re.fullmatch(r"([^\[]+)(?:\[(.*)\])?", requirement).groups()  # type: ignore[union-attr]
            assert (Path(folder) / "pyproject.toml").exists()
            assert set((extras or "").split(",")) - {""} <= project["optional-dependencies"].keys()
        elif (wanted := Requirement(requirement)).name == project["name"]:
            assert wanted.extras <= set(project["optional-dependencies"])
    assert all(Path(path).is_file() for path in getattr(options, "requirements", ()))


def _pytest(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    marks = {line.split(":")[0] for line in documents.pyproject()["tool"]["pytest"]["ini_options"]["markers"]}
    options, unknown = _pytest_parser(arguments)
    assert not unknown
    assert set(re.findall(r"\w+", options.markexpr)) - {"not", "and", "or"} <= marks
    assert all(Path(path).exists() for path in options.file_or_dir)


def _pytest_parser(arguments: list[str]) -> Any:
    from _pytest.config import get_config

    parser = get_config()._parser
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))["pytest_addoption"](parser)
    return parser.parse_known_and_unknown_args(arguments)


def _curl(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _known("curl")
    assert any(word.startswith("http://127.0.0.1:8000/v1/") for word in arguments)
    json.loads(arguments[arguments.index("-d") + 1])


def _source(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(arguments[0]).resolve()
    assert script.is_file()
    assert script.relative_to(ROOT).as_posix() in (ROOT / "Makefile").read_text(), "shellcheck has to read it"


def _export(command: Command, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(re.fullmatch(r"[A-Z_]+=.*", word) for word in arguments)


CHECKS: dict[str, Callable[[Command, list[str], pytest.MonkeyPatch], None]] = {
    "make": _make,
    "python": _python,
    "python3": _python,
    "kimi-vllm": _kimi_vllm,
    "vllm": _vllm,
    "pip": _pip,
    "pytest": _pytest,
    "curl": _curl,
    "source": _source,
    "export": _export,
}
