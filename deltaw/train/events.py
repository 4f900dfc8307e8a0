"""What one run is told (`Job`), and what happens during it, as plain values.

The terminal, `events.jsonl`, TensorBoard and the report only listen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from deltaw.adapters.adapter import Adapter
from deltaw.data.batch import Batch, rows_per_step
from deltaw.data.store import Rows
from deltaw.files import adapters
from deltaw.files.runs import Run
from deltaw.models.decoder import Decoder
from deltaw.models.ranks import Ranks
from deltaw.models.tokenizer import Tokenizer
from deltaw.settings import Training

LATER = {"later": True}
"""Marks what events of an earlier version do not say."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened; `seconds` since the run (or its resumption) began."""

    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """The event as one JSON object, its kind under `event`."""
        return {"event": type(self).__name__.lower(), **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Started(Event):
    """The run is set up: what will be trained, on what."""

    run: str
    base: str
    method: str
    trained_parameters: int
    base_parameters: int
    rows: int
    val_rows: int
    tokens: int
    trained_tokens: int
    batch_rows: int
    dtype: str
    device: str
    threads: int
    learning_rate: float
    resumed_at: int = 0
    base_form: str = field(default="", metadata=LATER)
    """How the base's matrices are packed; empty: as they are."""
    kernels: str = field(default="", metadata=LATER)
    """The instruction set of the native code that is used."""
    packed: tuple[str, ...] = field(default=(), metadata=LATER)
    """How layers are packed, where they differ: each one's name, its format, and its bits a number."""
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """What the run will take, measured on real micro-steps that were thrown away."""

    steps: int
    train_seconds: float
    low_seconds: float
    high_seconds: float
    peak_bytes: int
    available_bytes: int
    recompute: bool
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stepped(Event):
    """One optimizer step; `loss` is the mean over the step's trained tokens."""

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """The validation loss, a mean over all its trained tokens; `best`: lower than ever before."""

    step: int
    loss: float
    best: bool


@dataclass(frozen=True, kw_only=True)
class Sampled(Event):
    """One question, answered by the model as it is at `step` (0: before training)."""

    step: int
    question: str
    answer: str
    expected: str = ""


@dataclass(frozen=True, kw_only=True)
class Saved(Event):
    """A checkpoint was written."""

    step: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something the user should know, and the run goes on."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Finished(Event):
    """The end: `done`, `no better`, `interrupted`, `diverged` or `disk full`; what was reached, and the plan beside."""

    reason: str
    step: int
    loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    train_seconds: float = 0.0
    peak_bytes: int = 0
    predicted_seconds: float | None = None
    predicted_bytes: int | None = None


REASONS = {
    "done": ("Done", "good"),
    "no better": ("Stopped early: the validation loss got no better", "good"),
    "interrupted": ("Interrupted", "warn"),
    "diverged": ("Diverged: the loss was not a number", "bad"),
    "disk full": ("The disk is full: the adapter is not written; free some, then resume", "bad"),
}


def told(reason: str) -> tuple[str, str]:
    """Why a run ended, in words, and whether that is `good`, `bad`, or to be looked at (`warn`)."""
    return REASONS.get(reason, (reason, "warn"))


def is_event(record: Any) -> bool:
    """Whether a JSON value is one of these events, with all that such a one says; a float that was none is null.

    Only what was added later may be missing.
    """
    if not isinstance(record, dict) or not isinstance(record.get("seconds"), int | float):
        return False
    kind = next((cls for cls in Event.__subclasses__() if cls.__name__.lower() == record.get("event")), None)
    if kind is None:
        return False
    return all(_fits(record[f.name], str(f.type)) if f.name in record else f.metadata == LATER for f in fields(kind))


def _fits(value: Any, kind: str) -> bool:
    if kind.startswith("tuple"):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if value is None:
        return "float" in kind or "None" in kind
    return isinstance(value, {"str": str, "bool": bool, "int": int}.get(kind.split(" ")[0], int | float))


SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Question:
    """What is asked before, during and after training, to be looked at."""

    text: str
    ids: tuple[int, ...]
    expected: str = ""


@dataclass
class Job:
    """Everything a run needs. `weights`: each file's number of rows, and how often each row is seen per epoch."""

    run: Run
    model: Decoder
    tokenizer: Tokenizer
    adapter: Adapter
    header: adapters.Header
    settings: Training
    rows: Rows
    weights: tuple[tuple[int, float], ...]
    val: tuple[Batch, ...]
    steps: int
    learning_rate: float
    recompute: bool = False
    question: Question | None = None
    stop: Callable[[], bool] = field(default=lambda: False)
    """Asked after each micro-step; true: save and end."""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that train together, each on its rows of every step."""

    @property
    def batch_rows(self) -> int:
        """Rows of an optimizer step."""
        return self.settings.batch_rows or rows_per_step(self.rows.mean_tokens)

    @property
    def evaluations(self) -> int:
        """How often the validation loss is measured: at most once after every step."""
        return min(self.settings.evaluations, self.steps) if self.val else 0

    def evaluates(self, step: int) -> bool:
        """Whether the validation loss is measured after this many steps: evenly spread, the last after the last."""
        return step * self.evaluations // self.steps > (step - 1) * self.evaluations // self.steps
