"""Adapters to and from other tools: PEFT's folder, llama.cpp's GGUF files. What is written is read and compared."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

from deltaw.api.evaluate import Difference
from deltaw.api.merge import Merged, check_batches, compared, folded, merge
from deltaw.api.persona import Base, Persona
from deltaw.data.rows import Example
from deltaw.errors import UserError
from deltaw.files import ollama, peft
from deltaw.files.atomic import refuse, replacing, replacing_folder, write_text
from deltaw.files.runs import fresh, kept
from deltaw.models import checkpoint, gguf_write, packed, source

Target = Literal["peft", "vllm", "gguf", "gguf-lora", "ollama"]
SYSTEM = "system_prompt.txt"
"""Beside an adapter in PEFT's form, which has no place for the prompt that all its rows had."""
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
    adapter = persona.worn("export")
    refuse(out)
    if packing is not None and to not in ("gguf", "ollama"):
        raise UserError(f"A packing is of GGUF models; --to {to} has none.")
    base, batches, packing = persona.base, check_batches(persona, examples), packing or "F16"
    match to:
        case "peft" | "vllm":
            with replacing_folder(out) as scratch:
                peft.write(adapter, base.model, base.origin, scratch, uniform=to == "vllm")
                if persona.system:
                    write_text(scratch / SYSTEM, persona.system)
                if card is not None:
                    write_text(scratch / "README.md", card)
                again = Persona(persona.name, base, peft.read(scratch, base.model))
                with again.on():
                    return Exported(to, out, _size(scratch), compared(persona, base.model, batches), _elsewhere(base))
        case "ollama":
            text = ollama.modelfile(base.tokenizer, persona.system, f"{persona.name}.gguf")
            with replacing_folder(out) as scratch:
                merged = export(persona, "gguf", scratch / f"{persona.name}.gguf", packing, examples)
                write_text(scratch / "Modelfile", text)
                return replace(merged, to=to, path=out, size_bytes=_size(scratch))
        case "gguf":
            with replacing(out) as scratch:
                # What lies on llama.cpp's own grid stays there: QA-LoRA moves offsets, and no code.
                with folded(persona, packed=packing == gguf_write.GRID and gguf_write.on_grid(base.model)):
                    notices = gguf_write.write(base.model, base.tokenizer, scratch, packing, persona.name)
                written = checkpoint.load(scratch, base.model.dtype, str(base.model.device))
                return Exported(to, out, _size(scratch), compared(persona, written, batches), notices)
        case "gguf-lora":
            with replacing(out) as scratch:
                pairs = persona.pairs("export", "a GGUF LoRA can",
                                      "Take --to gguf; or --to peft, if it cannot be merged.")  # fmt: skip
                gguf_write.write_lora(pairs, base.model.config, scratch, persona.name)
                return Exported(to, out, _size(scratch), None, _elsewhere(base))


def _elsewhere(base: Base) -> tuple[str, ...]:
    """What to know of an adapter that is loaded onto its base by others, where it was packed only here."""
    form = checkpoint.form_of(base.model)
    if form is None or checkpoint.is_packed(base.path):
        return ()
    told = packed.said({"": form}, base.model.dtype)[packed.KEY]
    names = "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"
    how = (f"transformers packs so too: BitsAndBytesConfig({', '.join(f'{n}={told[n]!r}' for n in names)})."
           if packed.is_theirs(form) else "deltaw merge writes one model of both.")  # fmt: skip
    return (f"It was trained over {base.name} packed as {form}, and says other things over plain matrices, as far as "
            f"packing changed them. {how}",)  # fmt: skip


def requantised(persona: Persona, out: Path, examples: Sequence[Example] = ()) -> Merged:
    """Write base and adapter in the packing that the base has: one GGUF file, or of a packed folder a folder; compare.

    Raises:
        UserError: the base is not quantised, or in a way that is not written here; or as for `export`.
    """
    if checkpoint.form_of(persona.base.model) is not None:
        return merge(persona, out, examples, packed=True)
    packing = source.packing(persona.base.path)
    if packing not in get_args(Packing):
        raise UserError(f"The base's weights are {packing or 'plain numbers'}: they cannot be quantised again.",
                        remedy="Take --into base, or deltaw export --to gguf --packing Q8_0.")  # fmt: skip
    done = export(persona, "gguf", out, cast("Packing", packing), examples)
    assert done.difference is not None
    return Merged(out, done.difference, packing, done.size_bytes)


def bring(folder: Path, base: Base, name: str, runs: Path) -> Path:
    """Import an adapter of PEFT or mlx-lm for `base` as the run `name`, and return its file.

    Raises:
        UserError: it is no plain LoRA of this base, or there is such a run already.
    """
    run = fresh(name, runs, "--name.")
    adapter = peft.read(folder, base.model)
    system = (folder / SYSTEM).read_text(encoding="utf-8", errors="replace") if (folder / SYSTEM).is_file() else ""
    return kept(adapter, base.header(adapter, system), run)


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in ([path] if path.is_file() else path.iterdir()))
