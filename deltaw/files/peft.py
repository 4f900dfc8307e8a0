"""Adapters in the format of PEFT (huggingface/peft), which most other tools read: written and read.

A folder of `adapter_config.json` and `adapter_model.safetensors`. What a key of the configuration would change is done
or refused, never passed over; and a tensor that finds no layer, or a B that is all zero, is an error.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad

from deltaw.adapters.adapter import Adapter
from deltaw.adapters.whole import PART, Whole
from deltaw.errors import UserError
from deltaw.files.adapters import put, refuse_nan
from deltaw.files.atomic import replacing, write_text
from deltaw.methods import method
from deltaw.models.checkpoint import get, read_json
from deltaw.models.decoder import Decoder
from deltaw.models.slots import Linear, Slot

PREFIX = "base_model.model."
CONFIG, WEIGHTS, MLX_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
CHANGES = {
    "use_dora": "it is a DoRA", "lora_bias": "B has a bias", "fan_in_fan_out": "its matrices are transposed",
    "trainable_token_indices": "single tokens were trained", "layer_replication": "layers are repeated",
    "target_parameters": "bare parameters are adapted", "alora_invocation_tokens": "it is switched on by tokens",
    "use_bdlora": "it is block-diagonal", "kasa_config": "it is a KaSA", "monteclora_config": "it is sampled",
    "arrow_config": "it routes between adapters", "use_qalora": "it is a QA-LoRA", "corda_config": "it is a CorDA",
}  # fmt: skip
"""Keys under which an adapter is no plain LoRA, and what they say."""
VLLM_RANK = 512
"""The largest `max_lora_rank` that vLLM takes."""
MOVED = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Ways to begin that changed the base: the tensors are no LoRA of the base as it was."""


