"""What must go wrong: a state, a conv history, a gate or a slot taken away from a running engine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from serve.common.engine import Engine
from serve.eval.questions import Question, Run, ask, step_of

Ablation = Callable[[Engine, Sequence[Question]], Run]


def untouched(running: Engine, questions: Sequence[Question]) -> Run:
    """Two at once, decoded: what the ablations below do without their damage."""
    return ask(running, questions[:2], decode=True)


def state_zeroed(running: Engine, questions: Sequence[Question]) -> Run:
    """One prompt in two chunks; between them the recurrent state is zeroed, the conv history stays."""
    question = questions[0]

    def zero(steps: int) -> None:
        if steps == 1:
            _zero(running, state=True)

    with step_of(running, question.prompt):
        run = ask(running, [question], between=zero)
    assert run.steps == 2
    return run


def conv_dropped(running: Engine, questions: Sequence[Question]) -> Run:
    """Decoded, and before every step the conv history is zeroed, the recurrent state stays."""
    return ask(running, questions[:2], decode=True, between=lambda _: _zero(running, ring=True))


def slots_swapped(running: Engine, questions: Sequence[Question]) -> Run:
    """Two at once, decoded; after their prompts each is given the slot of the other."""

    def swap(steps: int) -> None:
        if steps == 1:
            first, second = (
                running.manager.req_to_blocks[r.request_id][-1].block_id for r in running.scheduler.running
            )
            pages = running.pool.pages
            pages[[first, second]] = pages[[second, first]]

    return ask(running, questions[:2], decode=True, between=swap)


def _zero(running: Engine, *, state: bool = False, ring: bool = False) -> None:
    for layer in running.pool.layers:
        for table in running.manager.req_to_blocks.values():
            slot = table[-1].block_id
            kept, history = layer.load(slot)
            layer.store(slot, torch.zeros_like(kept) if state else None, torch.zeros_like(history) if ring else None)


@contextmanager
def _without_dt_bias(running: Engine) -> Iterator[None]:
    biases = [p for name, p in running.model.named_parameters() if name.endswith("dt_bias")]
    assert biases
    kept = [bias.detach().clone() for bias in biases]
    with torch.no_grad():
        for bias in biases:
            bias.zero_()
        yield
        for bias, value in zip(biases, kept, strict=True):
            bias.copy_(value)


def gate_without_dt_bias(running: Engine, questions: Sequence[Question]) -> Run:
    """Two at once, decoded, with gates that lack `dt_bias`."""
    with _without_dt_bias(running):
        return ask(running, questions[:2], decode=True)


ABLATIONS: dict[str, Ablation] = {
    "state zeroed at a chunk boundary": state_zeroed,
    "conv history dropped": conv_dropped,
    "gate without dt_bias": gate_without_dt_bias,
    "slots swapped": slots_swapped,
}
