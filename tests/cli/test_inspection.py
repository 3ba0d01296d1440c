"""inspect-state: its numbers against float64 written out here and transformers' states, and what it calls sick."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import make_transformers_layout, to_hub_layout
from transformers import AutoTokenizer, KimiLinearForCausalLM
from typer.testing import CliRunner, Result

from kimi_vllm.cli import app, inspection
from kimi_vllm.cli.inspection import QUANTILES, describe, inspect_state, sampled
from kimi_vllm.kernels.reference import Features, l2_normalise

RECALL = Path(__file__).parents[2] / "configs" / "models" / "recall"
PROMPT = "a=7 k=2 m=5 ? k →"
TOKENS = [1, 14, 84, 11, 98, 24, 84, 6, 98, 26, 84, 9, 98, 86, 98, 24, 98, 101]


def run(*arguments: object, model: Path = RECALL) -> Result:
    return CliRunner().invoke(app, ["inspect-state", str(model), *map(str, arguments)], env={"COLUMNS": "160"})


def run_json(*arguments: object, model: Path = RECALL) -> tuple[int, dict[str, Any]]:
    result = run("--json", *arguments, model=model)
    return result.exit_code, json.loads(result.stdout)


def rows(shown: str, verdict: str) -> list[list[str]]:
    """The cells of the table's rows that end so."""
    return [line.split() for line in shown.splitlines() if line.rstrip().endswith(f" {verdict}")]


def edited_recall(folder: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of the shipped checkpoint with tensors replaced or, by None, left out; a name's dots are written as __."""
    shutil.copytree(RECALL, folder)
    tensors = load_file(RECALL / "model.safetensors")
    for name, tensor in changes.items():
        del tensors[name.replace("__", ".")]
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One NaN in the values of layer 2."""
    name = "model.layers.2.self_attn.v_proj.weight"
    weight = load_file(RECALL / "model.safetensors")[name]
    weight[100, 5] = float("nan")
    return edited_recall(tmp_path_factory.mktemp("sick") / "recall", **{name.replace(".", "__"): weight})


def first_layer() -> dict[str, np.ndarray]:
    """k, v, alpha and beta of layer 0, ``[T, H, ...]`` in float64, from the file's tensors by no code of ours."""
    weights = {name: tensor.double().numpy() for name, tensor in load_file(RECALL / "model.safetensors").items()}
    layer = {name.removeprefix("model.layers.0."): tensor for name, tensor in weights.items()}
    attention = {name.removeprefix("self_attn."): tensor for name, tensor in layer.items()}
    x = weights["model.embed_tokens.weight"][TOKENS]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * layer["input_layernorm.weight"]

    def mixed(name: str) -> np.ndarray:
        projected = np.vstack([np.zeros((3, 128)), x @ attention[f"{name}_proj.weight"].T])
        taps = attention[f"{name}_conv1d.weight"][:, 0].T
        total = sum(taps[tap] * projected[tap : tap + len(x)] for tap in range(4))
        return (total / (1 + np.exp(-total))).reshape(len(x), 2, 64)

    k = mixed("k")
    gate = x @ attention["f_a_proj.weight"].T @ attention["f_b_proj.weight"].T + attention["dt_bias"]
    rate = np.exp(attention["A_log"].reshape(2, 1))
    return {
        "k": k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6),
        "v": mixed("v"),
        "alpha": np.exp(-rate * np.logaddexp(0, gate.reshape(len(x), 2, 64))),
        "beta": 1 / (1 + np.exp(-x @ attention["b_proj.weight"].T)),
    }


def dense_transition(k: np.ndarray, alpha: np.ndarray, beta: float) -> np.ndarray:
    """The paper's, of one token of one head: (I - beta k k^T) Diag(alpha)."""
    return (np.eye(len(k)) - beta * np.outer(k, k)) @ np.diag(alpha)


