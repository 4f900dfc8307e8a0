"""Adapters in the format of PEFT (huggingface/peft), which most other tools read: written and read.

What adds B A is a LoRA there; what also multiplies the rows of W is a DoRA, whichever technique it comes from. A prefix
is one matrix of P rows, each with K and V of every layer.

A folder of `adapter_config.json` and `adapter_model.safetensors`. What a key of the configuration would change is done
or refused, never passed over; and a tensor that finds no layer, or a B that is all zero, is an error.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from deltaw.adapters.adapter import HEAD, Adapter
from deltaw.errors import UserError
from deltaw.files import foreign
from deltaw.files.adapters import filled
from deltaw.files.foreign import CONFIG, WEIGHTS, Said, understood
from deltaw.methods import method
from deltaw.methods.full import Whole
from deltaw.methods.lora import first
from deltaw.methods.prefix_tuning import Prefix
from deltaw.models.checkpoint import get, read_json
from deltaw.models.config import ModelConfig
from deltaw.models.decoder import Decoder
from deltaw.models.slots import PART, Affine, Linear, Slot
from deltaw.words import some

PREFIX = "base_model.model."
LENGTHS = "lora_magnitude_vector"
"""What a DoRA has beside A and B."""
PARTS = {"A.weight": "A", "B.weight": "B", "magnitude_vector": "m", "magnitude_vector.weight": "m"}
VLLM_RANK = 512
"""The largest `max_lora_rank` that vLLM takes."""
PREFIXES, PROMPTS = "PREFIX_TUNING", "prompt_embeddings"
"""What PEFT calls prefixes, and their one tensor."""


def write(adapter: Adapter, model: Decoder, base: str, folder: Path, uniform: bool = False) -> None:
    """Write the adapter so that PEFT loads it onto `base`.

    `uniform`: one rank and one scale for all layers, for readers such as vLLM that know no patterns. Ranks are filled
    up with zeros and scales multiplied into B, which changes nothing.

    Raises:
        UserError: a delta is not plain low rank, or `uniform` and there is more than the linear layers of the blocks;
            or a prefix is attended to apart.
        Diverged: a weight is not finite.
    """
    prefixes = [delta for _, delta in adapter.named_deltas() if isinstance(delta, Prefix)]
    if len(prefixes) == len(list(adapter.named_deltas())):
        if uniform:
            raise UserError("vLLM loads no prefix.", remedy="Take --to peft.")
        _write_prefixes(prefixes, model, base, folder)
        return
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    saved: list[str] = []
    names = {name: delta for name, delta in adapter.named_deltas() if delta.lasting}
    forms = {name: form if isinstance(form, Affine) else None for name, form in adapter.forms().items()}
    most = max((len(form.A_RI) for form in forms.values() if form is not None), default=0)
    gains = any(form is not None and form.gain_O is not None for form in forms.values())
    if uniform:
        _refuse_for_vllm(names, most, gains)
    for name, delta in names.items():
        key = PREFIX + _hf(name)
        if isinstance(delta, Whole):
            tensors[f"{key}.weight"] = delta.value
            saved.append(name)
            continue
        form = _known(forms[name], name)
        if gains:
            form, tensors[f"{key}.{LENGTHS}"] = _directed(form, model.get_submodule(name))
        A_RI, B_OR, rank = form.A_RI, form.B_OR, len(form.A_RI)
        if uniform:
            A_RI, B_OR, rank = pad(A_RI, (0, 0, 0, most - rank)), pad(form.scale * B_OR, (0, most - rank)), most
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = A_RI, B_OR
        ranks[name], alphas[name] = rank, rank if uniform else form.scale * rank
    if not ranks:
        raise UserError("There is nothing of low rank in this adapter.", remedy="Merge it: deltaw merge.")
    tied = model.lm_head is None and "embed_tokens" in saved and names["embed_tokens"].heads
    if tied:  # PEFT wants the shared matrix twice
        tensors[f"{PREFIX}lm_head.weight"] = tensors[f"{PREFIX}{_hf('embed_tokens')}.weight"].clone()
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    config = {
        "r": rank, "lora_alpha": _whole(alpha), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": gains, "target_modules": _short(list(ranks), model),
        "rank_pattern": {_hf(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {_hf(n): _whole(a) for n, a in alphas.items() if a != alpha},
        "modules_to_save": [*map(_hf, saved), *(["lm_head"] if tied else [])] or None, "ensure_weight_tying": tied,
    }  # fmt: skip
    foreign.write(folder, "LORA", base, config, tensors)


def _write_prefixes(prefixes: Sequence[Prefix], model: Decoder, base: str, folder: Path) -> None:
    if not all(prefix.before for prefix in prefixes):
        raise UserError("PEFT knows no prefix behind a gate.", remedy="Train without --gate to go there.")
    rows_PX = torch.stack([torch.stack(prefix.pair(), 1) for prefix in prefixes], 1).flatten(1)
    config = {**_shape(model.config, len(rows_PX)), "prefix_projection": False}
    foreign.write(folder, PREFIXES, base, config, {PROMPTS: rows_PX})


def _shape(c: ModelConfig, tokens: int) -> dict[str, int]:
    width = c.kv_heads * c.head_width
    return {"num_virtual_tokens": tokens, "num_layers": c.layers, "num_attention_heads": c.kv_heads,
            "token_dim": width, "encoder_hidden_size": width, "num_transformer_submodules": 1}  # fmt: skip


def _known(form: Affine | None, name: str) -> Affine:
    """The form, if PEFT has it: without a bias, and without a row that is switched off.

    Raises:
        UserError: it has not.
    """
    if form is None or form.bias_O is not None or (form.gain_O is not None and not form.gain_O.all()):
        raise UserError(f"The adapter does more at {name} than PEFT's LoRA can.", remedy="Merge it: deltaw merge.")
    return form


@torch.no_grad()
def _directed(form: Affine, slot: Any) -> tuple[Affine, Tensor]:
    """The form g * W + s B A as m / |W + s B' A| * (W + s B' A), lengths taken by row: with B' = B / g, and m."""
    gain_O = torch.ones(len(form.B_OR), device=form.B_OR.device) if form.gain_O is None else form.gain_O
    B_OR = form.B_OR / gain_O[:, None]
    w_OI = torch.addmm(slot.weight.dense().float(), B_OR, form.A_RI, alpha=form.scale)
    return form._replace(B_OR=B_OR, gain_O=None), gain_O * w_OI.square().sum(1).sqrt()


