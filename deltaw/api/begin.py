"""What a run begins with: a base packed as its method has it, a fresh adapter, and the rows as that one sees them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from deltaw.adapters.adapter import Adapter
from deltaw.adapters.protocol import Method
from deltaw.api.interrupt import heeding
from deltaw.api.persona import Base
from deltaw.api.prepare import EncodedData, Loaded, encode
from deltaw.data.batch import lay
from deltaw.errors import UserError
from deltaw.scoring.loss import batch_loss
from deltaw.settings import Training
from deltaw.weights import Packed

CALIBRATION = 40
"""Training rows that tell a method what matters, where it asks."""


def packing(settings: Training, method: Method) -> str:
    """How the base's matrices are packed."""
    return type(method).base_format if settings.base_format is None else settings.base_format


def begun(method: Method, base: Base, settings: Training, loaded: Loaded, stop: Callable[[], bool],
          fresh: bool = True) -> tuple[Adapter, EncodedData]:  # fmt: skip
    """The adapter that a run begins with, and the rows as the model sees them that wears it.

    `fresh`: it starts from what its method sets; else it is filled from a checkpoint, which has all of that.
    """
    adapter = Adapter.build(method, base.model, settings.seed).to(base.model.device)
    if not adapter.parameter_count:
        raise UserError("These settings leave nothing to train.", remedy="See the page of the method, docs/methods.")
    with adapter.on():
        encoded = encode(loaded, base, settings, stop)
    encoded = replace(encoded, notices=(*encoded.notices, *method.notices(adapter)))
    if not fresh:
        return adapter, encoded

    def losses() -> Iterator[Tensor]:
        count = len(encoded.rows)
        for i in heeding(random.Random(settings.seed).sample(range(count), min(CALIBRATION, count)), stop):
            batch = lay([encoded.rows[i]]).to(base.model.device)
            yield batch_loss(base.model, batch) / batch.targets

    return method.begin(adapter, base.model, base.tokenizer, losses), encoded


def packed_by_layer(adapter: Adapter) -> tuple[str, ...]:
    """Name, format and bits a number of the matrices that are an adapter's own; nothing where all are alike."""
    own = {name: part for name, delta in adapter.named_deltas() for part in delta.modules() if isinstance(part, Packed)}
    if len({str(weight.form) for weight in own.values()}) < 2:
        return ()
    return tuple(f"{name} {w.form} {8 * w.stored_bytes / (w.shape[0] * w.shape[1]):.3f}" for name, w in own.items())
