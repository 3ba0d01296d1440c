"""Train the recall model in minutes: `python -m serve.demo.train_recall --out configs/models/recall`.

The model and its arithmetic are transformers' own. Only the chunk of the KDA recurrence is shorter: the CPU
path has a decay tensor that grows with it, and 16 rows instead of 64 train seven times faster.
"""

import math
import platform
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import transformers
import typer
from rich.progress import Progress
from transformers import KimiLinearForCausalLM

from serve.common.training import GateWatch, decayed_apart, switched_off
from serve.demo import recall_checkpoint
from serve.demo.recall_task import KEYS, Plan, Turn, held_out_prompt, make_conversation

TOKEN_ID = {token: i for i, token in enumerate(recall_checkpoint.VOCABULARY)}
CHUNK = 16
MAX_TOKENS = 4096
ROWS_WITH_NOISE = 16
CHARS_PER_FACT = 4
CHARS_PER_QUESTION = 9


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, together with the code and the versions of torch and transformers."""

    seed: int = 0  # of torch and of the data
    steps: int = 800  # optimiser steps
    tokens: int = 2048  # tokens in a batch
    lr: float = 2e-3  # peak learning rate, after a linear warm-up and before a cosine down to a twentieth
    warmup: int = 50  # steps
    weight_decay: float = 0.05  # on matrices only
    text_weight: float = 0.1  # weight of the loss on all tokens that are not answers
    balance: float = 2e-3  # step of the router's selection bias against the load of its experts
    gate_weight: float = 0.1  # weight of the loss on KDA gates that forget more than `gate_limit` at once
    gate_limit: float = 4.0  # in nats for each token and channel


@dataclass
class Curve:
    """How training went, every fifty steps."""

    step: list[int] = field(default_factory=list)  # steps done
    # mean loss on the answers of the last batch, in nats for each token
    answer_loss: list[float] = field(default_factory=list)
    # on 90 held-out prompts of 2 to 16 facts: without references, and with one
    accuracy: list[tuple[float, ...]] = field(default_factory=list)


def draw_plan(rng: random.Random, progress: float) -> tuple[Plan, int]:
    """The shape of the next batch: few facts at first, up to 26 and longer texts later.

    Returns:
        The plan, and the tokens its sequences have room for.
    """
    most = min(26, 2 + int(progress * 80))
    length = rng.choice((128, 256, 512, 512)) if progress > 0.25 and rng.random() < 0.5 else 64
    kinds = ("plain", "rewrite", "reference", "reference", "reference") if progress > 0.15 else ("plain",)
    kind = rng.choice(kinds)
    first = rng.randint(1, min(most, (length - 12) // CHARS_PER_FACT))
    left = length - 1 - CHARS_PER_FACT * first - CHARS_PER_QUESTION
    filler = 0
    if progress > 0.2 and left > 20 and rng.random() < 0.6:
        filler = rng.randint(8, left - 2)
        left -= filler + 1
    later = []
    while left >= CHARS_PER_QUESTION:
        more = min(rng.choice((0, 0, 0, 1, 2)), (left - CHARS_PER_QUESTION) // CHARS_PER_FACT)
        if first + sum(later) + more > len(KEYS):
            more = 0
        later.append(more)
        left -= CHARS_PER_QUESTION + CHARS_PER_FACT * more
    rewrite, reference = 0.3 * (kind == "rewrite"), 0.4 * (kind == "reference")
    return Plan(first, tuple(later), filler, rewrite, reference), length


def encode(turns: list[Turn]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them are the model's: space, digit and end token."""
    ids, answers = [TOKEN_ID[recall_checkpoint.BOS]], [False]
    for turn in turns:
        text = ("" if len(ids) == 1 else " ") + turn.text + " "
        ids += [TOKEN_ID[char] for char in text]
        ids += [TOKEN_ID[turn.answer], TOKEN_ID[recall_checkpoint.EOS]]
        answers += [False] * (len(text) - 1) + [True] * 3
    return ids, answers