def _refuse_for_vllm(names: Mapping[str, Any], most: int, gains: bool) -> None:
    """What vLLM would leave out or not load (its `PEFTHelper` and `max_lora_rank`)."""
    if gains:
        raise UserError("vLLM loads no DoRA.", remedy="Take deltaw merge.")
    if whole := next((name for name, delta in names.items() if isinstance(delta, Whole)), None):
        raise UserError(f"vLLM loads no layers that were trained whole, such as {whole}.", remedy="Take deltaw merge.")
    if "lm_head" in names:
        raise UserError("vLLM loads no LoRA of the head.", remedy="Take deltaw merge, or train without lm_head.")
    if most > VLLM_RANK:
        raise UserError(f"vLLM loads ranks up to {VLLM_RANK}, and this adapter has {most}.",
                        remedy="Take deltaw merge.")  # fmt: skip


def read(folder: Path, model: Decoder) -> Adapter:
    """Build the LoRA or prefix that a folder of PEFT, or of mlx-lm, holds on `model`.

    Raises:
        UserError: no such folder, a pickle, something that is no plain LoRA, or tensors that do not fit the model.
    """
    if (folder / CONFIG).is_file() and (told := read_json(folder / CONFIG)).get("peft_type") == PREFIXES:
        return _read_prefixes(told, foreign.stored(folder / WEIGHTS), model, folder)
    config, tensors = understood(folder)
    slots = {name: slot for name, slot in model.named_modules() if isinstance(slot, Slot)}
    low, whole = _sorted(tensors, model, slots, config.modules_to_save, str(folder))
    _check(low, whole, "ABm" if config.use_dora else "AB", str(folder))
    _missing(config, slots, {*low, *whole}, folder)
    ranks = {name: len(pair["A"]) for name, pair in low.items()}
    rank = mode(ranks.values())
    # PEFT's rule: the first key that the end of a layer's name matches.
    alpha_of = {name: first(config.alpha_pattern, _hf(name), config.lora_alpha) for name in low}
    told_rank = {name: first(config.rank_pattern, _hf(name), config.r) for name in low}
    if odd := next((name for name in low if told_rank[name] != ranks[name]), None):
        raise UserError(f"{CONFIG} says rank {told_rank[odd]} of {odd}, and its A has {ranks[odd]} rows.",
                        where=str(folder), why="The configuration and the tensors are of two adapters.")  # fmt: skip
    alpha = mode(alpha_of.values())
    tied = model.lm_head is not None or "embed_tokens" not in whole or config.ensure_weight_tying
    targets = ",".join(name.removeprefix("model.") for name in _short(list(low), model))
    lora = method(
        "dora" if config.use_dora else "lora", str(folder), targets=targets, rank=rank, alpha=float(alpha),
        rslora=config.use_rslora, dropout=config.lora_dropout,
        rank_pattern={re.escape(n): r for n, r in ranks.items() if r != rank},
        alpha_pattern={re.escape(n): float(a) for n, a in alpha_of.items() if a != alpha},
        modules_to_save=",".join(whole), ensure_weight_tying=tied,
    )  # fmt: skip
    parts = {f"{n}.{part}": t for n, pair in low.items() for part, t in pair.items()}
    return filled(lora, model, parts | {f"{n}.value": t for n, t in whole.items()}, str(folder))


