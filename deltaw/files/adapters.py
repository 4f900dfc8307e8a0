"""An adapter on disk: one safetensors file whose header says the method, its settings and the base it was made for.

Safetensors files of ours carry a checksum of all they hold: a flipped bit is found before it does anything.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltaw import __version__
from deltaw.adapters.adapter import Adapter, Method
from deltaw.errors import Diverged, UserError, explained
from deltaw.files.atomic import replacing
from deltaw.methods import method, name_of
from deltaw.models import checkpoint
from deltaw.models.decoder import Decoder
from deltaw.settings import plain

FORMAT, KEY, SEAL = 1, "deltaw", "sha256"
UNLIKE = "Its tensors are not those that its header says."


@dataclass(frozen=True)
class Header:
    """What an adapter file says of itself."""

    method: str
    settings: dict[str, Any]
    base: str
    fingerprint: str
    base_format: str = ""
    """How the base's matrices were packed; empty: as they are where it comes from."""
    system: str = ""
    """The system prompt that all rows shared: the persona is asked with it, unless another one is given."""
    version: str = __version__
    format: int = FORMAT

    @classmethod
    def of(cls, adapter: Adapter, base: str, fingerprint: str, system: str = "", base_format: str = "") -> "Header":
        """The header of an adapter made for the base of this name and fingerprint."""
        return cls(name_of(adapter.method), plain(adapter.method), base, fingerprint, base_format, system)


def save(adapter: Adapter, header: Header, path: Path) -> None:
    """Write the adapter, whole or not at all.

    Raises:
        Diverged: a weight is not finite; nothing is written.
        OSError: the disk is full or cannot be written.
    """
    tensors = state(adapter)
    refuse_nan(tensors)
    with replacing(path) as scratch:
        save_file(tensors, scratch, metadata=sealed(KEY, vars(header), tensors))


def load(path: Path, model: Decoder, fingerprint: str | None = None) -> Adapter:
    """Build the adapter that the file describes on `model`, whose fingerprint may be known, and read its tensors.

    Raises:
        UserError: no adapter file of ours, a damaged one, or one that was made for another base.
    """
    header, tensors = read(path)
    if (have := fingerprint or checkpoint.fingerprint(model)) != header.fingerprint:
        raise UserError("This adapter was made for another base model.", where=str(path),
                        why=f"It was trained on '{header.base}' ({header.fingerprint[:8]}); this base is {have[:8]}, "
                            "another one or damaged since.",
                        remedy=f"Take --base {header.base}; if that is this one, fetch it anew.")  # fmt: skip
    return filled(method(header.method, str(path), **header.settings), model, tensors, str(path))


def read(path: Path) -> tuple[Header, dict[str, Tensor]]:
    """Read the header and the tensors of an adapter file.

    Raises:
        UserError: no adapter file of ours, or a damaged one.
    """
    with _opened(path) as (header, file):
        return header, read_tensors(file, KEY)


def read_header(path: Path) -> Header:
    """Read only what an adapter file says of itself.

    Raises:
        UserError: no adapter file of ours, or a damaged one.
    """
    with _opened(path) as (header, _):
        return header


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Header, Any]]:
    with (explained("The adapter file is damaged.", SafetensorError, OSError, TypeError, ValueError, where=path,
                    remedy="Take a copy of it, or train anew."),
          explained("There is no adapter here.", FileNotFoundError, where=path,
                    why="Its run may not have ended: deltaw train --resume goes on with it."),
          safe_open(path, "pt") as file):  # fmt: skip
        said = read_said(file, KEY)
        if said is None:
            raise UserError("This safetensors file is no deltaw adapter.", where=str(path))
        header = Header(**said)
        if header.format > FORMAT:
            raise UserError(f"This adapter is of format {header.format}, and this version reads {FORMAT} at most.",
                            where=str(path), remedy="Update deltaw.")  # fmt: skip
        yield header, file


def state(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's tensors by slot name and part: `layers.3.mlp.up_proj.A`."""
    return {name.removeprefix("deltas.").replace("/", "."): t.detach().cpu().contiguous()
            for name, t in adapter.state_dict().items()}  # fmt: skip


def filled(method: Method, model: Decoder, tensors: dict[str, Tensor], where: str) -> Adapter:
    """An adapter of this method with these tensors.

    Raises:
        UserError: others belong into it.
    """
    adapter = Adapter.build(method, model).to(model.device)
    put(adapter, tensors, where)
    return adapter.eval()


def put(adapter: Adapter, tensors: dict[str, Tensor], where: str) -> None:
    """Copy tensors named as by `state` into the adapter.

    Raises:
        UserError: a tensor is missing, left over or of another shape.
    """
    own = {name.removeprefix("deltas.").replace("/", "."): t for name, t in adapter.state_dict(keep_vars=True).items()}
    if odd := sorted(own.keys() ^ tensors.keys()):
        raise UserError(f"{len(odd)} tensors do not fit this adapter, such as '{odd[0]}'.", where=where,
                        why=f"{UNLIKE} All of them: {', '.join(odd)}.")  # fmt: skip
    with torch.no_grad():
        for name, t in own.items():
            if t.shape != tensors[name].shape:
                raise UserError(f"'{name}' has shape {tuple(tensors[name].shape)}, not {tuple(t.shape)}.", where=where,
                                why=UNLIKE)  # fmt: skip
            t.copy_(tensors[name])


def refuse_nan(tensors: dict[str, Tensor]) -> None:
    """Stop before anything that is not a number is written.

    Raises:
        Diverged: a tensor has a value that is not finite.
    """
    for name, t in tensors.items():
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise Diverged(f"'{name}' holds values that are no numbers: nothing was written.")


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
