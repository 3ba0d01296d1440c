"""Traffic with its own timing, as a trace that `vllm bench serve --dataset-name timed_trace` replays.

A line of a trace has a time, lengths, and an id for each `CHUNK` tokens of its prompt. Equal ids are equal tokens, so a
shared system prompt or an earlier turn is a shared beginning of the lists. vLLM makes up the tokens.
"""

from math import ceil
from typing import Any

from serve.load.scenario import ConversationWorkload, MixedWorkload

CHUNK = 16  # tokens an id stands for

Line = dict[str, Any]


def trace(workload: ConversationWorkload | MixedWorkload) -> list[Line]:
    """The requests in the order in which they are sent."""
    lines = _conversations(workload) if isinstance(workload, ConversationWorkload) else _mixed(workload)
    return sorted(lines, key=lambda line: line["timestamp"])


def _line(seconds: float, ids: list[int], tokens: int, output: int) -> Line:
    return {"timestamp": round(seconds, 3), "input_length": tokens, "output_length": output, "hash_ids": ids}


def _conversations(workload: ConversationWorkload) -> list[Line]:
    # Whole chunks: a partial one would be other tokens once the next turn fills it.
    system, turn = ceil(workload.system / CHUNK), ceil(workload.turn / CHUNK)
    lines = []
    for user in range(workload.users):
        own = system + user * workload.turns * turn
        stagger = workload.seconds * user / workload.users
        for number in range(workload.turns):
            ids = [*range(system), *range(own, own + (number + 1) * turn)]
            lines.append(_line(stagger + number * workload.seconds, ids, len(ids) * CHUNK, workload.output))
    return lines


def _mixed(workload: MixedWorkload) -> list[Line]:
    lines: list[Line] = []
    used = 0

    def add(seconds: float, tokens: int, output: int) -> None:
        nonlocal used
        ids = list(range(used, used + ceil(tokens / CHUNK)))
        used += len(ids)
        lines.append(_line(seconds, ids, tokens, output))

    for _ in range(workload.decoders):
        add(0.0, workload.decode_prompt, workload.decode_output)
    for number in range(workload.arrivals):
        add((number + 1) * workload.every, workload.prompt, workload.output)
    return lines
