"""The generators: every target is what the task's definition says, and the splits share no sequence."""

import pytest
import torch

from serve.eval.tasks import BOS, FIRST_FILLER, NOT_SCORED, PAD, TASKS, Batch, Task, checksum, needle_at, sample_needle

LENGTHS = (32, 65, 256)


@pytest.fixture(params=TASKS.values(), ids=TASKS.keys())
def task(request: pytest.FixtureRequest) -> Task:
    return request.param


def draw(task: Task, rows: int, length: int, seed: int = 0, held_out: bool = False) -> Batch:
    return task.sample(rows, length, torch.Generator().manual_seed(seed), held_out)


def words(task: Task, batch: Batch) -> list[tuple[list[str], list[str | None]]]:
    """Each row's words, and what is asked at each."""
    vocabulary = task.vocabulary
    return [
        (
            [vocabulary[i] for i in tokens],
            [None if i == NOT_SCORED else vocabulary[i] for i in targets],
        )
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    ]


def answers_palindrome(row: list[str]) -> list[str | None]:
    middle = row.index("<sep>")
    letters = row[1:middle]
    given = [word for word in row[middle + 1 :] if word != "<pad>"]
    assert given == letters[::-1]
    asked: list[str | None] = [None] * len(row)
    asked[middle + 1 : middle + len(letters)] = letters[::-1][1:]
    return asked


def answers_mqar(row: list[str]) -> list[str | None]:
    middle = row.index("<sep>")
    keys, values = row[1:middle:2], row[2:middle:2]
    assert len(set(keys)) == len(keys) == len(row) // 4
    value_of = dict(zip(keys, values, strict=True))
    return [None] * (middle + 1) + [value_of[key] for key in row[middle + 1 :]]


def answers_stack(row: list[str]) -> list[str | None]:
    stacks: dict[str, list[str]] = {}
    asked: list[str | None] = [None] * len(row)
    for at in range(1, len(row) - 2, 3):
        operation, stack, element = row[at : at + 3]
        if operation == "<push>":
            stacks.setdefault(stack, []).append(element)
        else:
            assert operation == "<pop>"
            asked[at + 1] = stacks[stack].pop()
            assert asked[at + 1] == element
    return asked


def answers_registers(row: list[str]) -> list[str | None]:
    registers: dict[str, str] = {}
    asked: list[str | None] = [None] * len(row)
    for at in range(1, len(row) - 2, 3):
        operation, register, value = row[at : at + 3]
        if operation == "<write>":
            registers[register] = value
        elif operation == "<clear>":
            assert (register, value) == ("<all>", "v0")
            registers.clear()
        else:
            assert operation == "<read>"
            asked[at + 1] = registers.get(register, "v0")
            assert asked[at + 1] == value
    return asked


def answers_needle(row: list[str]) -> list[str | None]:
    notes: dict[str, str] = {}
    asked: list[str | None] = [None] * len(row)
    for at, word in enumerate(row):
        if word == "<note>":
            assert row[at + 1] not in notes
            notes[row[at + 1]] = row[at + 2]
        elif word == "<ask>":
            asked[at + 1] = notes[row[at + 1]]
            assert asked[at + 1] == row[at + 2]
    return asked


