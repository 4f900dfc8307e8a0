"""Adapters to and from other tools: PEFT's folder, llama.cpp's GGUF files. What is written is read and compared."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from deltaw.adapters.adapter import Adapter
from deltaw.api.merge import check_batches, compared, folded
from deltaw.api.persona import Base, Persona
from deltaw.data.rows import Example
from deltaw.errors import UserError
from deltaw.evaluate.measure import Difference
from deltaw.files import adapters, ollama, peft
from deltaw.files.atomic import replacing, write_text
from deltaw.files.runs import Run
from deltaw.models import checkpoint, gguf_write

Target = Literal["peft", "vllm", "gguf", "gguf-lora", "ollama"]
Packing = Literal["F32", "F16", "Q8_0", "Q4_1"]


@dataclass(frozen=True)
class Exported:
    """What was written, and how it differs from the persona here; None where nothing here can read it back."""

    to: Target
    path: Path
    size_bytes: int
    difference: Difference | None
    notices: tuple[str, ...] = ()


def export(persona: Persona, to: Target, out: Path, packing: Packing | None = None,
           examples: Sequence[Example] = (), card: str | None = None) -> Exported:  # fmt: skip
    """Write the persona for other tools, read it back, and compare logits on `examples`.

    `peft`: a folder that PEFT loads. `vllm`: the same, with one rank and one scale. `gguf`: base and adapter merged,
    one file for llama.cpp. `ollama`: the same, in a folder with a Modelfile. `gguf-lora`: the adapter alone, for
    llama.cpp beside the base's own GGUF file. `card`: the text of a model card, for folders.

    Raises:
        UserError: the format cannot hold this adapter or this model, or `out` is there already.
    """
    if persona.adapter is None:
        raise UserError("The base has no adapter to export.")
    if out.exists():
        raise UserError("It is there already.", where=str(out), remedy="Take another --out.")
    if packing is not None and to not in ("gguf", "ollama"):
        raise UserError(f"A packing is of GGUF models; --to {to} has none.")
    with _gone_unless_done(out):
        return _exported(persona, to, out, packing or "F16", examples, card)


def _exported(persona: Persona, to: Target, out: Path, packing: Packing, examples: Sequence[Example],
              card: str | None) -> Exported:  # fmt: skip
    assert persona.adapter is not None
    base, batches = persona.base, check_batches(persona, examples)
    match to:
        case "peft" | "vllm":
            peft.write(persona.adapter, base.model, base.origin, out, uniform=to == "vllm")
            if card is not None:
                write_text(out / "README.md", card)
            again = Persona(persona.name, base, peft.read(out, base.model))
            with again.on():
                return Exported(to, out, _size(out), compared(persona, base.model, batches))
        case "ollama":
            text = ollama.modelfile(base.tokenizer, persona.system, f"{persona.name}.gguf")
            merged = export(persona, "gguf", out / f"{persona.name}.gguf", packing, examples)
            write_text(out / "Modelfile", text)
            return replace(merged, to=to, path=out, size_bytes=_size(out))
        case "gguf":
            with folded(persona), replacing(out) as scratch:
                notices = gguf_write.write(base.model, base.tokenizer, scratch, packing, persona.name)
            written = checkpoint.load(out, base.model.dtype, str(base.model.device))
            return Exported(to, out, _size(out), compared(persona, written, batches), notices)
        case "gguf-lora":
            with replacing(out) as scratch:
                gguf_write.write_lora(_pairs(persona.adapter), base.model.config, scratch, persona.name)
            return Exported(to, out, _size(out), None)


def bring(folder: Path, base: Base, name: str, runs: Path) -> Path:
    """Import an adapter of PEFT or mlx-lm for `base` as the run `name`, and return its file.

    Raises:
        UserError: it is no plain LoRA of this base, or there is such a run already.
    """
    if not name or Path(name).name != name or not name.isprintable():
        raise UserError(f"{name!r} is no name for a run.", remedy="Take another --name.")
    run = Run(runs / name)
    if run.folder.exists():
        raise UserError(f"There is a run '{name}' already.", where=str(run.folder), remedy="Take another --name.")
    adapter = peft.read(folder, base.model)
    with _gone_unless_done(run.folder):
        adapters.save(adapter, adapters.Header.of(adapter, base.origin, base.fingerprint), run.adapter)
    return run.adapter


@contextmanager
def _gone_unless_done(path: Path) -> Iterator[None]:
    """Remove what was begun at a path where nothing was, if the block does not end well, Ctrl-C included."""
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # what went wrong is told, not that nothing is there to remove
            path.unlink(missing_ok=True)
        raise


def _pairs(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    pairs = {}
    for name, form in adapter.low_rank().items():
        if form is None:
            raise UserError(f"The adapter does more at {name} than a GGUF LoRA can.", remedy="Take --to gguf.")
        pairs[name] = (form.A_RI.detach(), form.scale * form.B_OR.detach())
    return pairs


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))
