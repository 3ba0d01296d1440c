"""The generated parts of the documents say what their sources say now."""

import json
import re
import shutil
from pathlib import Path

import pytest

from docs import pictures, results
from docs.__main__ import cog, pages
from docs.tables import ENGINE, pair


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_no_part_is_stale(page: Path) -> None:
    assert cog("--check", "--diff", paths=[page]) == 0, "run make docs"


def test_no_picture_is_stale() -> None:
    assert pictures.stale() == [], "run make docs"


def test_every_module_of_tables_is_used() -> None:
    text = "".join(page.read_text() for page in pages())
    for name in ("proof", "reference", "results"):
        source = Path(pictures.__file__).with_name(f"{name}.py").read_text()
        functions = re.findall(r"^def ([a-z]\w*)", source, re.M)
        assert [function for function in functions if f"{name}.{function}(" not in text] == []


@pytest.mark.parametrize(
    ("ours", "theirs", "more_is_better", "cell"),
    [
        (2.0, 3.0, False, "**2.0** / 3.0"),
        (2.0, 3.0, True, "2.0 / **3.0**"),
        (3.0, 2.0, True, "**3.0** / 2.0"),
        (2.0, 2.0, True, "2.0 / 2.0"),
        (2.0, None, True, "2.0 / –"),
        (None, None, True, "–"),
    ],
)
def test_bold_is_the_better_one(ours: float | None, theirs: float | None, more_is_better: bool, cell: str) -> None:
    assert pair(ours, theirs, 1, more_is_better=more_is_better) == cell


def test_other_rows_make_other_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in results.MACHINES.values():
        shutil.copy(ENGINE / file, tmp_path)
    row = next(row for row in results.read(ENGINE / "h200.jsonl") if row["case"] == {"context": 4096, "batch": "1"})
    row["tpot"]["p50_ms"] = 9.5
    with (tmp_path / "h200.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    monkeypatch.setattr(results, "ENGINE", tmp_path)
    assert "| Decode, batch 1, 4K context, ms/token | 9.50 / **" in results.summary()


def test_other_rows_make_stale_pictures_until_they_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {tmp_path / path.name: (tmp_path / rows.name, name) for path, (rows, name) in pictures.DRAWN.items()}
    for path, (rows, _) in pictures.DRAWN.items():
        shutil.copy(path, tmp_path)
        (tmp_path / rows.name).write_text(rows.read_text() + "\n")
    monkeypatch.setattr(pictures, "DRAWN", drawn)
    assert pictures.stale() == list(drawn)
    pictures.draw()
    assert pictures.stale() == []
