"""A model on disk: a folder of safetensors with a `config.json`, or one GGUF file. Read, and written."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltaw.errors import UserError, explained, located
from deltaw.models import packed
from deltaw.models.config import ModelConfig
from deltaw.models.decoder import Decoder
from deltaw.models.gguf import GGUF
from deltaw.models.slots import PART, Linear, Slot
from deltaw.weights import Dense, Format, Packed, Weight
from deltaw.words import some

FORMS = "A model is a folder with config.json and *.safetensors, or one GGUF file."
CONVERTED = "A model of the cache is fetched anew when it is asked for."
ANEW = "Fetch the model anew: its files do not belong together."
SAMPLED = 4096
"""Values of each tensor that enter the fingerprint one by one; of the others, their sum."""
SUMMED = 1 << 24
"""Values that are summed at a time."""
SEAL = "deltaw_fingerprint"
"""Where a safetensors file of ours says what it holds."""


def load(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", form: Format | None = None) -> Decoder:
    """Read a model folder or a GGUF file; weights are converted to `dtype`, or as they were packed.

    `form`: pack the matrices of all linear layers but the head so, each as it is read: no more than one is ever whole.

    Raises:
        UserError: the family is not supported, a weight is missing or left over, or the only weights are a pickle.
    """
    gguf = GGUF(path) if path.is_file() else None
    told = {} if gguf else read_json(path / "config.json")
    config = gguf.config() if gguf else ModelConfig.from_hf(told, str(path))
    with torch.device("meta"):
        model = Decoder(config)
    wanted, (usual, others) = dict(_places(model)), packed.read_formats(told, path)
    pieces: dict[str, dict[str, Tensor]] = {}
    for name, w in gguf.tensors() if gguf else _tensors(path, apart=form is not None and not is_packed(path)):
        whole, dot, end = name.partition(".weight")
        if whole + dot in wanted and (end or w.dtype == torch.uint8):
            pieces.setdefault(whole + dot, {})[end] = w
            continue
        if name not in wanted:
            if (name == "lm_head.weight" and config.tied) or name.endswith("rotary_emb.inv_freq"):
                continue  # Tied checkpoints may carry the matrix twice; old ones carry RoPE's constants.
            raise UserError(f"The weight '{name}' has no place in this model.", where=str(path), remedy=ANEW)
        owner, part = wanted.pop(name)
        _put(owner, part, w.to(device=device, dtype=dtype), f"{path}: {name}")
        if form is not None and isinstance(owner, Linear) and part == "weight" and owner is not model.lm_head:
            with located(f"{path}: {name}"):
                owner.weight = finite(form.pack(w.to(device), dtype))
    for name, found in pieces.items():
        (owner, _), own = wanted.pop(name), others.get(name.removesuffix(".weight"), usual)
        if not isinstance(owner, Linear):
            raise UserError("This weight is packed, and only those of linear layers may be.", where=f"{path}: {name}",
                            remedy=ANEW)  # fmt: skip
        owner.weight = packed.weight_of(found, own, owner.weight.shape, dtype, f"{path}: {name}").to(device)
    if pieces and form not in (None, have := form_of(model)):
        raise UserError(f"This model is packed already, as {have}.", where=str(path),
                        remedy=f"Take it so (--base-format {have}), or the model that it was made from.")  # fmt: skip
    if wanted:
        raise UserError(f"{some(len(wanted), 'weight')} missing, such as '{min(wanted)}'.", where=str(path),
                        remedy=ANEW)  # fmt: skip
    return model.eval()


def finite(weight: Weight) -> Weight:
    """A matrix that was packed, if it is of numbers.

    Raises:
        UserError: it has values that are no numbers, or too large for its format.
    """
    if all(bool(t.isfinite().all()) for t in weight.buffers() if t.is_floating_point()):
        return weight
    raise UserError("This matrix holds values that are no numbers, or too large for this format.",
                    remedy="Take another format, such as bf16; or fetch the model anew.")  # fmt: skip


def save(model: Decoder, folder: Path) -> None:
    """Write `model.safetensors` and `config.json` such that `transformers` loads the same model."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {name if name.startswith("lm_head") else f"model.{name}": w.contiguous() for name, w in _stored(model)}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt", SEAL: fingerprint(model)})
    (folder / "model.safetensors").chmod(0o644)  # as the other files; safetensors writes it for its owner alone
    config = {**model.config.to_hf(), "dtype": str(model.dtype).removeprefix("torch."),
              **packed.said(forms_of(model), model.dtype)}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def linears(model: Decoder) -> Iterator[tuple[str, Linear]]:
    """The linear layers of all blocks, by name; the head is none of them: its table may be another layer's."""
    return ((name, slot) for name, slot in model.layers.named_modules(prefix="layers") if isinstance(slot, Linear))