def _read_prefixes(told: Mapping[str, Any], tensors: Mapping[str, Tensor], model: Decoder, folder: Path) -> Adapter:
    c, t = model.config, tensors.get(PROMPTS)
    if t is None or len(tensors) > 1 or t.ndim != 2:
        raise UserError(f"A prefix is one tensor, '{PROMPTS}'.", where=str(folder / WEIGHTS),
                        why=f"There are: {', '.join(tensors)[:100] or 'none'}.")  # fmt: skip
    own = _shape(c, len(t))
    if t.shape[1] != (values := 2 * c.layers * own["token_dim"]):
        raise UserError("This prefix was made for another model.", where=str(folder),
                        why=f"It has {t.shape[1]:,} values a token, and this model takes {values:,}.")  # fmt: skip
    if odd := next((key for key in own if told.get(key, own[key]) != own[key]), None):
        raise UserError(f"{CONFIG} says {told[odd]} as {odd}, and it is {own[odd]} here.", where=str(folder))
    chosen = method("prefix_tuning", str(folder), tokens=len(t))
    parts_PL2KE = t.float().view(len(t), c.layers, 2, c.kv_heads, c.head_width)
    parts = {f"{site.name}.{part}": parts_PL2KE[:, i, j].contiguous()
             for i, site in enumerate(chosen.sites(model)) for j, part in enumerate("kv")}  # fmt: skip
    return filled(chosen, model, parts, str(folder))


def _missing(config: Said, slots: Mapping[str, Slot], there: set[str], folder: Path) -> None:
    """See that every name in the configuration that fits layers of the model has tensors of one."""
    lists = [n for n in (config.target_modules, config.modules_to_save) if isinstance(n, list)]
    for name in (name for names in lists for name in names):
        fitting = {layer for layer in slots if f".{_hf(layer)}".endswith(f".{name}")}
        if name != HEAD and fitting and not fitting & there:
            raise UserError(f"{CONFIG} names '{name}', and there is no tensor for it.", where=str(folder))


def _sorted(tensors: Mapping[str, Tensor], model: Decoder, slots: Mapping[str, Slot], saved: Sequence[str], where: str
            ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:  # fmt: skip
    """Pairs of A and B by layer, and tensors that replace a layer's own."""
    low: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    cold = []
    for key, t in tensors.items():
        module, _, kind = key.removeprefix(PREFIX).removeprefix("model.").partition(".lora_")
        name = module.removesuffix(".weight").removesuffix(".base_layer")
        part = PARTS.get(kind)
        if name in whole or part in low.get(name, {}):
            raise UserError(f"{name} is there twice, as '{key}' too.", where=where)
        if part is not None and isinstance(slots.get(name), Linear):
            low.setdefault(name, {})[part] = t.float()
        elif not kind and type(slots.get(name)) in PART:
            own = get(slots[name], PART[type(slots[name])])
            # PEFT also stores embeddings that were not trained.
            if any(f".{_hf(name)}".endswith(f".{module}") for module in saved) or not _same(own, t):
                whole[name] = t.float()
        elif not kind and name == HEAD and model.lm_head is None and _shared(t, tensors, model):
            continue  # the shared matrix a second time
        else:
            cold.append(key)
    if cold:
        raise UserError(f"The base has no layer for {some(len(cold), 'tensor')} of this adapter, such as '{cold[0]}'.",
                        where=where, why=f"All of them: {', '.join(cold)}." if cold[1:] else "",
                        remedy="Take the base that it was trained on: --base.")  # fmt: skip
    return low, whole


def _check(low: Mapping[str, Mapping[str, Tensor]], whole: Mapping[str, Tensor], parts: str, where: str) -> None:
    if odd := next((name for name, own in low.items() if {*own} != {*parts}), None):
        raise UserError(f"{odd} has {' and '.join(sorted(low[odd]))} in place of {' and '.join(parts)}.", where=where)
    if both := low.keys() & whole.keys():
        raise UserError(f"{min(both)} has both a LoRA and weights of its own, other than the base's.", where=where,
                        why="The vocabulary was enlarged, or it was trained on another base.")  # fmt: skip
    if not low:
        raise UserError("There are no LoRA matrices in this adapter.", where=where)
    if dead := [name for name, pair in low.items() if "m" not in pair and not pair["B"].any()]:
        raise UserError(f"B is all zero at {len(dead)} of {len(low)} layers, such as {dead[0]}: it does nothing there.",
                        where=where, why="It was not trained, or not saved as it was.")  # fmt: skip


def _shared(head_VD: Tensor, tensors: Mapping[str, Tensor], model: Decoder) -> bool:
    """Whether a head's matrix is that of the embedding, as it was trained or as it is in the base."""
    trained = next((t for key, t in tensors.items() if key.endswith("embed_tokens.weight")), None)
    return _same(model.embed_tokens.table if trained is None else trained, head_VD)


def _same(own: Tensor, t: Tensor) -> bool:
    return own.shape == t.shape and bool((own == t.to(own.device, own.dtype)).all())


def _short(names: list[str], model: Decoder) -> list[str]:
    """The layers by the last parts of their names where those say enough, else by their whole names."""
    short = {name.rsplit(".", 1)[-1] for name in names}
    every = [n for n, slot in model.named_modules() if isinstance(slot, Linear) and n.rsplit(".", 1)[-1] in short]
    return sorted(short) if sorted(every) == sorted(names) else [_hf(name) for name in names]


def _hf(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number
