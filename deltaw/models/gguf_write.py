"""Write a model and its tokenizer as one GGUF file, for llama.cpp and what is built on it; the inverse of `gguf.py`."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltaw.errors import UserError
from deltaw.kernels.packed import unpack
from deltaw.models import checkpoint
from deltaw.models.config import ModelConfig
from deltaw.models.decoder import Decoder
from deltaw.models.gguf import GGUF, SIZES, names, ordered
from deltaw.models.rope import Llama3, plain
from deltaw.models.tokenizer import Tokenizer
from deltaw.weights.grid import Grid, Gridded

GRID = "Q4_1"
"""The packing of llama.cpp whose numbers are those of our int4-g32."""
FINER, VOCABULARY = {GRID: "Q8_0"}, ("token_embd.weight", "output.weight")
"""How the matrices of the vocabulary are packed where the layers' are in four bits: those would lose most."""
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's kinds of token."""
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (CONTRACTIONS + r"\p{N}" + REST, "ByteLevel"): "qwen2",
    (CONTRACTIONS + r"\p{N}{1,3}" + REST, "ByteLevel"): "llama-bpe",
}
"""How a byte-level tokenizer cuts text into words, and llama.cpp's name for it."""


def write(model: Decoder, tokenizer: Tokenizer, path: Path, packing: str, name: str) -> tuple[str, ...]:
    """Write matrices in `packing`, all else in fp32; returns what will not be quite as it is here.

    Raises:
        UserError: llama.cpp does not know the tokenizer, or has no word for something in the model.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    config, arch = model.config, model.config.family.gguf
    if arch != "llama" and (config.o_bias or config.mlp_bias):
        raise UserError(f"llama.cpp has no place for such biases in a {config.family.name} model.",
                        remedy="Train without them: --c none --e none.")  # fmt: skip
    told = {"general.name": name} | {f"{arch}.{key}": value for key, value in metadata(config).items()}
    told |= {f"tokenizer.{key}": value for key, value in vocabulary(tokenizer, config.vocab).items()}
    unpacked, exact = 0, gridded(model) if packing == GRID else {}
    with _written(path, arch, told) as writer:
        for key, w in tensors(model):
            if key in exact:
                writer.add_tensor(key, blocks(*exact[key], config), raw_dtype=GGMLQuantizationType[packing])
                continue
            kept = FINER.get(packing, packing) if key in VOCABULARY else packing
            kind = GGMLQuantizationType[kept if w.ndim > 1 else "F32"]
            if w.shape[-1] % GGML_QUANT_SIZES[kind][0]:  # rows are no multiple of the packing's block
                kind, unpacked = GGMLQuantizationType.F16, unpacked + 1
            writer.add_tensor(key, quantize(w.numpy(), kind), raw_dtype=kind)
    read = GGUF(path).config()
    odd = [f.name for f in fields(config) if f.name != "family" and getattr(read, f.name) != getattr(config, f.name)]
    if odd:  # what the file cannot say, llama.cpp would compute otherwise
        path.unlink()
        raise UserError(f"A GGUF file cannot say what this model has: {', '.join(odd)}.",
                        why=f"It would be read as {getattr(read, odd[0])} for {getattr(config, odd[0])}.")  # fmt: skip
    notices = [f"{unpacked} matrices are F16: their rows cannot be cut into blocks of {packing}."] if unpacked else []
    if config.windows and config.family.fused:
        notices.append(f"llama.cpp leaves out Phi-3's window of {max(config.windows):,} tokens: longer texts differ.")
    return tuple(notices)


def write_lora(pairs: Mapping[str, tuple[Tensor, Tensor]], config: ModelConfig, path: Path, name: str) -> None:
    """Write A and B (scaled) of layers as a LoRA file that llama.cpp puts onto the base's GGUF file, in fp32."""
    # No alpha: B holds the scale.
    told = {"general.type": "adapter", "general.name": name, "adapter.type": "lora", "adapter.lora.alpha": 0.0}
    with _written(path, config.family.gguf, told) as writer:
        for layer, (A_RI, B_OR) in pairs.items():
            key = gguf_name(f"{layer}.weight", config)
            writer.add_tensor(f"{key}.lora_a", A_RI.float().cpu().numpy())
            writer.add_tensor(f"{key}.lora_b", ordered(f"{layer}.weight", B_OR.float().cpu(), config).numpy())


@contextmanager
def _written(path: Path, arch: str, told: Mapping[str, Any]) -> Iterator[Any]:
    """A writer to add tensors to, whose file says this of itself; it is written when the block ends."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(str(path), arch, use_temp_file=True)
    for key, value in told.items():
        # llama.cpp's whole numbers have no sign.
        writer.add_key_value(key, value, GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value))
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """GGUF's names and fp32 weights, in the order and with the additions that llama.cpp expects."""
    config = model.config
    for name, w in checkpoint.tensors(model):
        yield gguf_name(name, config), ordered(name, w.float().cpu(), config)
    if isinstance(config.rope.scaling, Llama3):
        like = torch.zeros(1, 1)
        stretched = config.rope.scaling.frequencies(config.rope.theta, config.rope.width, like)
        yield "rope_freqs.weight", plain(config.rope.theta, config.rope.width, like) / stretched


