"""The Python that the documents show, run as it stands."""

import os
import subprocess
import sys

import pytest
from support.documents import PAGES, ROOT, code

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BLOCKS = [piece for page in PAGES for piece in code(page) if piece.language == "python"]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_python_that_is_shown_prints_what_is_said(block, tmp_path) -> None:
    text = block.document.read_text()
    said = text[text.index(block.text) + len(block.text) :].split("prints ")[1].split(". ")[0]
    (tmp_path / "script.py").write_text(block.text)
    # As a user has it: what tests/conftest.py sets for vLLM would keep the engine in the script's own process.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "TORCHDYNAMO"))}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [word.strip(" `") for word in said.split(" and ")]
    assert [line.strip() for line in done.stdout.splitlines() if line.strip().isdigit()] == answers