def write(adapter: Adapter, model: Decoder, base: str, folder: Path, uniform: bool = False) -> None:
    """Write the adapter so that PEFT loads it onto `base`.

    `uniform`: one rank and one scale for all layers, for readers such as vLLM that know no patterns. Ranks are filled
    up with zeros and scales multiplied into B, which changes nothing.

    Raises:
        UserError: a delta is not plain low rank, or `uniform` and there is more than the linear layers of the blocks.
        Diverged: a weight is not finite.
    """
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    saved: list[str] = []
    names = dict(adapter.named_deltas())
    most = max((len(f.A_RI) for slot, d in adapter.items() if (f := d.served(slot)) is not None), default=0)
    if uniform:
        _refuse_for_vllm(names, most)
    for (slot, delta), name in zip(adapter.items(), names, strict=True):
        key = PREFIX + _hf(name)
        if isinstance(delta, Whole):
            tensors[f"{key}.weight"] = delta.value
            saved.append(name)
            continue
        form = delta.served(slot)
        if form is None or form.gain_O is not None or form.bias_O is not None:
            raise UserError(f"The adapter does more at {name} than PEFT's LoRA can.",
                            remedy="Merge it: deltaw merge.")  # fmt: skip
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
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": _whole(alpha), "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "target_modules": _short(list(ranks), model),
        "rank_pattern": {_hf(n): r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {_hf(n): _whole(a) for n, a in alphas.items() if a != alpha},
        "modules_to_save": [*map(_hf, saved), *(["lm_head"] if tied else [])] or None, "ensure_weight_tying": tied,
    }  # fmt: skip
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    refuse_nan(tensors)
    with replacing(folder / WEIGHTS) as scratch:
        save_file(tensors, scratch, metadata={"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def _refuse_for_vllm(names: Mapping[str, Any], most: int) -> None:
    """What vLLM would leave out or not load (its `PEFTHelper` and `max_lora_rank`)."""
    if whole := next((name for name, delta in names.items() if isinstance(delta, Whole)), None):
        raise UserError(f"vLLM loads no layers that were trained whole, such as {whole}.", remedy="Take deltaw merge.")
    if "lm_head" in names:
        raise UserError("vLLM loads no LoRA of the head.", remedy="Take deltaw merge, or train without lm_head.")
    if most > VLLM_RANK:
        raise UserError(
            f"vLLM loads ranks up to {VLLM_RANK}, and this adapter has {most}.", remedy="Take deltaw merge."
        )


def read(folder: Path, model: Decoder) -> Adapter:
    """Build the LoRA that a folder of PEFT, or of mlx-lm, holds on `model`.

    Raises:
        UserError: no such folder, a pickle, something that is no plain LoRA, or tensors that do not fit the model.
    """
    config = read_json(folder / CONFIG)
    if "fine_tune_type" in config or "lora_parameters" in config:
        config, tensors = _from_mlx(config, folder)
    else:
        _refuse(config, folder)
        tensors = _tensors(folder / WEIGHTS)
    low, whole = _sorted(tensors, model, str(folder))
    ranks = {name: len(pair["A"]) for name, pair in low.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha_of = {name: _pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)) for name in low}
    told_rank = {name: _pattern(config.get("rank_pattern"), name, config.get("r", 8)) for name in low}
    if odd := next((name for name in low if told_rank[name] != ranks[name]), None):
        raise UserError(f"{CONFIG} says rank {told_rank[odd]} of {odd}, and its A has {ranks[odd]} rows.",
                        where=str(folder))  # fmt: skip
    alpha = Counter(alpha_of.values()).most_common(1)[0][0]
    tied = model.lm_head is not None or "embed_tokens" not in whole or bool(config.get("ensure_weight_tying"))
    targets = ",".join(name.removeprefix("model.") for name in _short(list(low), model))
    lora = method(
        "lora", str(folder), targets=targets, rank=rank, alpha=float(alpha),
        rslora=bool(config.get("use_rslora")), dropout=float(config.get("lora_dropout") or 0),
        rank_pattern={re.escape(n): r for n, r in ranks.items() if r != rank},
        alpha_pattern={re.escape(n): float(a) for n, a in alpha_of.items() if a != alpha},
        modules_to_save=",".join(whole), ensure_weight_tying=tied,
    )  # fmt: skip
    adapter = Adapter.build(lora, model).to(model.device)
    put(adapter, {**{f"{n}.{part}": t for n, pair in low.items() for part, t in pair.items()},
                  **{f"{n}.value": t for n, t in whole.items()}}, str(folder))  # fmt: skip
    return adapter.eval()


def _refuse(config: Mapping[str, Any], folder: Path) -> None:
    kind = str(config.get("peft_type", "LORA"))
    init = config.get("init_lora_weights")
    why = next((said for key, said in CHANGES.items() if config.get(key)), None)
    if kind != "LORA":
        raise UserError(f"This is a {kind} adapter; LoRA is what can be imported.", where=str(folder))
    if config.get("bias", "none") != "none":
        why = "biases of the base were trained"
    if isinstance(init, str) and init.lower().startswith(MOVED):
        why = f"it began by {init}, which changed the base"
    if why:
        raise UserError("This adapter is no plain LoRA.", where=str(folder / CONFIG), why=f"{why.capitalize()}.",
                        remedy="Merge it with PEFT, or convert it to a plain LoRA there.")  # fmt: skip


def _from_mlx(told: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What mlx-lm wrote, in PEFT's terms: its matrices are transposed, and its scale is no alpha / rank."""
    if (kind := str(told.get("fine_tune_type", "lora"))) != "lora":
        raise UserError(f"This is a '{kind}' adapter of mlx-lm; LoRA is what can be imported.", where=str(folder))
    stored = _tensors(folder / MLX_WEIGHTS)
    tensors = {re.sub(r"lora_([ab])$", lambda m: f"lora_{m[1].upper()}.weight", name): t.t() if ".lora_" in name else t
               for name, t in stored.items()}  # fmt: skip
    ranks = {name.removesuffix(".lora_A.weight"): len(t) for name, t in tensors.items() if "lora_A" in name}
    scale = float(told.get("lora_parameters", {}).get("scale", 1.0))
    config = {"r": next(iter(ranks.values()), 0), "rank_pattern": {re.escape(n): r for n, r in ranks.items()},
              "lora_alpha": 0, "alpha_pattern": {re.escape(n): scale * r for n, r in ranks.items()},
              "ensure_weight_tying": True}  # fmt: skip
    return config, tensors


def _tensors(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        pickled = (file.parent / "adapter_model.bin").exists()
        raise UserError(f"{file.name} is missing.", where=str(file.parent),
                        why="adapter_model.bin is a pickle, which may run code." if pickled else "",
                        remedy="Save the adapter again with safetensors." if pickled else "")  # fmt: skip
    try:
        tensors: dict[str, Tensor] = load_file(file)
        return tensors
    except (SafetensorError, OSError) as e:
        raise UserError("The adapter file is damaged.", where=str(file), why=str(e)) from None


def _sorted(
    tensors: Mapping[str, Tensor], model: Decoder, where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Pairs of A and B by layer, and tensors that replace a layer's own."""
    slots = {name: slot for name, slot in model.named_modules() if isinstance(slot, Slot)}
    low: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    cold = []
    for key, t in tensors.items():
        module, _, kind = key.removeprefix(PREFIX).removeprefix("model.").partition(".lora_")
        name = module.removesuffix(".weight").removesuffix(".base_layer")
        if kind in ("A.weight", "B.weight") and isinstance(slots.get(name), Linear):
            low.setdefault(name, {})[kind[0]] = t.float()
        elif not kind and type(slots.get(name)) in PART:
            if not _same(
                get(slots[name], PART[type(slots[name])]), t
            ):  # PEFT stores embeddings beside it, trained or not
                whole[name] = t.float()
        elif not kind and name == "lm_head" and model.lm_head is None:
            continue  # the shared matrix a second time
        else:
            cold.append(key)
    if cold:
        raise UserError(f"{len(cold)} tensors of this adapter belong to no layer of the base, such as '{cold[0]}'.",
                        where=where, remedy="Take the base that it was trained on: --base.")  # fmt: skip
    _check(low, whole, where)
    return low, whole


def _check(low: Mapping[str, Mapping[str, Tensor]], whole: Mapping[str, Tensor], where: str) -> None:
    if halved := next((name for name, pair in low.items() if len(pair) != 2), None):
        raise UserError(f"{halved} has only one of A and B.", where=where)
    if both := low.keys() & whole.keys():
        raise UserError(f"{min(both)} has both a LoRA and weights of its own, other than the base's.", where=where,
                        why="The vocabulary was enlarged, or it was trained on another base.")  # fmt: skip
    if not low:
        raise UserError("There are no LoRA matrices in this adapter.", where=where)
    if dead := [name for name, pair in low.items() if not pair["B"].any()]:
        raise UserError(f"B is all zero at {len(dead)} of {len(low)} layers, such as {dead[0]}: it does nothing there.",
                        where=where, why="It was not trained, or not saved as it was.")  # fmt: skip


def _same(own: Tensor, t: Tensor) -> bool:
    return own.shape == t.shape and bool((own == t.to(own.device, own.dtype)).all())


def _pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """PEFT's rule: the first key that the end of a layer's name matches."""
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", _hf(name))), otherwise)


def _short(names: list[str], model: Decoder) -> list[str]:
    """The layers by the last parts of their names where those say enough, else by their whole names."""
    short = {name.rsplit(".", 1)[-1] for name in names}
    every = [n for n, slot in model.named_modules() if isinstance(slot, Linear) and n.rsplit(".", 1)[-1] in short]
    return sorted(short) if sorted(every) == sorted(names) else [_hf(name) for name in names]


def _hf(name: str) -> str:
    return name if name.startswith("lm_head") else f"model.{name}"


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number