ANSWERS = {
    "palindrome": answers_palindrome,
    "mqar": answers_mqar,
    "stack": answers_stack,
    "registers": answers_registers,
    "needle": answers_needle,
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("held_out", [False, True])
def test_targets_are_what_a_plain_interpreter_answers(task: Task, length: int, held_out: bool) -> None:
    batch = draw(task, 32, length, held_out=held_out)
    assert batch.tokens.shape == batch.targets.shape == (32, length)
    for row, asked in words(task, batch):
        assert asked == ANSWERS[task.name](row)
        assert row[0] == "<bos>"
        assert any(asked)


@pytest.mark.parametrize("length", LENGTHS)
def test_padding_is_at_the_end_and_short(task: Task, length: int) -> None:
    padding = draw(task, 8, length).tokens == PAD
    assert padding.sum(1).max() <= 2
    assert (padding.int().diff(dim=1) >= 0).all()


def test_every_word_has_one_id_and_no_spaces(task: Task) -> None:
    assert len(set(task.vocabulary)) == len(task.vocabulary)
    assert task.vocabulary[PAD] == "<pad>"
    assert task.vocabulary[BOS] == "<bos>"
    assert not any(" " in word for word in task.vocabulary)


def test_seeds_decide(task: Task) -> None:
    assert torch.equal(draw(task, 4, 64, seed=1).tokens, draw(task, 4, 64, seed=1).tokens)
    assert not torch.equal(draw(task, 4, 64, seed=1).tokens, draw(task, 4, 64, seed=2).tokens)


def payload(task: Task, row: list[str]) -> list[int]:
    """What a sequence's checksum is taken of, read back from its words alone."""
    number = {word: i for i, word in enumerate(task.vocabulary)}
    offset = {kind: number[f"{kind}0"] for kind in "lkvserf" if f"{kind}0" in number}
    value = [number[word] - offset.get(word[0], 0) for word in row]
    operations = range(1, len(row) - 2, 3)
    if task.name == "palindrome":
        return value[1 : row.index("<sep>")]
    if task.name == "mqar":
        middle = row.index("<sep>")
        return value[2:middle:2] + value[1:middle:2]
    if task.name == "stack":
        pops = [row[at] == "<pop>" for at in operations]
        pushed = [0 if pop else value[at + 2] for at, pop in zip(operations, pops, strict=True)]
        return pushed + [value[at + 1] for at in operations] + [int(pop) for pop in pops]
    if task.name == "registers":
        writes, clears = ([row[at] == word for at in operations] for word in ("<write>", "<clear>"))
        written = [value[at + 2] * write for at, write in zip(operations, writes, strict=True)]
        registers = [0 if clear else value[at + 1] for at, clear in zip(operations, clears, strict=True)]
        return written + registers + [int(x) for x in (*writes, *clears)]
    notes = [at for at, word in enumerate(row) if word == "<note>"]
    keys = [value[at + 1] for at in notes]
    asked = [keys.index(value[at + 1]) for at, word in enumerate(row) if word == "<ask>"]
    return [value[at + 2] for at in notes] + keys + [(at - 1) // 3 for at in notes] + asked


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_sequence_alone_decides_its_split(task: Task, length: int, held_out: bool) -> None:
    # So no seed and no number of draws can bring a held-out sequence into training.
    for row, _ in words(task, draw(task, 64, length, seed=3, held_out=held_out)):
        assert (checksum(torch.tensor([payload(task, row)])).item() == 0) == held_out


def test_half_of_the_stack_operations_pop_and_some_from_below_the_top_of_a_deeper_stack() -> None:
    deep, pops = 0, 0
    for row, asked in words(TASKS["stack"], draw(TASKS["stack"], 64, 512)):
        depth: dict[str, int] = {}
        for at in range(1, len(row) - 2, 3):
            pop = asked[at + 1] is not None
            pops += pop
            deep += pop and depth[row[at + 1]] > 1
            depth[row[at + 1]] = depth.get(row[at + 1], 0) + (-1 if pop else 1)
    assert 0.4 < pops / (64 * 170) < 0.5
    assert deep > 0.05 * pops


def test_registers_are_mostly_read_after_a_write() -> None:
    targets = draw(TASKS["registers"], 64, 512).targets
    zero = TASKS["registers"].vocabulary.index("v0")
    assert (targets == zero).sum() < 0.4 * (targets != NOT_SCORED).sum()


@pytest.mark.parametrize(("depth", "at"), [(0.0, 1), (0.5, 499), (1.0, 994)])
def test_needle_lies_where_asked(depth: float, at: int) -> None:
    batch = draw(needle_at(depth), 4, 1000)
    note = TASKS["needle"].vocabulary.index("<note>")
    found = (batch.tokens == note).int().argmax(1)
    assert (found - at).abs().max() <= 3
    assert ((batch.targets != NOT_SCORED).sum(1) == 1).all()
    assert (batch.tokens[:, -3] == 3).all()


def test_needles_are_strewn_over_the_whole_filler() -> None:
    batch = sample_needle(256, 512, torch.Generator().manual_seed(0), False)
    places = (batch.tokens == 2).nonzero()[:, 1]
    assert places.min() < 10
    assert places.max() > 475
    assert (batch.tokens >= FIRST_FILLER).float().mean() > 0.9
