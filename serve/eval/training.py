"""The training loop of the synthetic tasks: batches drawn on the device, steps replayed from CUDA graphs."""

import math
import random
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import typer
from transformers import KimiLinearForCausalLM

from serve.common.training import GateWatch, decayed_apart, switched_off
from serve.eval import fast_kda
from serve.eval.tasks import FILLERS, FIRST_FILLER, NOT_SCORED, Batch, Task

BATCHES_AT_ONCE = 32
STEPS_BETWEEN_READS = 10
PROBES = 40
HELD_OUT_SEED = 10**9
NO_MASK = {"full_attention": None, "linear_attention": None}
"""What transformers takes for "causal, nothing padded" without building a mask."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, together with the code, the device and the time limit."""

    seed: int = 0  # of torch and of the data
    steps: int = 100_000  # optimiser steps
    seconds: float = 400.0  # training ends then at the latest; the learning rate follows whichever of the two is nearer
    tokens: int = 16384  # tokens in a batch
    lengths: tuple[int, ...] = (32, 64, 128, 256, 512)  # tokens of the sequences; shorter ones come first (curriculum)
    probe_lengths: tuple[int, ...] = (256, 512)  # of the held-out sequences that choose the weights to keep
    advance: float = 0.9  # training accuracy on the longest sequences so far at which longer ones join
    lr: float = 1e-3  # peak learning rate, after a linear warm-up and before a cosine down to a hundredth
    warmup: int = 100  # steps
    weight_decay: float = 0.05  # on matrices only
    fast_weight: float = 0.1  # weight of the loss on gates that forget very fast
    keep_weight: float = 0.02  # weight of the loss on gates that forget, and on writes, at filler (needle only)
    # share of sequences in which the MLA layer adds nothing, so that the memory is in the KDA layers
    mla_dropout: float = 0.0


@dataclass
class Curve:
    """How training went, at about forty moments."""

    # step, seconds: steps done, and seconds since training began
    step: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    length: list[int] = field(default_factory=list)  # of the longest sequences trained on so far
    loss: list[float] = field(default_factory=list)  # of the last batch read, in nats for each scored token
    accuracy: dict[int, list[float]] = field(default_factory=dict)  # held-out accuracy by length


class Batches:
    """Training batches by length, drawn many at a time."""

    def __init__(self, task: Task, recipe: Recipe, device: torch.device) -> None:
        self._task, self._tokens = task, recipe.tokens
        self._generator = torch.Generator(device).manual_seed(recipe.seed)
        self._left: dict[int, list[Batch]] = {}

    def draw(self, length: int) -> Batch:
        """The next batch of sequences of a length."""
        left = self._left.setdefault(length, [])
        if not left:
            rows = max(1, self._tokens // length)
            pool = self._task.sample(rows * BATCHES_AT_ONCE, length, self._generator, False)
            left += [pool[i * rows : (i + 1) * rows] for i in range(BATCHES_AT_ONCE)]
        return left.pop()


class Stepper:
    """One optimiser step on a batch; on a GPU captured once for every length and replayed after.

    Args:
        model: on its device; its KDA layers must already call a function without host synchronisation.
        task: The task, which says its name and which tokens are filler.
        recipe: learning rate and weights of the losses.
    """

    def __init__(self, model: KimiLinearForCausalLM, task: Task, recipe: Recipe) -> None:
        self._model, self._task = model, task
        device = model.device
        self._watch = GateWatch(model, recipe.fast_weight, recipe.keep_weight)
        if recipe.mla_dropout:
            fast_kda.drop(model, "full_attention", recipe.mla_dropout)
        self.lr = torch.zeros((), device=device)
        groups = decayed_apart(model, recipe.weight_decay)
        cuda = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=cuda, capturable=cuda)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.loss = torch.zeros((), device=device)
        self.accuracy = torch.zeros((), device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Batch]] = {}
        self._stream = torch.cuda.Stream() if cuda else None
        self._pool = torch.cuda.graph_pool_handle() if cuda else None
        self.graphs = cuda

    def _compute(self, batch: Batch) -> None:
        self._optimizer.zero_grad(set_to_none=False)
        logits = forward(self._model, batch.tokens)
        scored = batch.targets != NOT_SCORED
        losses = F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=NOT_SCORED, reduction="none")
        loss = losses.sum() / scored.sum()
        filler = None
        if self._task.name == "needle":
            filler = (batch.tokens >= FIRST_FILLER) & (batch.tokens < FIRST_FILLER + FILLERS)
        (loss + self._watch.losses(filler)).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self.loss.copy_(loss.detach())
        self.accuracy.copy_(((logits.argmax(-1) == batch.targets) & scored).sum() / scored.sum())

    def _capture(self, length: int, batch: Batch) -> None:
        static = Batch(batch.tokens.clone(), batch.targets.clone())
        rate = self.lr.clone()
        self.lr.zero_()  # the warm-up steps must not train
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            for _ in range(3):
                self._compute(static)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # Graphs are replayed one after the other and leave nothing behind in their memory: they share it.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            self._compute(static)
        torch.cuda.synchronize()
        self.lr.copy_(rate)
        self._graphs[length] = graph, static

    def __call__(self, batch: Batch) -> None:
        """Train on a batch."""
        length = batch.tokens.shape[1]
        if self.graphs and length not in self._graphs:
            try:
                start = time.perf_counter()
                self._capture(length, batch)
                typer.echo(f"{self._task.name}: captured length {length} in {time.perf_counter() - start:.1f} s")
            except RuntimeError as error:
                self.graphs = False
                typer.echo(f"{self._task.name}: no CUDA graph for length {length}, steps run eagerly: {error}")
        if length in self._graphs:
            graph, static = self._graphs[length]
            static.tokens.copy_(batch.tokens)
            static.targets.copy_(batch.targets)
            graph.replay()
        else:
            self._compute(batch)


