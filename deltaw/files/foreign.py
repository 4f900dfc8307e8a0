"""Folders of PEFT and mlx-lm: what stands beside the tensors is done or refused, never passed over."""

import json
import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, StrictBool, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, contiguous_format

from deltaw.errors import UserError, explained
from deltaw.files.adapters import refuse_nan
from deltaw.files.atomic import replacing, write_text
from deltaw.models.checkpoint import read_json
from deltaw.settings import Count, complaint

CONFIG, WEIGHTS, MLX_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
CHANGES = {
    "lora_bias": "B has a bias", "fan_in_fan_out": "its matrices are transposed",
    "trainable_token_indices": "single tokens were trained", "layer_replication": "layers are repeated",
    "target_parameters": "bare parameters are adapted", "alora_invocation_tokens": "it is switched on by tokens",
    "use_bdlora": "it is block-diagonal", "kasa_config": "it is a KaSA", "monteclora_config": "it is sampled",
    "arrow_config": "it routes between adapters", "use_qalora": "it is a QA-LoRA", "corda_config": "it is a CorDA",
}  # fmt: skip
"""Keys under which an adapter is no plain LoRA, and what they say."""
MOVED = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Ways to begin that changed the base: the tensors are no LoRA of the base as it was."""
Alpha = Annotated[float, Field(gt=0, le=1e6, strict=True)]


@pydantic_dataclass(kw_only=True)
class Said:
    """What is read of a configuration. Other keys are refused if they change something, and else passed over."""

    r: Count = 8
    lora_alpha: Alpha = 8.0
    use_rslora: StrictBool = False
    use_dora: StrictBool = False
    ensure_weight_tying: StrictBool = False
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rank_pattern: dict[str, Count] = field(default_factory=dict)
    alpha_pattern: dict[str, Alpha] = field(default_factory=dict)
    target_modules: list[str] | str = ""
    modules_to_save: list[str] = field(default_factory=list)


def write(folder: Path, kind: str, base: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, and a configuration of this kind of adapter, as PEFT has them.

    Raises:
        Diverged: a value is not finite.
    """
    # Cloned, as layers may have one matrix together, and a file may not.
    own = {name: t.detach().cpu().clone(memory_format=contiguous_format) for name, t in tensors.items()}
    refuse_nan(own)
    told = {"peft_type": kind, "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True}
    with replacing(folder / WEIGHTS) as scratch:
        save_file(own, scratch, metadata={"format": "pt"})
    write_text(folder / CONFIG, json.dumps(told | {**config}, indent=2) + "\n")


def understood(folder: Path) -> tuple[Said, dict[str, Tensor]]:
    """The configuration and the tensors of a folder, in PEFT's terms.

    Raises:
        UserError: no such folder, a pickle, or something that is no plain LoRA.
    """
    if not folder.is_dir():
        raise UserError("There is no such folder.", where=str(folder), remedy="Give one that PEFT or mlx-lm wrote.")
    if not (folder / CONFIG).exists():
        pickled = next(iter([*folder.glob("*.pt"), *folder.glob("*.bin")]), None)
        why = f"{pickled.name} is a pickle, which may run code." if pickled else ""
        raise UserError(f"{CONFIG} is missing.", where=str(folder), why=why,
                        remedy="Give the folder with safetensors that PEFT, mlx-lm or torchtune wrote.")  # fmt: skip
    told = read_json(folder / CONFIG)
    if "fine_tune_type" in told or "lora_parameters" in told:
        return _from_mlx(told, folder)
    _refuse(told, folder)
    if unsaid := next((key for key in ("peft_type", "r", "lora_alpha") if told.get(key) is None), None):
        raise UserError(f"{CONFIG} does not say {unsaid}.", where=str(folder), remedy="Write it in, if you know it.")
    return _said(told, folder), stored(folder / WEIGHTS)


def _refuse(config: Mapping[str, Any], folder: Path) -> None:
    kind = str(config.get("peft_type", "LORA"))
    init = config.get("init_lora_weights")
    why = next((said for key, said in CHANGES.items() if config.get(key)), None)
    if kind != "LORA":
        raise UserError(f"This adapter is of the kind {kind}; LoRA is what can be imported.", where=str(folder),
                        remedy="Merge it with PEFT, and take the merged model as a base.")  # fmt: skip
    if config.get("bias", "none") != "none":
        why = "biases of the base were trained"
    if isinstance(init, str) and init.lower().startswith(MOVED):
        why = f"it began by {init}, which changed the base"
    if why:
        raise UserError("This adapter is no plain LoRA.", where=str(folder / CONFIG), why=f"{why[0].upper()}{why[1:]}.",
                        remedy="Merge it with PEFT, or convert it to a plain LoRA there.")  # fmt: skip


def _said(told: Mapping[str, Any], folder: Path) -> Said:
    """What the configuration says, checked."""
    with explained(f"{CONFIG} cannot be understood.", ValidationError, where=folder, why=complaint):
        return TypeAdapter(Said).validate_python({k: v for k, v in told.items() if v is not None})


def _from_mlx(told: Mapping[str, Any], folder: Path) -> tuple[Said, dict[str, Tensor]]:
    """What mlx-lm wrote, in PEFT's terms: its matrices are transposed, and its scale is no alpha / rank."""
    if (kind := str(told.get("fine_tune_type", "lora"))) != "lora":
        raise UserError(f"This is a '{kind}' adapter of mlx-lm; LoRA is what can be imported.", where=str(folder))
    tensors = {re.sub(r"lora_([ab])$", lambda m: f"lora_{m[1].upper()}.weight", name): t.t() if ".lora_" in name else t
               for name, t in stored(folder / MLX_WEIGHTS).items()}  # fmt: skip
    ranks = {name.removesuffix(".lora_A.weight"): len(t) for name, t in tensors.items() if "lora_A" in name}
    parameters = told.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale = parameters.get("scale")
    if not isinstance(scale, int | float):
        raise UserError(f"{CONFIG} of mlx-lm does not say the scale.", where=str(folder))
    if odd := next((n for n, r in ranks.items() if parameters.get("rank", r) != r), None):
        raise UserError(f"The rank of '{odd}' is {ranks[odd]}, and {CONFIG} says {parameters['rank']}.",
                        where=str(folder))  # fmt: skip
    return _said({"rank_pattern": {re.escape(n): r for n, r in ranks.items()},
                  "alpha_pattern": {re.escape(n): scale * r for n, r in ranks.items()},
                  "ensure_weight_tying": True}, folder), tensors  # fmt: skip


def stored(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, each of which may be a weight of an adapter.

    Raises:
        UserError: there is no such file, or it is damaged, or one of them is something else.
    """
    if not file.exists():
        pickled = (file.parent / "adapter_model.bin").exists()
        raise UserError(f"{file.name} is missing.", where=str(file.parent),
                        why="adapter_model.bin is a pickle, which may run code." if pickled else "",
                        remedy="Save the adapter again with safetensors." if pickled else "")  # fmt: skip
    with explained("The adapter file is damaged.", SafetensorError, OSError, where=file):
        tensors: dict[str, Tensor] = load_file(file)
    for name, t in tensors.items():
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16) or t.ndim not in (1, 2):
            raise UserError(f"'{name}' is {str(t.dtype)[6:]} of {t.ndim} dimensions, and no weight of an adapter.",
                            where=str(file))  # fmt: skip
    return tensors
