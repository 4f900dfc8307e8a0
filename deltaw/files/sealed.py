"""Safetensors files of ours carry a checksum of all they hold: a flipped bit is found before it does anything."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SEAL = "sha256"


def sealed(key: str, said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata of a file: what is said of its tensors, under one key, with their checksum."""
    plain = json.loads(json.dumps(said))
    return {key: json.dumps({**plain, SEAL: _digest(plain, tensors)})}


def read_said(file: Any, key: str) -> dict[str, Any] | None:
    """What an open file says of its tensors; None: it is no file of this kind.

    Raises:
        ValueError, TypeError: it is damaged.
    """
    text = (file.metadata() or {}).get(key)
    return None if text is None else {k: v for k, v in dict(json.loads(text)).items() if k != SEAL}


def read_tensors(file: Any, key: str) -> dict[str, Tensor]:
    """The tensors of an open file.

    Raises:
        ValueError: they are not those that were written.
    """
    found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    said = json.loads(file.metadata()[key])
    if said.pop(SEAL, None) not in (None, _digest(said, found)):
        raise ValueError("Its checksum does not fit: it is not what was written.")
    return found


def _digest(said: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    h = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        h.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        h.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()
