"""Packed matrices in a model folder: under names of our own, or as bitsandbytes and transformers write and read them.

Ours are `layers.0.mlp.up_proj.weight.codes` and so on, and config.json names the format; bitsandbytes' hold the codes
under the matrix's own name, and what they mean beside it.
"""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from deltaw.errors import UserError
from deltaw.weights import Format, Packed
from deltaw.weights.codebook import Codebook, Double, Plain, dynamic
from deltaw.weights.formats import parse

KEY, OURS, THEIRS = "quantization_config", "deltaw", "bitsandbytes"
STATE = "quant_state.bitsandbytes__"
BLOCKS = [1 << i for i in range(5, 13)]
"""The sizes of blocks that bitsandbytes has."""
SCALES = {False: {".absmax": "absmax"}, True: {".absmax": "codes2", ".nested_absmax": "absmax2"}}
"""Their names of scales, and ours: of plain ones, and of scales that are packed too."""
ITS_OWN = ""
"""The part of a packed matrix that stands under the matrix's own name."""


def usual(forms: Mapping[str, Format]) -> Format | None:
    """The format that most layers have; None: none is packed."""
    return Counter(forms.values()).most_common(1)[0][0] if forms else None


def said(forms: Mapping[str, Format], dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of how these layers are stored; matrices of bitsandbytes also say it themselves."""
    form = usual(forms)
    if form is None:
        return {}
    if not is_theirs(form) or not all(map(is_theirs, forms.values())):
        others = {name: str(other) for name, other in forms.items() if other != form}
        return {KEY: {"quant_method": OURS, "format": str(form), "others": others}}
    kind, nested = ("fp4" if form.fp4 else "nf4"), isinstance(form.scales, Double)
    return {KEY: {"quant_method": THEIRS, "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": kind,
                  "bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": "uint8",
                  "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}}  # fmt: skip


def is_theirs(form: Format) -> TypeGuard[Codebook]:
    """Whether bitsandbytes has this format."""
    return (isinstance(form, Codebook) and form.width == 4 and form.block in BLOCKS
            and isinstance(form.scales, Plain | Double))  # fmt: skip


def read_formats(config: Mapping[str, Any], where: Path) -> tuple[Format | None, dict[str, Format]]:
    """The format of a folder's matrices, if config.json names one of ours, and those of layers that have another.

    Raises:
        UserError: they are packed in a way that is not read here.
    """
    told = config.get(KEY) or {}
    if not isinstance(told, dict):
        raise UserError(f"'{KEY}' is no JSON object.", where=str(where))
    if (how := told.get("quant_method")) == OURS:
        others = told.get("others") or {}
        if not isinstance(others, dict):
            raise UserError(f"'others' in '{KEY}' is no JSON object.", where=str(where))
        return parse(str(told.get("format"))), {name: parse(str(form)) for name, form in others.items()}
    if how is not None and (how != THEIRS or not told.get("load_in_4bit")):
        raise UserError(f"The weights are packed by {how}, which is not read here.", where=str(where),
                        remedy="Take the original model, and --base-format nf4.")  # fmt: skip
    return None, {}


def parts(weight: Packed) -> dict[str, Tensor]:
    """A packed matrix's tensors, by the end of their names in the file."""
    form, kept = weight.form, weight.kept
    if not is_theirs(form):
        return {f".{name}": t for name, t in kept.items()}
    kind = "fp4" if form.fp4 else "nf4"
    state: dict[str, Any] = {"quant_type": kind, "blocksize": form.block, "shape": list(weight.shape),
                             "dtype": str(weight.dtype).removeprefix("torch.")}  # fmt: skip
    nested = isinstance(form.scales, Double)
    more = {theirs: kept[ours] for theirs, ours in SCALES[nested].items()}
    if nested:
        more[".nested_quant_map"] = dynamic().clone()
        state |= {"nested_blocksize": Double.BLOCK, "nested_dtype": "float32", "nested_offset": kept["mean"].item()}
    told = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    levels = form.levels(torch.device("cpu")).clone()
    return {ITS_OWN: kept["codes"][:, None], **more, ".quant_map": levels, f".{STATE}{kind}": told}


def weight_of(found: Mapping[str, Tensor], form: Format | None, shape: tuple[int, int], dtype: torch.dtype,
              where: str) -> Packed:  # fmt: skip
    """The packed matrix of these tensors, named as by `parts`.

    Raises:
        UserError: they are not what the format has, or of another size.
    """
    theirs = next((end for end in found if end.startswith(f".{STATE}")), None)
    with suppress(AssertionError, LookupError, ValueError, TypeError, RuntimeError, UserError):
        if theirs is None:
            assert form is not None
            kept = {end.removeprefix("."): t for end, t in found.items()}
        else:
            form, kept = _from_theirs(found, json.loads(bytes(found[theirs].tolist())), shape)
        weight = form.load(shape, dtype, kept)
        if isinstance(weight, Packed) and _as_packed(weight) and bool(weight.dense().isfinite().all()):
            return weight
    raise UserError("A packed matrix is not what it is said to be.", where=where, remedy="Fetch the model anew.")


def _as_packed(weight: Packed) -> bool:
    """Whether every part has the shape and type that packing gives: native code reads as far as they say."""
    wanted = weight.form.pack(torch.empty(weight.shape, device="meta"), weight.dtype)
    parts = ({name: (t.shape, t.dtype) for name, t in w.named_buffers()} for w in (weight, wanted))
    return next(parts) == next(parts) and all(t.is_contiguous() for t in weight.buffers())


def _from_theirs(found: Mapping[str, Tensor], state: Mapping[str, Any], shape: tuple[int, int]
                 ) -> tuple[Format, dict[str, Tensor]]:  # fmt: skip
    nested = "nested_offset" in state
    form = Codebook(4, state["blocksize"], Double() if nested else Plain(), state["quant_type"] == "fp4")
    if (state["blocksize"] not in BLOCKS or tuple(state["shape"]) != shape
            or state.get("nested_blocksize", Double.BLOCK) != Double.BLOCK
            or not torch.equal(found[".quant_map"].float(), form.levels(torch.device("cpu")))
            or (nested and not torch.equal(found[".nested_quant_map"].float(), dynamic()))):  # fmt: skip
        raise ValueError("another block, shape or table")
    mean = {"mean": torch.tensor([state["nested_offset"]])} if nested else {}
    scales = {ours: found[theirs] for theirs, ours in SCALES[nested].items()}
    return form, {"codes": found[ITS_OWN].flatten(), **scales, **mean}