def draw_batch(rng: random.Random, recipe: Recipe, progress: float) -> tuple[torch.Tensor, ...]:
    """Token ids, mask of the answers, mask of the other text, all [batch, length].

    The last of many rows is noise that no mask covers: nothing to learn from, but its gates are limited, too.
    """
    plan, length = draw_plan(rng, progress)
    rows = [encode(make_conversation(rng, plan)) for _ in range(recipe.tokens // length)]
    ids = torch.tensor([ids for ids, _ in rows])
    answers = torch.tensor([mask for _, mask in rows])
    text = ~answers
    if len(rows) >= ROWS_WITH_NOISE:
        ids[-1] = torch.tensor(rng.choices(range(len(TOKEN_ID)), k=ids.shape[1]))
        answers[-1] = text[-1] = False
    return ids, answers, text


@torch.no_grad()
def accuracy(model: KimiLinearForCausalLM, prompts: list[tuple[str, str]]) -> float:
    """Share of prompts answered with exactly the space, the digit and the end token when decoding greedily.

    Greedy decoding gives that text if and only if each of its tokens is the most likely one after those
    before it, so one forward pass decides. Prompts of one length share passes.
    """
    by_length: dict[int, list[list[int]]] = {}
    for text, answer in prompts:
        ids, _ = encode([Turn(text, answer)])
        by_length.setdefault(len(ids), []).append(ids)
    right = 0
    for length, rows in by_length.items():
        for ids in torch.tensor(rows).split(max(1, MAX_TOKENS // length)):
            best = model(ids, chunk_size=CHUNK, use_cache=False, logits_to_keep=4).logits[:, :-1].argmax(-1)
            right += int((best == ids[:, -3:]).all(-1).sum())
    return right / len(prompts)


class RouterBalance:
    """Moves each router's selection bias towards the experts that get fewer tokens, as DeepSeek-V3 does."""

    def __init__(self, model: KimiLinearForCausalLM, step: float) -> None:
        self._step = step
        self._loads: dict[torch.nn.Module, torch.Tensor] = {}
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.register_forward_hook(self._count)

    def _count(self, router: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        self._loads[router] = torch.bincount(output[2].flatten(), minlength=router.num_experts).float()

    def update(self) -> None:
        """Apply the loads of the last batch."""
        for router, load in self._loads.items():
            router.e_score_correction_bias += self._step * torch.sign(load.mean() - load)

    def worst(self) -> float:
        """Load of the busiest expert of any layer, in units of the mean load."""
        return max((load.max() / load.mean()).item() for load in self._loads.values())


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from the peak to a twentieth of it."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def train(model: KimiLinearForCausalLM, recipe: Recipe) -> Curve:
    """Train in place."""
    rng, curve = random.Random(recipe.seed), Curve()
    probes = [[held_out_prompt(random.Random(i), 2 + i % 15, 0, refs) for i in range(90)] for refs in (0, 1)]
    groups = decayed_apart(model, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))
    balance, gates = RouterBalance(model, recipe.balance), GateWatch(model, 1.0, 0.0, recipe.gate_limit)
    with Progress() as bar:
        task = bar.add_task("training", total=recipe.steps)
        for step in range(recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            ids, answers, text = draw_batch(rng, recipe, step / recipe.steps)
            logits = model(ids, chunk_size=CHUNK, use_cache=False).logits[:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            answer_loss = losses[answers[:, 1:]].mean()
            gate_loss = gates.losses(None)
            loss = answer_loss + recipe.text_weight * losses[text[:, 1:]].mean() + recipe.gate_weight * gate_loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            balance.update()
            bar.advance(task)
            if step % 50 == 49 or step == recipe.steps - 1:
                curve.step.append(step + 1)
                curve.answer_loss.append(round(answer_loss.item(), 4))
                curve.accuracy.append(tuple(round(accuracy(model, probe), 3) for probe in probes))
                bar.console.print(
                    f"{step + 1:5d} answer loss {curve.answer_loss[-1]:.4f}, "
                    f"accuracy {curve.accuracy[-1]}, busiest expert {balance.worst():.1f}x, "
                    f"gate excess {gate_loss.item():.4f}"
                )
    return curve


def final_accuracy(model: KimiLinearForCausalLM, prompts: int = 200) -> dict[str, float]:
    """Accuracy on held-out prompts by number of facts, amount of filler and number of references."""
    shapes = {f"{n} facts": (n, 0, 0) for n in (1, 2, 4, 8, 12, 16, 20, 26)}
    shapes |= {f"{n} facts, {n // 2} of them references": (n, 0, n // 2) for n in (2, 4, 8, 16)}
    shapes |= {f"8 facts in {chars} characters of other text": (8, chars, 0) for chars in (100, 300, 1000)}
    result = {}
    for name, shape in shapes.items():
        rng = random.Random(name)
        result[name] = accuracy(model, [held_out_prompt(rng, *shape) for _ in range(prompts)])
    for name, kind in (("MLA", "full_attention"), ("KDA", "linear_attention")):
        rng = random.Random(name)
        with switched_off(model, kind):
            result[f"8 facts, {name} layers switched off"] = accuracy(
                model, [held_out_prompt(rng, 8) for _ in range(prompts)]
            )
    return result


def main(
    out: Annotated[Path, typer.Option(help="folder of the checkpoint")] = Path("configs/models/recall"),
    seed: int = Recipe.seed,
    steps: int = Recipe.steps,
    threads: Annotated[int, typer.Option(help="of torch; another number gives other rounding errors")] = 1,
) -> None:
    """Train, measure, and write the checkpoint with its model card."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    recipe = Recipe(seed=seed, steps=steps)
    model = recall_checkpoint.build_model()
    start, start_cpu = time.perf_counter(), time.process_time()
    curve = train(model, recipe)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    model.eval()
    recall_checkpoint.save(model, out)
    training = {
        "recipe": asdict(recipe),
        "parameters": model.num_parameters(),
        "threads": threads,
        "seconds": round(seconds),
        "cpu_seconds": round(cpu_seconds),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "reload_difference": recall_checkpoint.reload_difference(model, out),
        "accuracy": final_accuracy(model),
        "curve": asdict(curve),
    }
    recall_checkpoint.write_card(training, out)
    for name, share in training["accuracy"].items():
        print(f"{name:50s} {share:.3f}")


if __name__ == "__main__":
    typer.run(main)
