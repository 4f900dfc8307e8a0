"""QLoRA: LoRA over a base in 4-bit NormalFloat, its scales quantised too (Dettmers et al. 2023, arXiv:2305.14314)."""

from typing import ClassVar

from deltaw.methods.lora import LoRA
from deltaw.settings import settings


@settings
class QLoRA(LoRA):
    """Train LoRA on a base of four bits a number."""

    base_format: ClassVar[str] = "nf4-dq"