def naive_states(k: np.ndarray, v: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> list[np.ndarray]:
    """Eq. 1 for one head, in the paper's ``[K, V]``, after each token."""
    states = [np.zeros((k.shape[1], v.shape[1]))]
    for t in range(len(k)):
        states.append(dense_transition(k[t], alpha[t], beta[t]) @ states[-1] + beta[t] * np.outer(k[t], v[t]))
    return states[1:]


def random_features(tokens: int, beta: float | None = None, log_decay: float | None = None) -> Features:
    torch.manual_seed(tokens)
    q, k, v, g = torch.randn(4, tokens, 2, 64, dtype=torch.float64).unbind()
    strength = torch.rand(tokens, 2, dtype=torch.float64) if beta is None else torch.full((tokens, 2), beta).double()
    decay = -g.abs() if log_decay is None else torch.full_like(g, log_decay)
    return Features(l2_normalise(q), l2_normalise(k), v, decay, strength)


def test_prompt_of_these_tests_is_that_text() -> None:
    assert AutoTokenizer.from_pretrained(RECALL)(PROMPT).input_ids == TOKENS


@pytest.mark.parametrize("head", [0, 1])
def test_first_layer_equals_float64_written_out(head: int) -> None:
    found = inspect_state(RECALL, TOKENS, every=1).heads[head]
    assert (found.layer, found.head) == (0, head)
    k, v, alpha, beta = (value[:, head] for value in first_layer().values())
    states = naive_states(k, v, alpha, beta)
    # The model's projections are products in float32.
    assert found.norms == pytest.approx([np.linalg.norm(state) for state in states], rel=1e-5)
    assert found.state_norm == found.norms[-1]
    assert found.state_max == pytest.approx(np.abs(states[-1]).max(), rel=1e-5)
    assert found.alpha == pytest.approx(np.quantile(alpha, QUANTILES), rel=1e-5)
    per_channel = np.sort(-1 / np.log(alpha).mean(0))
    assert found.memory_slowest == pytest.approx(per_channel[-1], rel=1e-5)
    assert found.memory_median == pytest.approx(per_channel[31], rel=1e-5)
    assert (found.beta_mean, found.beta_min, found.beta_max) == pytest.approx(
        (beta.mean(), beta.min(), beta.max()), rel=1e-5
    )
    norms = [np.linalg.svd(dense_transition(k[t], alpha[t], beta[t]))[1][0] for t in range(len(k))]
    worst = int(np.argmax(norms))
    assert found.spectral_norm == pytest.approx(norms[worst], rel=1e-7)
    assert found.bound == pytest.approx(alpha[worst].max(), rel=1e-7)
    eigenvalues = np.linalg.eigvals(dense_transition(k[worst], alpha[worst], beta[worst]))
    assert found.spectral_radius == pytest.approx(np.abs(eigenvalues).max(), rel=1e-7)


@pytest.mark.parametrize("every", [1, 7, 70])
def test_a_layer_is_described_exactly_at_any_sampling(every: int) -> None:
    x = random_features(tokens=70)
    positions = sampled(70, every)
    for found in describe(3, positions, x):
        k, v, alpha, beta = (value[:, found.head].numpy() for value in (x.k, x.v, x.g.exp(), x.beta))
        states = naive_states(k, v, alpha, beta)
        assert found.norms == pytest.approx([np.linalg.norm(states[position]) for position in positions], rel=1e-10)
        assert found.state_max == pytest.approx(np.abs(states[-1]).max(), rel=1e-10)
        dense = [dense_transition(k[t], alpha[t], beta[t]) for t in positions]
        norms = [np.linalg.svd(matrix)[1][0] for matrix in dense]
        worst = int(np.argmax(norms))
        assert found.spectral_norm == pytest.approx(norms[worst], rel=1e-12)
        assert found.spectral_radius == pytest.approx(np.abs(np.linalg.eigvals(dense[worst])).max(), rel=1e-12)
        over = [norm - alpha[t].max() for norm, t in zip(norms, positions, strict=True)]
        assert found.excess == pytest.approx(max(over), abs=1e-12)
        assert found.sound


@pytest.mark.parametrize("layout", ["recall", "wide-heads", "odd-pattern", "dense", "dense in the hub's layout"])
def test_every_layer_has_the_states_that_transformers_keeps(layout: str, tmp_path: Path) -> None:
    folder = RECALL
    if layout != "recall":
        folder = make_transformers_layout(tmp_path / "random", layout.split()[0])
    model = KimiLinearForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if "hub" in layout:  # whose A_log of one dimension transformers refuses
        folder = to_hub_layout(folder, tmp_path / "hub")
    with torch.no_grad():
        layers = model(torch.tensor([TOKENS]), use_cache=True).past_key_values.layers
    kinds = model.config.layer_types
    expected = {
        (layer, head): state
        for layer, kind in enumerate(kinds)
        if kind == "linear_attention"
        for head, state in enumerate(layers[layer].recurrent_states[0][0])
    }
    found = {(head.layer, head.head): head for head in inspect_state(folder, TOKENS).heads}
    assert found.keys() == expected.keys()
    for key, state in expected.items():
        assert found[key].state_norm == pytest.approx(float(state.norm()), rel=1e-4)
        assert found[key].state_max == pytest.approx(float(state.abs().max()), rel=1e-4)


def test_a_strong_but_sound_step_is_not_flagged() -> None:
    # Here max(alpha)·(1 + beta·|k|²) is 2.
    assert all(head.sound for head in describe(0, [4], random_features(5, beta=1.0, log_decay=0.0)))


@pytest.mark.parametrize(("beta", "log_decay", "norm"), [(2.5, 0.0, 1.5), (0.5, 0.1, np.exp(0.1))])
def test_a_step_that_can_grow_the_state_is_flagged(beta: float, log_decay: float, norm: float) -> None:
    for head in describe(0, [4], random_features(5, beta=beta, log_decay=log_decay)):
        assert head.spectral_norm == pytest.approx(norm, rel=1e-5)
        assert head.finite
        assert not head.bounded


def test_a_state_too_large_for_float32_is_not_finite() -> None:
    x = random_features(3, log_decay=0.0)
    assert not any(head.finite for head in describe(0, [2], x._replace(v=x.v * 1e40)))


@pytest.mark.parametrize(
    ("tokens", "every", "expected"),
    [(10, 4, (3, 7, 9)), (8, 4, (3, 7)), (3, 50, (2,)), (3, None, (0, 1, 2)), (64, None, tuple(range(1, 64, 2)))],
)
def test_sampled_positions(tokens: int, every: int | None, expected: tuple[int, ...]) -> None:
    assert sampled(tokens, every) == expected


def test_a_bfloat16_checkpoint_keeps_its_decay_in_float32(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.A_log"
    exact = load_file(RECALL / "model.safetensors")[name] + 1e-4
    folder = edited_recall(tmp_path / "recall", **{name.replace(".", "__"): exact})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    model = inspection.load_model(folder)
    gate = model.model.layers[0].self_attn.forget_gate
    assert model.dtype == torch.bfloat16
    assert torch.equal(gate.A_log.flatten(), exact.flatten())
    assert gate.dt_bias.dtype == torch.float32
    assert inspect_state(folder, TOKENS).dtype == "bfloat16"


def test_json_is_one_object_with_every_head() -> None:
    status, report = run_json("--prompt", PROMPT, "--every", 5)
    assert status == 0
    assert report["sound"] is True
    assert report["num_tokens"] == len(TOKENS)
    assert report["positions"] == [4, 9, 14, 17]
    assert [(head["layer"], head["head"]) for head in report["heads"]] == [
        (layer, head) for layer in (0, 1, 2, 4, 5, 6) for head in (0, 1)
    ]
    assert all(len(head["norms"]) == 4 for head in report["heads"])
    assert run_json("--tokens", ",".join(map(str, TOKENS)), "--every", 5)[1] == report


def test_table_names_the_worst_head_of_each_layer_and_of_all() -> None:
    heads = run_json("--prompt", PROMPT)[1]["heads"]
    result = run("--prompt", PROMPT)
    assert result.exit_code == 0
    expected = []
    for layer in (0, 1, 2, 4, 5, 6):
        worst = max((head for head in heads if head["layer"] == layer), key=lambda head: head["state_max"])
        expected.append([str(layer), str(worst["head"]), f"{worst['state_max']:.3g}"])
    assert [[row[0], row[1], row[3]] for row in rows(result.stdout, "ok")] == expected
    worst = max(heads, key=lambda head: head["state_max"])
    assert f"Worst: layer {worst['layer']}, head {worst['head']}," in result.stdout
    assert "All 12 heads are sound." in result.stdout


def test_a_narrow_terminal_cuts_neither_numbers_nor_verdicts(sick: Path) -> None:
    arguments = ["inspect-state", str(sick), "--prompt", PROMPT]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"}).stdout
    assert "…" not in shown
    assert (len(rows(shown, "ok")), len(rows(shown, "NaN/Inf"))) == (2, 4)


def test_heads_gives_each_head_a_row() -> None:
    shown = run("--prompt", PROMPT, "--heads").stdout
    assert [row[:2] for row in rows(shown, "ok")] == [
        [str(layer), str(head)] for layer in (0, 1, 2, 4, 5, 6) for head in (0, 1)
    ]


def test_nan_in_a_weight_is_found_where_it_is(sick: Path) -> None:
    result = run("--prompt", PROMPT, model=sick)
    assert result.exit_code == 1
    # Row 100 of v belongs to the second head of 64.
    assert "Worst: layer 2, head 1: its state is not finite." in result.stdout
    assert len(rows(result.stdout, "NaN/Inf")) == 4
    status, report = run_json("--prompt", PROMPT, model=sick)
    assert status == 1
    assert report["sound"] is False
    healthy = [(head["layer"], head["head"]) for head in report["heads"] if head["finite"]]
    assert healthy == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert report["heads"][5]["state_norm"] is None
    assert report["heads"][5]["bounded"] is True


def test_a_broken_bound_is_exit_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_vllm.kernels.reference.l2_normalise", lambda x: 3 * l2_normalise(x))
    result = run("--prompt", PROMPT, "--every", 1)
    assert result.exit_code == 1
    assert "a step can grow its state" in result.stdout
    assert "|A| over the bound" in result.stdout


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot_is_a_picture_even_of_a_sick_model(suffix: str, sick: Path, tmp_path: Path) -> None:
    path = tmp_path / f"state.{suffix}"
    assert run("--prompt", PROMPT, "--plot", path, model=sick).exit_code == 1
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --prompt and --tokens"),
        (("--prompt", "a", "--tokens", "1"), "give one of --prompt and --tokens"),
        (("--tokens", "1,x"), "expected token ids with commas between them, such as 1,2,3"),
        (("--tokens", "1,104"), "token 104 is not in 0..103"),
        (("--tokens", "-1"), "token -1 is not in 0..103"),
        (("--tokens", "1", "--plot", "no/such/state.png"), "there is no folder no/such"),
        (("--tokens", "1", "--plot", "state.txt"), "must end in .png, .svg or .pdf"),
    ],
    ids=str,
)
def test_a_wrong_command_is_exit_status_2(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_no_checkpoint_is_exit_status_2(tmp_path: Path) -> None:
    for arguments in (("--tokens", "1"), ("--prompt", "a")):
        result = run(*arguments, model=tmp_path)
        assert result.exit_code == 2
        assert "nothing is downloaded" in result.stderr


def test_a_relative_is_refused_by_the_name_of_its_field(tmp_path: Path) -> None:
    config = json.loads((RECALL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_res_block_size": 4}))
    result = run("--tokens", "1", model=tmp_path)
    assert result.exit_code == 2
    assert "attn_res_block_size=4" in result.stderr


def test_a_missing_tensor_is_named_not_made_up(tmp_path: Path) -> None:
    folder = edited_recall(tmp_path / "recall", model__layers__1__self_attn__b_proj__weight=None)
    result = run("--tokens", "1", model=folder)
    assert result.exit_code == 2
    assert "model.layers.1.self_attn.b_proj.weight" in result.stderr


def test_a_tensor_of_another_shape_is_named_not_made_up(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.b_proj.weight"
    folder = edited_recall(tmp_path / "recall", **{name.replace(".", "__"): torch.zeros(3, 128)})
    result = run("--tokens", "1", model=folder)
    assert result.exit_code == 2
    assert f"has tensors of a wrong shape: {name}" in result.stderr


def test_weights_larger_than_the_memory_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection.os, "sysconf", lambda name: 1024)
    result = run("--tokens", "1")
    assert result.exit_code == 2
    assert "holds the whole model in memory" in result.stderr


def test_a_tokenizer_runs_its_own_code_only_if_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def refuse(folder: Path, **options: bool) -> None:
        seen.append(options)
        raise ValueError("contains custom code")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    result = run("--prompt", "a")
    assert result.exit_code == 2
    assert "Give --tokens instead of --prompt; --trust-remote-code runs" in result.stderr
    run("--prompt", "a", "--trust-remote-code")
    assert seen == [{"local_files_only": True, "trust_remote_code": trusted} for trusted in (False, True)]


def test_help_says_what_it_needs_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from kimi_vllm.cli import app; "
        "shown = CliRunner().invoke(app, ['inspect-state', '--help'], env={'COLUMNS': '160'}).stdout; "
        "assert 'the WHOLE MODEL must fit into memory' in shown, shown; "
        "assert not set(sys.modules) & {'torch', 'vllm', 'transformers', 'matplotlib'}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
