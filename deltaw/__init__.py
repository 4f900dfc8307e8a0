"""deltaw (ΔW): fine-tune a language model on your own data with the LoRA family, and talk to the result."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaw.api.finetune import finetune
    from deltaw.api.persona import Persona, load

__version__ = "0.1.0"
__all__ = ["Persona", "__version__", "finetune", "load"]

_HOMES = {"finetune": "deltaw.api.finetune", "load": "deltaw.api.persona", "Persona": "deltaw.api.persona"}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing torch takes longer than showing help.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'deltaw' has no attribute '{name}'")
