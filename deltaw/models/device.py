"""Where and in which type to compute."""

import torch

from deltaw.errors import explained


def choose_device(wanted: str) -> torch.device:
    """Return the device called `wanted`; `auto` is CUDA where there is some, else the processor.

    Raises:
        UserError: there is no such device here.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with explained(f"There is no device '{wanted}' here.", RuntimeError, AssertionError, NotImplementedError,
                   why=lambda error: str(error).splitlines()[0][:120], remedy="Take --device cpu."):  # fmt: skip
        device = torch.device(wanted)
        torch.empty(1, device=device).item()  # the device `meta` has no values
    return device


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the type called `wanted`; `auto` is bfloat16 where it is multiplied in hardware, else float32.

    A processor without bfloat16 instructions multiplies it five times slower than float32.
    """
    if wanted == "auto":
        wanted = "bfloat16" if multiplies_bf16(device) else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wanted]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has instructions that multiply bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has = instruction_sets()
    return has["amx_bf16"] or has["avx512_bf16"]


def instruction_sets() -> dict[str, bool]:
    """Which of the instruction sets that matter for speed the processor has, as torch sees it."""
    # Older versions of torch do not tell; then none is claimed.
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return {name: bool(has.get(name)) for name in ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16")}
