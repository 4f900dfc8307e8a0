"""Pack a model: its matrices in fewer bits, in a folder that is loaded as it is stored."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deltaw.adapters.watch import Inputs
from deltaw.api.evaluate import rows_of
from deltaw.api.persona import Persona, load_base
from deltaw.data.batch import Batch
from deltaw.errors import UserError, located
from deltaw.files.atomic import replacing_folder
from deltaw.kernels.memory import frugal
from deltaw.models import checkpoint, source
from deltaw.models.decoder import Decoder
from deltaw.models.slots import Linear, filled
from deltaw.weights.formats import parse
from deltaw.weights.gptq import gptq
from deltaw.weights.grid import Grid


@dataclass(frozen=True)
class Quantised:
    """What was written: bytes of the file, and of the packed matrices, which have `bits` a number."""

    folder: Path
    form: str
    size_bytes: int
    packed_bytes: int
    bits: float


def quantize(base: str, form: str, folder: Path, calibrate: Path | None = None, say: source.Say = lambda _: None
             ) -> Quantised:  # fmt: skip
    """Write a model with the matrices of all linear layers but the head in this format.

    Each is packed as it is read, so that no more than one is ever whole; but with `calibrate`, rows by which whole
    numbers are rounded such that layers give what they gave (GPTQ), the model is loaded first.

    Raises:
        UserError: no such model or format, matrices that do not fit it, or a folder that is there.
    """
    if os.path.lexists(folder):
        raise UserError("It is there already.", where=str(folder), remedy="Take another --out.")
    parsed = parse(form)
    if calibrate is not None and not isinstance(parsed, Grid):
        raise UserError(f"Only whole numbers are rounded by rows, and {form} has none.",
                        remedy="Leave --calibrate out.")  # fmt: skip
    loaded = load_base(base, "float32", "cpu", None, say, "" if calibrate else form)
    if calibrate is not None:
        assert isinstance(parsed, Grid)
        say(f"Rounding by {calibrate}")
        _rounded_by(rows_of(calibrate, Persona(base, loaded)), loaded.model, parsed)
    say(f"Writing {folder}")
    with frugal(), replacing_folder(folder) as scratch:
        checkpoint.save(loaded.model, scratch)
        loaded.tokenizer.save(scratch)
        note = source.note(loaded.path) | {"packed_from": base, "format": form}
        (scratch / source.NOTE).write_text(json.dumps(note, indent=2) + "\n")
        for extra in ("generation_config.json", "LICENSE"):
            if loaded.path.is_dir() and (loaded.path / extra).exists():
                shutil.copy(loaded.path / extra, scratch)
        size = sum(f.stat().st_size for f in scratch.glob("*.safetensors"))
    return Quantised(folder, form, size, *checkpoint.stored(loaded.model))


@torch.no_grad()
def _rounded_by(batches: Sequence[Batch], model: Decoder, form: Grid) -> None:
    """Pack the matrices of a model by what they multiply when these rows pass through it as it is."""
    if (have := checkpoint.form_of(model)) is not None:
        raise UserError(f"This model is packed already, as {have}.", remedy="Take the model that it was made from.")
    slots = {name: slot for name, slot in model.layers.named_modules(prefix="layers") if isinstance(slot, Linear)}
    for name, slot in slots.items():  # before the rows take their time
        with located(name):
            form.grouped(torch.empty(slot.weight.shape, device="meta"))
    ears = {name: Inputs(slot.weight.shape[1]) for name, slot in slots.items()}
    with filled((slot, ears[name]) for name, slot in slots.items()):
        for batch in batches:
            model.hidden(batch.ids_T, batch.at_T, batch.seen)
    for name, slot in slots.items():
        with located(name):
            slot.weight = checkpoint.finite(gptq(slot.weight.dense(), ears[name].products_II, form, model.dtype))