def forms_of(model: Decoder) -> dict[str, Format]:
    """How the matrices of the layers are packed, by layer name; plain ones are left out."""
    return {name: slot.weight.form for name, slot in linears(model) if isinstance(slot.weight, Packed)}


def form_of(model: Decoder) -> Format | None:
    """The format in which most packed matrices are; None: all are plain."""
    return packed.usual(forms_of(model))


def stored(model: Decoder) -> tuple[int, float]:
    """Bytes of the matrices of the layers as they are stored, and bits a number of them."""
    weights = [slot.weight for _, slot in linears(model)]
    held = sum(weight.stored_bytes for weight in weights)
    return held, 8 * held / sum(weight.shape[0] * weight.shape[1] for weight in weights)


def count(model: Decoder) -> int:
    """How many numbers a model has, however they are stored."""
    return sum(math.prod(getattr(owner, part).shape) for _, (owner, part) in _places(model))


def _stored(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """What a folder holds: every weight, a packed one by its parts."""
    slots = dict(model.named_modules())
    for name, w in tensors(model):
        slot = slots.get(name.removesuffix(".weight"))
        if isinstance(slot, Linear) and isinstance(slot.weight, Packed):
            yield from ((name + end, part) for end, part in packed.parts(slot.weight).items())
        elif isinstance(slot, Linear) and isinstance(slot.weight, Dense):
            yield name, slot.weight.w_OI  # in its own type, whatever it is multiplied in
        else:
            yield name, w


def is_packed(path: Path) -> bool:
    """Whether the matrices of a model on disk are packed."""
    return path.is_dir() and bool(read_json(path / "config.json").get(packed.KEY))


def tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every weight, by its checkpoint name without the leading `model.`; where others have a bias, zeros for one.

    Raises:
        UserError: a bias has no place in a model of this family.
    """
    config = model.config
    for name, (owner, part) in _places(model):
        yield name, get(owner, part)
    for name, slot in linears(model):
        biased, own = _bias_of(name.rsplit(".", 1)[-1], config)
        if biased and not own:
            raise UserError(f"The bias that was trained has no place in a {config.family.name} model.",
                            remedy="Train without it: --c none --e none.")  # fmt: skip
        if biased and slot.bias is None:
            yield f"{name}.bias", torch.zeros(slot.weight.shape[0], dtype=model.dtype, device=model.device)


def _bias_of(last: str, config: ModelConfig) -> tuple[bool, bool]:
    """Whether a layer called so has a bias, and whether the family has a place for it."""
    if last in ("gate_proj", "up_proj", "gate_up_proj", "down_proj"):
        return config.mlp_bias, "mlp" in config.family.biases
    own = "attention" in config.family.biases or (config.family.qkv_bias and last != "o_proj")
    return config.o_bias if last == "o_proj" else config.qkv_bias, own


def fingerprint(model: Decoder) -> str:
    """Hash of names, shapes, 4,096 evenly spaced values and the sum of all values of every tensor: a base's identity.

    Of the values as bf16, so that the same model loaded in fp32 and in bf16 is the same base. The sum is that of their
    bits: one that is flipped anywhere changes it, if it moves the bf16.
    """
    told = []
    for name, w in tensors(model):
        flat = w.reshape(-1)
        total = sum(int(_bits(flat[i : i + SUMMED]).sum()) for i in range(0, len(flat), SUMMED))
        sampled = _bits(flat[:: max(1, w.numel() // SAMPLED)]).tobytes()
        told.append((name, f"{name}{tuple(w.shape)}{total}".encode() + sampled))
    return hashlib.sha256(b"".join(said for _, said in sorted(told))).hexdigest()[:32]


def _bits(values: Tensor) -> NDArray[np.uint64]:
    """The bits of values as bf16, 64 at a time."""
    halves = values.detach().to("cpu", torch.bfloat16).contiguous()
    return torch.nn.functional.pad(halves, (0, -len(halves) % 4)).view(torch.int64).numpy().view(np.uint64)


def check_seal(path: Path, fingerprint: str) -> None:
    """Compare what was loaded with what was written, where `save` wrote it.

    Raises:
        UserError: it is not the same.
    """
    if (file := path / "model.safetensors").exists():
        with safe_open(file, "pt") as opened:
            said = (opened.metadata() or {}).get(SEAL)
        if said not in (None, fingerprint):
            raise UserError("The weights of this model are damaged.", where=str(file),
                            why="They are not those that were written: their checksum does not fit.",
                            remedy=f"Remove the folder and make it anew. {CONVERTED}")  # fmt: skip


def get(owner: Any, part: str) -> Tensor:
    """The tensor that stands at this place of a layer."""
    value = getattr(owner, part)
    return value if isinstance(value, Tensor) else value.dense()


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        UserError: the file is missing or is not an object.
    """
    with explained(f"{path.name} is missing.", FileNotFoundError, where=path.parent, why="", remedy=FORMS):
        text = path.read_bytes()
    with explained("This is not JSON.", ValueError, RecursionError, where=path):
        value = json.loads(text.decode())
    if not isinstance(value, dict):
        raise UserError("This is not a JSON object.", where=str(path))
    return value


def read_config(path: Path) -> ModelConfig:
    """What a model folder or a GGUF file says of its model."""
    return GGUF(path).config() if path.is_file() else ModelConfig.from_hf(read_json(path / "config.json"), str(path))


def _places(model: Decoder) -> Iterator[tuple[str, tuple[Any, str]]]:
    """Every weight's checkpoint name (no leading `model.`), the layer that owns it and the attribute it is."""
    for name, module in model.named_modules():
        if isinstance(module, Slot) and (part := PART.get(type(module))):
            yield f"{name}.weight", (module, part)
        if isinstance(module, Linear) and module.bias is not None:
            yield f"{name}.bias", (module, "bias")


def _put(owner: Any, part: str, w: Tensor, where: str) -> None:
    shape = tuple(get(owner, part).shape)
    if tuple(w.shape) != shape:
        raise UserError(f"Shape {tuple(w.shape)} where config.json asks for {shape}.", where=where, remedy=ANEW)
    setattr(owner, part, Dense(w) if isinstance(owner, Linear) and part == "weight" else w)


def _tensors(folder: Path, apart: bool) -> Iterator[tuple[str, Tensor]]:
    """Every weight, as it lies in the file. `apart`: it alone is mapped, so that its memory is free when it is."""
    index = folder / "model.safetensors.index.json"
    mapped = read_json(index)["weight_map"].values() if index.exists() else ["model.safetensors"]
    files = sorted({folder / name for name in mapped})
    if not index.exists() and not files[0].exists():
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = next(iter([*folder.glob("*.bin"), *folder.glob("*.pt*")]), None)
        raise UserError("There are no *.safetensors files.", where=str(folder),
                        remedy=f"{pickled.name} is a pickle, which may run code: convert it first." if pickled else
                        FORMS)  # fmt: skip
    for file in files:
        with explained("This safetensors file is damaged.", SafetensorError, where=file, why="{error}.",
                       remedy="Fetch the model anew."), safe_open(file, "pt") as opened:  # fmt: skip
            for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                with safe_open(file, "pt") if apart else nullcontext(opened) as mapped:
                    yield name.removeprefix("model."), mapped.get_tensor(name)
