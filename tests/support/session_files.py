"""Files of sessions whose parts are tensors that a test has."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kimi_vllm.cache.session_copies import Copies
from kimi_vllm.cache.session_files import TOKENS, Form, digest, read, write

COPIES = Copies(2, 2**21, torch.device("cpu"))


def forms_of(parts: Mapping[str, Tensor]) -> dict[str, Form]:
    """Shapes and dtypes."""
    return {name: (tuple(part.shape), part.dtype) for name, part in parts.items()}


def write_parts(path: Path, parts: Mapping[str, Tensor], fingerprint: Mapping[str, str]) -> None:
    """Write them."""
    write(path, forms_of(parts), lambda name, room, _: room.copy_(parts[name]), fingerprint, COPIES)


def read_parts(
    path: Path, parts: Mapping[str, Tensor], fingerprint: Mapping[str, str], tokens: str = ""
) -> dict[str, Tensor]:
    """Read parts of these forms and, unless told otherwise, tokens."""
    found: dict[str, Tensor] = {}

    def put(name: str, part: Tensor, _: object) -> None:
        found[name] = part.clone()

    read(path, forms_of(parts), put, fingerprint, tokens or digest(parts[TOKENS]), COPIES)
    return found
