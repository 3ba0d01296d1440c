"""The generated parts of README.md and docs/*.md say what their sources say now."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from support.documents import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import engine_regions
import generate
import pictures
import regions

README_LINES = 250


@pytest.mark.parametrize("document", generate.documents(), ids=lambda path: path.name)
def test_no_part_is_stale(document: Path) -> None:
    assert generate.renew(document) == document.read_text(), "run make docs"


def test_no_picture_is_stale() -> None:
    assert pictures.stale() == [], "run make docs"


def test_other_rows_make_stale_pictures_until_they_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(pictures.ROWS.read_text() + "\n")
    drawn = {tmp_path / path.name: name for path, name in pictures.DRAWN.items()}
    for path in pictures.DRAWN:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(pictures, "ROWS", rows)
    monkeypatch.setattr(pictures, "DRAWN", drawn)
    assert pictures.stale() == list(drawn)
    pictures.draw()
    assert pictures.stale() == []


def test_every_part_is_in_a_document() -> None:
    used = {match["name"] for path in generate.documents() for match in generate.REGION.finditer(path.read_text())}
    assert used == set(regions.REGIONS)


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_other_rows_make_a_stale_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (ROOT / "serve" / "bench" / "results" / "h200.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    ours = [row for row in rows if row["provider"] == "kimi-vllm"]
    at_4k = next(row for row in ours if row["case"] == {"context": 4096, "batch": "1"})
    largest = next(row for row in ours if row["case"] == {"context": 4096, "batch": "largest"})
    at_4k["tpot"]["p50_ms"] = 3.5
    monkeypatch.setattr(engine_regions, "ENGINE", tmp_path)

    def write(some: list[dict[str, Any]]) -> None:
        (tmp_path / "h200.jsonl").write_text("\n".join(json.dumps(row) for row in some))

    write(rows)
    assert engine_regions.h200_tpot().splitlines()[2].startswith("| 4K | 3.50 |")
    write(ours)
    assert (
        engine_regions.h200_tpot()
        .splitlines()[2]
        .startswith(f"| 4K | 3.50 | – | – | {at_4k['profile']['busy_ms']:.2f} / – |")
    )
    assert f"| {largest['tokens_per_s']:,.0f} tokens/s | – | – |" in engine_regions.h200_batches()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- generated: options -->\n", "no partner"),
        ("<!-- end -->\n", "no partner"),
        ("<!-- generated: soak -->\n<!-- generated: options -->\n<!-- end -->\n", "no partner"),
        ("<!-- generated: wishes -->\n<!-- end -->\n", "wishes is not one of"),
    ],
)
def test_wrong_markers_are_errors(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(generate.RegionError, match=message):
        generate.renew(tmp_path / "page.md")


def test_the_picture_of_a_load_test_is_shown_once_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "ROOT", tmp_path)
    monkeypatch.setattr(regions, "LOAD_PICTURE", tmp_path / "load.png")
    assert regions.load_picture() == ""
    (tmp_path / "load.png").touch()
    assert regions.load_picture().endswith("](load.png)")
