"""What one run is told: the model, the adapter, the rows, and how long to go on."""

from collections.abc import Callable
from dataclasses import dataclass, field

from deltaw.adapters.adapter import Adapter
from deltaw.data.batch import Batch, rows_per_step
from deltaw.data.store import Rows
from deltaw.files import adapters
from deltaw.files.runs import Run
from deltaw.models.decoder import Decoder
from deltaw.models.ranks import Ranks
from deltaw.models.tokenizer import Tokenizer
from deltaw.settings import Training

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
