"""Plain fine-tuning: every weight is trained, as fp32 copies of the base's. The yardstick for all other methods."""

from typing import ClassVar

import torch

from deltaw.adapters.adapter import Method, Site
from deltaw.adapters.whole import PART, Whole
from deltaw.models.slots import Delta, Slot
from deltaw.settings import settings


@settings
class Full(Method):
    """Train every weight of the model."""

    kinds: ClassVar[tuple[type[Slot], ...]] = tuple(PART)
    peak_rate: ClassVar[float] = 1e-4
    """BLEU 41.3, 38.7 at 1e-4, 3e-4 (benchmarks/table.py --set minutes=null steps=30)."""

    targets: str = "all"
    """Layers to train: all, all-linear, short names such as q,v, full names, or patterns; separated by commas."""

    def build(self, site: Site, rng: torch.Generator) -> Delta:  # noqa: ARG002 (nothing is random here)
        return Whole(site.slot)