def gridded(model: Decoder) -> dict[str, tuple[str, Gridded]]:
    """The matrices that lie as Q4_1 has them, and their names here, by GGUF's."""
    return {gguf_name(f"{name}.weight", model.config): (f"{name}.weight", slot.weight)
            for name, slot in checkpoint.linears(model) if isinstance(slot.weight, Gridded)
            and slot.weight.form in (Grid(4, 32), Grid(4, 32, moved=True))}  # fmt: skip


def on_grid(model: Decoder) -> bool:
    """Whether all packed matrices lie as Q4_1 has them."""
    return len(gridded(model)) == len(checkpoint.forms_of(model)) > 0


def blocks(name: str, weight: Gridded, config: ModelConfig) -> NDArray[np.uint8]:
    """The very codes of a matrix in llama.cpp's blocks of 20 bytes; wider offsets are rounded to 16 bits.

    A block is a scale, an offset, and 16 bytes whose lower halves are its first sixteen codes.
    """
    (o, i), cpu = weight.shape, weight.codes.cpu()
    codes = ordered(name, unpack(cpu, 4, o * i).view(o, i), config).view(o, -1, 2, 16)
    scale, offset = (ordered(name, t.cpu().half(), config)[..., None].view(torch.uint8)
                     for t in (weight.scale, weight.offset))  # fmt: skip
    return torch.cat([scale, offset, codes[:, :, 0] | codes[:, :, 1] << 4], 2).view(o, -1).numpy()


def gguf_name(name: str, config: ModelConfig) -> str:
    """GGUF's name of a checkpoint's tensor."""
    words = {ours: word for word, ours in names(config.family).items()}
    layer, _, rest = name.removeprefix("layers.").partition(".") if name.startswith("layers.") else ("", "", name)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{words[module]}.{kind}" if layer else f"{words[module]}.{kind}"


def metadata(config: ModelConfig) -> dict[str, Any]:
    """Sizes and constants, without the architecture's name before them."""
    hf, rope = config.to_hf(), config.rope.to_hf(config.head_width)
    told = {SIZES[key]: hf[key] for key in SIZES if hf.get(key) is not None}
    told |= {"attention.value_length": config.head_width, "rope.dimension_count": config.rope.width}
    if rope["rope_type"] in ("linear", "yarn"):
        told |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        told["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return told


def vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The tokenizer, as llama.cpp's two kinds: byte-level merges, or SentencePiece's scores.

    Raises:
        UserError: it is neither, or cuts text into words in a way that llama.cpp has no name for.
    """
    said = json.loads(tokenizer.fast.to_str())
    model = said["model"]
    if model["type"] != "BPE":
        raise UserError(f"llama.cpp's tokenizers are BPE; this one is {model['type']}.")
    if not model["merges"]:
        raise UserError("This tokenizer has no merges, without which llama.cpp reads none.",
                        remedy="Take --to peft, or deltaw merge.")  # fmt: skip
    tokens = {i: token for token, i in model["vocab"].items()}
    kinds = {i: BYTE if token.startswith("<0x") and model.get("byte_fallback") else NORMAL
             for i, token in tokens.items()}  # fmt: skip
    for added in said["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER
    if (unknown := model["vocab"].get(model.get("unk_token"))) is not None:
        kinds[unknown] = UNKNOWN
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    told: dict[str, Any] = {
        "ggml.tokens": [tokens.get(i, f"[PAD{i}]") for i in range(rows)],
        "ggml.token_type": [kinds.get(i, UNUSED) for i in range(rows)],
        "chat_template": tokenizer.template,
    }
    ids = {name: tokenizer.fast.token_to_id(token) for name, token in tokenizer.specials.items()}
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        told[f"ggml.{theirs}_token_id"] = ids.get(f"{ours}_token")
    if others := sorted(tokenizer.end_ids - {ids.get("eos_token")}):
        told["ggml.eot_token_id"] = others[0]
    told["ggml.add_bos_token"] = bool(tokenizer.begin_ids)
    if model.get("byte_fallback"):
        rank = {merge.replace(" ", ""): i for i, merge in reversed(list(enumerate(merges)))}
        scores = [-float(rank.get(tokens.get(i, ""), len(rank))) for i in range(rows)]
        told |= {"ggml.model": "llama", "ggml.scores": scores}
    else:
        told |= {"ggml.model": "gpt2", "ggml.pre": _words(said["pre_tokenizer"]), "ggml.merges": merges}
    return {key: value for key, value in told.items() if value not in (None, "", [])}


def _words(pre: Mapping[str, Any] | None) -> str:
    steps = [] if pre is None else pre.get("pretokenizers", [pre])
    cuts = tuple(s["pattern"].get("Regex", "") if s["type"] == "Split" else s["type"] for s in steps)
    if cuts not in WORDS:
        raise UserError("llama.cpp has no name for how this tokenizer cuts text into words.", why=f"Its cuts: {cuts}.")
    return WORDS[cuts]
