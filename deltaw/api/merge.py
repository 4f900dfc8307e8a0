"""Plain models written: an adapter folded into its base, or matrices packed in fewer bits.

A merged model is read back and compared; a packed one is loaded as it is stored.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from deltaw.adapters.adapter import Adapter, bare
from deltaw.adapters.watch import Inputs
from deltaw.api.evaluate import Difference, difference, label_logits, rows_of
from deltaw.api.persona import Base, Persona, load_base
from deltaw.data.batch import Batch, micro_batches
from deltaw.data.encode import Encoded, encode
from deltaw.data.files import split_weight, stream
from deltaw.data.rows import Example
from deltaw.errors import UserError, explained, located
from deltaw.files.adapters import put, state
from deltaw.files.atomic import refuse, replacing_folder
from deltaw.files.runs import Run
from deltaw.kernels.memory import frugal
from deltaw.methods.full import Whole
from deltaw.models import checkpoint, source
from deltaw.models.decoder import Decoder
from deltaw.models.slots import CannotMerge, Linear, filled, lent
from deltaw.weights import Dense, Packed
from deltaw.weights.formats import parse
from deltaw.weights.grid import Grid, gptq

CHECK_ROWS, CHECK_TOKENS = 32, 512
SHAPE = ("width", "layers", "heads", "kv_heads", "head_width", "hidden", "vocab")
"""What two bases must have in common for one's adapter to fit the other."""
FALLBACK = "The quick brown fox jumps over the lazy dog, and what happened next was told in the village for many years."
"""What is checked on when there is no data: any text will do, since two models are compared with one another."""


@dataclass(frozen=True)
class Merged:
    """Where the merged model is, and how it differs from the base wearing the adapter."""

    folder: Path
    difference: Difference
    dtype: str
    size_bytes: int


def merge(persona: Persona, folder: Path, examples: Sequence[Example] = (), into: Base | None = None,
          packed: bool = False) -> Merged:  # fmt: skip
    """Write base and adapter as one model that `transformers` loads, read it back, and compare logits on `examples`.

    `packed`: in the form in which a packed base's matrices are, rather than as plain numbers: QA-LoRA's change of
    offsets is exact, any other sum is rounded to the form again.

    The base in memory is left as it was, bit for bit. `into`: another base of the same shape, such as the original of
    which the persona's base is a quantised copy; the comparison says what that changes.

    Raises:
        UserError: the folder is there already, there is no adapter, its method cannot be merged, or `into` is no base
        of the same shape and vocabulary.
    """
    persona.worn("merge")
    if (folder.is_symlink() and not folder.exists()) or (folder.exists() and any(folder.iterdir())):
        raise UserError("The folder is there already, and not empty.", where=str(folder), remedy="Take another --out.")
    batches, worn = check_batches(persona, examples), persona if into is None else moved(persona, into)
    model = worn.base.model
    with replacing_folder(folder) as scratch:
        with folded(worn, packed):
            checkpoint.save(model, scratch)
            form = checkpoint.form_of(model)
        worn.base.tokenizer.save(scratch)
        written = checkpoint.load(scratch, model.dtype, str(model.device))
        kind = str(form or model.dtype).removeprefix("torch.")
        merged = Merged(folder, compared(persona, written, batches), kind,
                        sum(f.stat().st_size for f in scratch.glob("*.safetensors")))  # fmt: skip
        report = {**asdict(merged), "folder": folder.name, "persona": persona.name, "base": worn.base.name,
                  "trained_on": persona.base.name}  # fmt: skip
        (scratch / "merge_report.json").write_text(json.dumps(report, indent=2) + "\n")
    return merged


