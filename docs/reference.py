"""Tables that describe the code: options, profiles, scenarios, metrics, what is tested, the files."""

import ast
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import yaml
from typer.testing import CliRunner

from docs.tables import NONE, ROOT, table
from kimi_vllm.options import KimiOptions
from serve.common.tables import tokens
from tests.support.record import FEATURES


def options() -> str:
    """The options of ``--additional-config``."""
    cells = []
    for name, field in KimiOptions.model_json_schema()["properties"].items():
        cells.append([f"`{name}`", f"`{json.dumps(field['default'])}`", field["description"]])
    return table(["option", "default", "description"], cells, left=None)


def profiles() -> str:
    """The profiles of configs/serve: what each is for, and the two sizes that matter."""
    cells = []
    for path in sorted((ROOT / "configs" / "serve").glob("*.yaml")):
        text = path.read_text()
        profile = yaml.safe_load(text)
        what = re.split(r"[;:]|\.$", text.splitlines()[0].removeprefix("# ").removeprefix("Kimi-Linear-48B-A3B "))[0]
        sizes = [str(profile["max-num-seqs"]), tokens(profile["max-model-len"])]
        cells.append([f"[{path.stem}](../{path.relative_to(ROOT)})", what, *sizes])
    return table(["profile", "for", "concurrent requests", "longest context"], cells, left=2)


def scenarios() -> str:
    """The scenarios of the load test."""
    cells = []
    for path in sorted((ROOT / "serve" / "load" / "scenarios").glob("*.yaml")):
        scenario = yaml.safe_load(path.read_text())
        cells.append([f"`{path.stem}`", scenario["about"].strip(), "its own" if "server" in scenario else "`--url`"])
    return table(["scenario", "what it shows", "server"], cells, left=None)


def metrics() -> str:
    """The metrics of the state cache, as `/metrics` names them."""
    from prometheus_client import REGISTRY

    from kimi_vllm import ARCHITECTURE
    from kimi_vllm.metrics import PREFIX, StateCacheMetrics

    model = SimpleNamespace(hf_config=SimpleNamespace(architectures=[ARCHITECTURE]), served_model_name="kimi")
    StateCacheMetrics(SimpleNamespace(model_config=model), [0])  # type: ignore[arg-type]
    cells = []
    for family in sorted(REGISTRY.collect(), key=lambda family: family.name):
        if family.name.startswith(PREFIX):
            name = f"{family.name}_total" if family.type == "counter" else family.name
            kinds = dict.fromkeys(sample.labels["kind"] for sample in family.samples if "kind" in sample.labels)
            label = f"`{name}{{kind}}`: {', '.join(kinds)}" if kinds else f"`{name}`"
            cells.append([label, family.type, family.documentation])
    return table(["metric", "type", "description"], cells, left=None)


_SHOWN = {"FP8": "FP8 weights", "4 bits": "4-bit weights", "W8A8 int8": "int8 W8A8", "FP8 latents": "FP8 KV cache"}
"""Features under the names that users know."""


def _tested() -> dict[str, dict[str, dict[str, str]]]:
    found: dict[str, dict[str, dict[str, str]]] = json.loads((ROOT / "tests" / "tested.json").read_text())
    return found


def compatibility() -> str:
    """What tests have run where: a row per feature, a column per vLLM and device."""
    known = _tested()
    places = [(release, device) for release in sorted(known) for device in sorted(known[release], reverse=True)]
    said = {feature: [known[release][device].get(feature, NONE) for release, device in places] for feature in FEATURES}
    columns = [f"vLLM {release}, {_short(device)}" for release, device in places]
    return table(["", *columns], [[_SHOWN.get(feature, feature), *cells] for feature, cells in said.items()], left=None)


def platforms() -> str:
    """The same in short: a row per device, with the features whose tests passed there."""
    known = _tested()
    releases = sorted(known)
    cells = []
    for device in sorted({device for devices in known.values() for device in devices}):
        said = [known[release].get(device, {}) for release in releases]
        passed = [
            [_SHOWN.get(name, name) for name in FEATURES if rows.get(name, "").startswith("tested")] for rows in said
        ]
        cells.append([_short(device), *(", ".join(names) or NONE for names in passed)])
    return table(["tested on", *(f"vLLM {release}" for release in releases)], cells, left=None)


def _short(device: str) -> str:
    return device.removeprefix("NVIDIA ").removesuffix(" 80GB HBM3")


def printed(*arguments: str) -> str:
    """What a command of kimi-vllm prints, as a block that shows the command too, without the paragraph at the end."""
    from kimi_vllm.cli import app

    done = CliRunner(env={**os.environ, "COLUMNS": "120"}).invoke(app, arguments)
    if done.exit_code:
        raise RuntimeError(done.output)
    shown = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines()).rpartition("\n\n")[0]
    return f"```console\n$ kimi-vllm {' '.join(arguments)}\n{shown}\n…\n```"


def rooms(top: str) -> str:
    """The modules under a folder, a table per folder, each with the first line of its docstring."""
    found: dict[Path, list[list[str]]] = {}
    for path in sorted((ROOT / top).rglob("*.py"), key=lambda path: (path.parent, path.name)):
        line = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        place = path.relative_to(ROOT)
        if line and path.resolve() == path and "bench" not in place.parts:
            found.setdefault(place.parent, []).append([f"[{path.name}](../{place})", line])
    tables = {folder: table(["file", "purpose"], cells, left=None) for folder, cells in found.items()}
    return "\n\n".join(f"### `{folder}/`\n\n{shown}" for folder, shown in tables.items())


def programs() -> str:
    """The tools under serve/ that run as modules."""
    cells = []
    for path in sorted((ROOT / "serve").rglob("__main__.py")):
        module = ".".join(path.parent.relative_to(ROOT).parts)
        line = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        cells.append([f"[`{module}`](../{path.parent.relative_to(ROOT)})", line])
    return table(["python -m", "what it does"], cells, left=None)
