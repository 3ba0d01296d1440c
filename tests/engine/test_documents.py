"""The Python that the documents show, run as it stands."""

import subprocess
import sys

import pytest
from support.documents import ROOT, WITH_COMMANDS, code

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BLOCKS = [piece for page in WITH_COMMANDS for piece in code(page) if piece.language == "python"]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_python_that_is_shown_prints_what_is_said(block) -> None:
    text = block.document.read_text()
    said = text[text.index(block.text) + len(block.text) :].split("prints ")[1].split(". ")[0]
    done = subprocess.run(
        [sys.executable, "-c", block.text], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    )
    answers = said.replace("`", "").split(" and ")
    assert [line.strip() for line in done.stdout.splitlines()][-len(answers) :] == [word.strip() for word in answers]