def moved(persona: Persona, base: Base) -> Persona:
    """The persona's adapter on another base, for which it was not trained.

    Raises:
        UserError: the base has another shape or vocabulary.
    """
    here, there, trained = persona.base, base, persona.worn("merge")
    if odd := [f"{n} is {getattr(there.model.config, n)}, not {getattr(here.model.config, n)}" for n in SHAPE
               if getattr(there.model.config, n) != getattr(here.model.config, n)]:  # fmt: skip
        raise UserError("The adapter does not fit this base.", where=base.name, why=f"{odd[0]}.")
    if any(isinstance(delta, Whole) for _, delta in trained.named_deltas()):
        raise UserError("This adapter holds whole layers, which would take the place of the other base's.",
                        remedy="Take --into base.")  # fmt: skip
    ours, theirs = ({i: token for token, i in base.tokenizer.fast.get_vocab().items() if not token.startswith("[PAD")}
                    for base in (here, there))  # fmt: skip
    if any(ours[i] != theirs[i] for i in ours.keys() & theirs.keys()):
        raise UserError("This base has another vocabulary than the one the adapter was trained on.", where=base.name)
    adapter = Adapter.build(trained.method, base.model).to(base.model.device)
    own, others = ({name: t.tolist() for name, t in state(each).items() if name.endswith(".order")}
                   for each in (trained, adapter))  # fmt: skip
    if own != others:
        raise UserError("This adapter sums inputs in the order of its own base's groups, and the other has another.",
                        where=base.name, remedy="Take --into base, or --into quantised.")  # fmt: skip
    put(adapter, state(trained), base.name)
    return replace(persona, base=base, adapter=adapter.eval())


@contextmanager
def folded(persona: Persona, packed: bool = False) -> Iterator[None]:
    """The base with the persona's adapter merged into it, for the length of a `with` block; then bit for bit as before.

    `packed`: a packed base stays so; else its matrices are plain for as long.

    Raises:
        UserError: the adapter's method cannot be merged.
    """
    base, adapter = persona.base.model, persona.worn("merge")
    told = explained("This adapter cannot be merged into plain weights.", CannotMerge)
    with told, bare(base), nullcontext() if packed else unpacked(base):
        try:
            adapter.merge()
            yield
        finally:
            adapter.unmerge()


def unpacked(model: Decoder) -> AbstractContextManager[None]:
    """Plain matrices in the place of packed ones, for the length of a `with` block."""
    return lent((slot, "weight", Dense(slot.weight.dense())) for slot in model.modules()
                if isinstance(slot, Linear) and isinstance(slot.weight, Packed))  # fmt: skip


def compared(persona: Persona, written: Decoder, batches: Sequence[Batch]) -> Difference:
    """How a model that was written and read back differs from the base that wears the adapter."""

    def said() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in batches:
            with persona.on():
                worn_NV, labels_N = label_logits(persona.base.model, batch)
            yield worn_NV, label_logits(written, batch)[0], labels_N

    return difference(said())


def home(path: Path) -> Path:
    """The run's folder that an adapter file belongs to, or the folder it lies in."""
    return path.parent.parent if path.parent.name == "adapter" else path.parent


def known_rows(folder: Path) -> Sequence[Example]:
    """The data that the run in this folder was trained on, if it is still there."""
    if not (run := Run(folder)).config.exists():
        return ()
    files = (split_weight(str(f))[0] for f in run.read_config()["data"])
    file = next((f for f in files if f.exists()), None)
    with suppress(UserError):  # no reason not to write what was trained
        return tuple(islice(stream(file), CHECK_ROWS)) if file else ()
    return ()


def check_batches(persona: Persona, examples: Sequence[Example]) -> list[Batch]:
    """The answers, or texts, on which models are compared; a sentence, where there are none."""
    tokenizer, device = persona.base.tokenizer, persona.base.model.device
    whole = [encode(row, tokenizer, "all" if row.text else "answers") for row in examples[:CHECK_ROWS]]
    begun = [Encoded(row.ids[:CHECK_TOKENS], row.trained[:CHECK_TOKENS]) for row in whole]
    rows = [row for row in begun if row.targets]
    if not rows:
        ids = tuple(tokenizer.encode(FALLBACK))
        rows = [Encoded(ids, (True,) * len(ids))]
    return [batch.to(device) for batch in micro_batches(rows, CHECK_TOKENS, lambda _: False)]


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
    refuse(folder)
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
    slots = dict(checkpoint.linears(model))
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
