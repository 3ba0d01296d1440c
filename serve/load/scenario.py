"""Scenario files: what traffic a load test sends, in YAML, checked before anything starts.

A scenario is a list of parts. A part has a workload and says how much of it: users at once (`concurrency`), arrivals
per second (`rate`), or neither, when the workload brings its own timing. Lists are swept: a part becomes points.
"""

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator


class ScenarioError(Exception):
    """A scenario that cannot be run; the message names the file and the key."""


class Strict(BaseModel):
    """A model that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RandomWorkload(Strict):
    """Independent requests of random tokens."""

    kind: Literal["random"]
    prompt: PositiveInt | list[PositiveInt]  # tokens of a prompt; a list is swept
    output: PositiveInt  # tokens of an answer
    prefix: Annotated[int, Field(ge=0)] = 0  # tokens in front that all prompts of a point share
    spread: Annotated[float, Field(ge=0, lt=1)] = 0.0  # lengths vary by this share, from 0 up to 1


class ConversationWorkload(Strict):
    """Users who talk in turns; all of them share a system prompt, and each turn repeats the conversation so far."""

    kind: Literal["conversation"]
    users: PositiveInt  # conversations at once
    turns: PositiveInt  # of each user
    system: PositiveInt  # tokens of the shared system prompt
    turn: PositiveInt  # tokens that a turn adds to the prompt, the earlier answer included
    output: PositiveInt  # tokens of an answer
    seconds: PositiveFloat  # between two turns of a user


class MixedWorkload(Strict):
    """Requests that decode all the time, and long prompts that arrive meanwhile."""

    kind: Literal["mixed"]
    decoders: PositiveInt  # requests that start together and decode
    decode_prompt: PositiveInt = 32  # tokens of their prompts
    decode_output: PositiveInt  # tokens of their answers
    prompt: PositiveInt  # tokens of a long prompt
    output: PositiveInt = 1  # tokens of its answer
    arrivals: PositiveInt  # number of long prompts
    every: PositiveFloat  # seconds between two


Workload = Annotated[RandomWorkload | ConversationWorkload | MixedWorkload, Field(discriminator="kind")]


class Part(Strict):
    """One kind of traffic."""

    name: str  # heading in the report
    # who generates the load: `vllm bench serve`, or GuideLLM if it is installed
    engine: Literal["vllm", "guidellm"] = "vllm"
    workload: Workload
    # users at once, each with `requests_per_user` requests one after another
    concurrency: list[PositiveInt] | None = None
    requests_per_user: PositiveInt = 8
    rate: list[PositiveFloat] | None = None  # arrivals per second, for `seconds`
    # an earlier part; `rate` then is a share of the most requests per second that it reached
    rate_of: str | None = None
    seconds: PositiveFloat | None = None
    burstiness: PositiveFloat = 1.0  # 1 for Poisson arrivals, less for bursts, more for an even flow

    @model_validator(mode="after")
    def _one_way_to_say_how_much(self) -> Self:
        if self.workload.kind != "random":
            if self.concurrency or self.rate or self.engine != "vllm":
                raise ValueError(f"a {self.workload.kind} workload has its own timing: no concurrency, rate or engine")
        elif bool(self.concurrency) == bool(self.rate):
            raise ValueError("give either concurrency or rate")
        elif self.rate and self.seconds is None:
            raise ValueError("rate needs seconds")
        if self.rate_of and not self.rate:
            raise ValueError("rate_of needs rate, the shares of it")
        return self


class Soak(Strict):
    """What must hold in the end; see `verdict.py`. The server's memory is watched, so it must be on this machine."""

    part: str  # is judged; those before it warm the server up
    # share by which the resident memory of the server's processes may grow during that part
    memory_growth: PositiveFloat = 0.02


class ServerSection(Strict):
    """The server to start when none is named on the command line."""

    model: str  # checkpoint; a relative path counts from the repository
    options: list[str] = []  # for `vllm serve`; names of files in the repository count from there too
    environment: dict[str, str] = {}


class Scenario(Strict):
    """A file."""

    title: str
    about: str = ""  # what to look at
    server: ServerSection | None = None
    sample_seconds: PositiveFloat = 0.5  # between two samples of /metrics
    soak: Soak | None = None  # makes the run a test that passes or fails
    parts: Annotated[list[Part], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_are_of_parts(self) -> Self:
        for index, part in enumerate(self.parts):
            if part.rate_of and part.rate_of not in {before.name for before in self.parts[:index]}:
                raise ValueError(f"{part.name!r} has rate_of {part.rate_of!r}, which is no earlier part")
        if self.soak and self.soak.part not in {part.name for part in self.parts}:
            raise ValueError(f"soak judges {self.soak.part!r}, which is no part")
        return self


@dataclass(frozen=True, slots=True)
class Point:
    """One run of the load generator."""

    number: int  # from 0; also the seed, so that no point finds the prompts of another in the cache
    part: Part
    prompt: int = 0  # tokens of a random prompt, 0 otherwise
    concurrency: int | None = None  # users at once, if that is what is set
    # arrivals per second, if that is; None before `at` if it is a share of what another part reaches
    rate: float | None = None
    share: float | None = None  # of what `part.rate_of` reaches; None if `rate` is given

    def at(self, limit: float) -> Self:
        """Itself with a rate, where that is a share of a limit in requests per second."""
        return replace(self, rate=round(self.share * limit, 3)) if self.share else self

    @property
    def num_requests(self) -> int:
        """How many requests it sends."""
        workload = self.part.workload
        if isinstance(workload, ConversationWorkload):
            return workload.users * workload.turns
        if isinstance(workload, MixedWorkload):
            return workload.decoders + workload.arrivals
        if self.concurrency:
            return self.concurrency * self.part.requests_per_user
        assert self.rate
        assert self.part.seconds
        return max(1, ceil(self.rate * self.part.seconds))

    @property
    def label(self) -> str:
        """Part, and what is swept."""
        words = [self.part.name]
        if isinstance(self.part.workload, RandomWorkload) and isinstance(self.part.workload.prompt, list):
            words.append(f"{self.prompt} tokens")
        if self.concurrency:
            words.append(f"{self.concurrency} at once")
        if self.share:
            words.append(f"{self.share:.0%} of {self.part.rate_of}")
        if self.rate:
            words.append(f"{self.rate:g}/s")
        return ", ".join(words)


def points(scenario: Scenario) -> list[Point]:
    """All runs of a scenario, in order."""
    found: list[Point] = []
    for part in scenario.parts:
        workload = part.workload
        if not isinstance(workload, RandomWorkload):
            found.append(Point(len(found), part))
            continue
        for prompt in workload.prompt if isinstance(workload.prompt, list) else [workload.prompt]:
            for concurrency in part.concurrency or []:
                found.append(Point(len(found), part, prompt, concurrency=concurrency))
            for rate in part.rate or []:
                how = {"share": rate} if part.rate_of else {"rate": rate}
                found.append(Point(len(found), part, prompt, **how))
    return found


def read(path: Path) -> Scenario:
    """Read a scenario file.

    Raises:
        ScenarioError: it is not YAML, or a key is missing, unknown or has a wrong value.
    """
    try:
        return Scenario.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise ScenarioError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ScenarioError(f"{path} is not YAML: {error}") from error
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        raise ScenarioError("\n".join([f"{path} is not a scenario:", *lines])) from error