def forward(model: KimiLinearForCausalLM, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """Logits [batch, length, vocabulary] of int64 [batch, length]; options of the model, such as `chunk_size`."""
    if torch.is_grad_enabled():
        # The gradient of a look-up sorts tokens; that of a product with one-hot rows can be captured.
        weight = model.model.embed_tokens.weight
        one_hot = tokens[..., None] == torch.arange(weight.shape[0], device=tokens.device)
        options["inputs_embeds"] = one_hot.to(weight.dtype) @ weight
    else:
        options["input_ids"] = tokens
    return model(attention_mask=NO_MASK, use_cache=False, **options).logits


@torch.no_grad()
def accuracy(model: KimiLinearForCausalLM, batch: Batch, tokens: int = 16384, **options: Any) -> float:
    """Share of scored positions whose most likely token is the target; `tokens` in a forward pass."""
    rows = max(1, tokens // batch.tokens.shape[1])
    right = torch.zeros((), dtype=torch.int64, device=batch.tokens.device)
    for ids, targets in zip(batch.tokens.split(rows), batch.targets.split(rows), strict=True):
        right += (forward(model, ids, **options).argmax(-1) == targets).sum()
    return (right / (batch.targets != NOT_SCORED).sum()).item()


def held_out(task: Task, tokens: int, length: int, device: torch.device) -> Batch:
    """Sequences that training never sees, the same ones in every run on a kind of device."""
    generator = torch.Generator(device).manual_seed(HELD_OUT_SEED + length)
    return task.sample(max(1, tokens // length), length, generator, True)


def learning_rate(step: int, progress: float, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from the peak to a hundredth of it."""
    return recipe.lr * min(1.0, (step + 1) / recipe.warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Curriculum:
    """Which length comes next: the longest so far more often than not.

    A longer one joins once the longest is learnt, or in any case a seventh of the training later.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._lengths, self._advance, self._stage = recipe.lengths, recipe.advance, 0
        self._rng = random.Random(recipe.seed)
        self._accuracy = 0.0
        self._since = 0.0

    @property
    def longest(self) -> int:
        """Longest length so far."""
        return self._lengths[self._stage]

    def draw(self) -> int:
        """The length of the next batch."""
        if self._stage == 0 or self._rng.random() < 0.6:
            return self.longest
        return self._rng.choice(self._lengths[: self._stage])

    def note(self, length: int, accuracy: float, progress: float) -> None:
        """Learn how well a batch went."""
        if length == self.longest:
            self._accuracy += 0.3 * (accuracy - self._accuracy)
        if self._stage + 1 < len(self._lengths) and (self._accuracy > self._advance or progress - self._since > 1 / 7):
            self._stage, self._accuracy, self._since = self._stage + 1, 0.0, progress


def train(model: KimiLinearForCausalLM, task: Task, recipe: Recipe, label: str) -> Curve:
    """Train in place and leave the weights that did best on held-out sequences.

    Args:
        label: in front of the lines printed every fifteen seconds.

    Returns:
        The curve. Its accuracies are measured with the recurrence that trains.
    """
    curve = Curve(accuracy={length: [] for length in recipe.probe_lengths})
    probes = {n: held_out(task, recipe.tokens, n, model.device) for n in recipe.probe_lengths}
    batches, curriculum = Batches(task, recipe, model.device), Curriculum(recipe)
    best, best_weights = -1.0, {}
    start, next_line, next_probe, step, progress = time.perf_counter(), 15.0, 0.0, 0, 0.0
    with fast_kda.replaced_kda(fast_kda.chunk_kda):
        stepper = Stepper(model, task, recipe)
        while progress < 1:
            length = curriculum.draw()
            stepper.lr.fill_(learning_rate(step, progress, recipe))
            stepper(batches.draw(length))
            step += 1
            seconds = time.perf_counter() - start
            progress = max(step / recipe.steps, seconds / recipe.seconds)
            if step % STEPS_BETWEEN_READS == 0 or progress >= 1:
                loss = stepper.loss.item()
                if not math.isfinite(loss):
                    if not best_weights:
                        raise ValueError(f"{label}: loss {loss} at step {step}; try a smaller --lr.")
                    typer.echo(f"{label}: loss {loss} at step {step}, training ends; try a smaller --lr.")
                    break
                curriculum.note(length, stepper.accuracy.item(), progress)
            if progress >= min(1.0, next_probe):
                next_probe = progress + 1 / PROBES
                found = {n: accuracy(model, probe, recipe.tokens) for n, probe in probes.items()}
                for n, share in found.items():
                    curve.accuracy[n].append(round(share, 5))
                curve.step.append(step)
                curve.seconds.append(round(seconds, 1))
                curve.length.append(curriculum.longest)
                curve.loss.append(round(stepper.loss.item(), 5))
                if (mean := sum(found.values()) / len(found)) >= best:
                    best = mean
                    best_weights = {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
            if seconds >= next_line:
                next_line = seconds + 15
                shares = ", ".join(f"{n}: {values[-1]:.4f}" for n, values in curve.accuracy.items())
                typer.echo(
                    f"{label} {seconds:4.0f} s, step {step:6d} ({step / seconds:.1f}/s), "
                    f"trains on {curriculum.longest}, loss {stepper.loss.item():.4f}, held out {shares}"
                )
    model.load_state_dict(best_weights)
    return curve


def final_accuracy(model: KimiLinearForCausalLM, task: Task, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Held-out accuracy with transformers' own recurrence, in float32, and with ablations at the first probe length.

    Returns:
        Name of the condition to accuracy by length.
    """
    device, tokens = model.device, 4 * recipe.tokens
    options = {"chunk_size": 16}
    whole, half = {}, recipe.probe_lengths[0] // 2
    for length in (*recipe.probe_lengths, 2 * recipe.probe_lengths[-1]):
        whole[str(length)] = accuracy(model, held_out(task, tokens, length, device), recipe.tokens, **options)
    probe = held_out(task, tokens, 2 * half, device)

    def measure() -> dict[str, float]:
        return {str(2 * half): accuracy(model, probe, recipe.tokens, **options)}

    result = {"transformers": whole}
    with fast_kda.replaced_kda(fast_kda.chunk_kda):
        result["training's recurrence"] = {str(2 * half): accuracy(model, probe, recipe.tokens)}
    for name, every in (("state zeroed every 16 tokens", 16), ("state zeroed at half the length", half)):
        with fast_kda.state_reset_every(every):
            result[name] = measure()
    for name, kind in (("KDA layers switched off", "linear_attention"), ("MLA layer switched off", "full_attention")):
        with switched_off(model, kind):
            result[name] = measure()
    return result


def as_json(recipe: Recipe, curve: Curve) -> dict[str, Any]:
    """Recipe and curve as plain values."""
    return {"recipe": asdict(recipe), "curve": asdict(curve)}
