"""The training loop: a generator of events. It shows nothing and asks nothing; it saves, so that nothing is lost.

A step's loss is the sum over its trained tokens divided once by their number, however many micro-batches it took. What
decides a step (weights, moments, random state, counters) is in its checkpoint, so a resumed run goes on bit for bit.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from deltaw.data.batch import IGNORED, Batch, lay, micro_batches, steps
from deltaw.decode.generate import complete
from deltaw.decode.sampling import Sampling
from deltaw.errors import Diverged, UserError
from deltaw.files.atomic import sweep
from deltaw.kernels.memory import frugal, held_bytes, peak_bytes
from deltaw.scoring.loss import batch_loss
from deltaw.train import checkpoint
from deltaw.train.checkpoint import Progress, Saver
from deltaw.train.events import SAMPLE_TOKENS, Evaluated, Event, Finished, Job, Sampled, Stepped, Warned
from deltaw.train.optimizer import adamw, rate

DISK_FULL = "disk full"
"""Why a run ended whose adapter could not be written; resuming it tries again."""
RECENT = 20
"""Steps over which the shown speed is measured."""


class Trainer:
    """One run, from its start or from a checkpoint."""

    def __init__(self, job: Job) -> None:
        self.job, self.progress = job, Progress()
        self.optimizer = adamw(job.adapter, job.settings, job.run.folder)
        self.saver = Saver(job, self.optimizer)
        self.recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self.last_loss: float | None = None
        self.sampled_at = -1
        self.before_seconds, self.began = 0.0, time.monotonic()

    def resume(self) -> list[str]:
        """Go back to the newest checkpoint that is whole; damaged ones are put aside, and named in what is returned.

        Raises:
            UserError: none is whole.
        """
        found, lost = self.job.run.checkpoints(), list[str]()
        sweep(self.job.run.folder / "checkpoints")
        for path in reversed(found):
            try:
                self.progress = checkpoint.load(path, self.job.adapter, self.optimizer, self.job.model.device)
                self.job.steps = self.progress.steps or self.job.steps
                break
            except UserError as e:
                if path == found[0]:
                    raise
                path.rename(path.with_suffix(".damaged"))
                lost.append(f"{path.name} is damaged and put aside; the run goes on from the one before. {e.why}")
        return lost

    def run(self) -> Iterator[Event]:
        """Train; every event carries the seconds since the run began, those before a resumption included.

        Raises:
            Diverged: the loss was not finite twice; the last good state is saved.
        """
        self.before_seconds, self.began = self.progress.seconds, time.monotonic()
        if self.progress.step == 0:
            torch.manual_seed(self.job.settings.seed)
        with frugal(self.job.recompute), self.job.adapter.on():
            for event in self._events():
                yield replace(event, seconds=self._count_time())

    def _count_time(self) -> float:
        self.progress.seconds = self.before_seconds + time.monotonic() - self.began
        return self.progress.seconds

    def _save(self, random: checkpoint.Random | None = None) -> Iterator[Event]:
        self._count_time()
        self.progress.steps = self.job.steps
        try:
            yield from self.saver.checkpoint(self.progress, random)
        except Diverged as e:
            yield from self._diverged(e.what)

    def _events(self) -> Iterator[Event]:
        job, progress = self.job, self.progress
        if progress.step == 0:
            yield from self._sample()
            yield from self._save()
        order = steps(job.weights, job.batch_rows, job.settings.seed)
        for _ in range(progress.step):
            next(order)
        while progress.step < job.steps and not self._given_up():
            epoch, rows = next(order)
            random = checkpoint.get_random(job.model.device)
            stepped = self._step(epoch, rows)
            if stepped is None:
                yield from self._save(random)
                yield self._finished("interrupted")
                return
            if isinstance(stepped, Warned) and progress.skipped > 1:
                yield from self._diverged()
            yield stepped
            progress.step += 1
            if job.evaluates(progress.step):
                yield from self._evaluate()
            if self.saver.due(progress.step):
                yield from self._save()
        yield from self._end("no better" if self._given_up() else "done")

    def _step(self, epoch: float, rows: list[int]) -> Stepped | Warned | None:
        """Take one optimizer step. None: asked to stop halfway; a warning: the loss was not finite, nothing moved."""
        job, progress = self.job, self.progress
        start = time.monotonic()
        own = rows[job.ranks.own :: job.ranks.count]
        batches = micro_batches([job.rows[i] for i in own], job.settings.micro_tokens, job.model.shares)
        sizes = job.ranks.all((len(batches), sum(b.targets for b in batches), sum(b.row_tokens for b in batches)))
        most, targets, tokens = max(sizes)[0], sum(t for _, t, _ in sizes), sum(t for *_, t in sizes)
        if job.ranks.count > 1:  # of dropout, each has its own, wherever the run goes on
            torch.manual_seed(job.settings.seed + progress.step * job.ranks.count + job.ranks.own)
        job.adapter.train()
        self.optimizer.zero_grad(set_to_none=False)
        total = 0.0
        if len(batches) < most:  # every layer is computed by all at once, whoever has fewer
            empty = lay([job.rows[rows[0]]])
            batches += [replace(empty, labels_T=torch.full_like(empty.labels_T, IGNORED))] * (most - len(batches))
        for batch in batches:
            total += self._micro_step(batch, targets)
            if any(job.ranks.all(job.stop())):
                return None
        total = self._together(total)
        norm = self._clip()
        now = rate(progress.step, job.steps, job.learning_rate, job.settings) * progress.rate_scale
        if not (math.isfinite(total) and math.isfinite(norm)):
            progress.skipped += 1
            progress.rate_scale *= 0.5
            at = f"The loss of step {progress.step + 1} is not finite"
            return Warned(text=f"{at}: the step is skipped, the rate halved.")
        for group in self.optimizer.param_groups:
            group["lr"] = now * group["pace"]
        self.optimizer.step()
        self.last_loss = total / targets
        self.recent.append((tokens, time.monotonic() - start))
        return Stepped(step=progress.step + 1, steps=job.steps, epoch=epoch, loss=self.last_loss, learning_rate=now,
                       gradient_norm=norm, tokens=tokens, trained_tokens=targets,
                       memory_bytes=held_bytes(job.model.device),
                       tokens_per_second=sum(n for n, _ in self.recent) / sum(s for _, s in self.recent))  # fmt: skip

    def _micro_step(self, batch: Batch, targets: int) -> float:
        """Add the gradient of one micro-batch; its summed loss. As a function, so that nothing of its graph stays."""
        loss = batch_loss(self.job.model, batch.to(self.job.model.device), self.job.recompute)
        (loss / targets).backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def _together(self, total: float) -> float:
        """Sum gradients, and what they are of, over all processes."""
        if self.job.ranks.count == 1:
            return total
        grads = [p.grad for p in self.job.adapter.parameters() if p.grad is not None]
        all_of = [*grads, torch.tensor([total], device=self.job.model.device)]
        vector_to_parameters(self.job.ranks.sum(parameters_to_vector(all_of)), all_of)
        return all_of[-1].item()

    def _clip(self) -> float:
        grads = [p.grad for p in self.job.adapter.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.job.settings.clip and math.isfinite(float(norm)):
            torch.nn.utils.clip_grads_with_norm_(self.job.adapter.parameters(), self.job.settings.clip, norm)
        return float(norm)

    def _evaluate(self) -> Iterator[Event]:
        progress = self.progress
        loss = validation_loss(self.job)
        best = math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss)
        progress.worse = 0 if best else progress.worse + 1
        if best:
            yield from self.saver.best(progress, loss)
        yield Evaluated(step=progress.step, loss=loss, best=best)
        yield from self._sample()

    def _sample(self) -> Iterator[Event]:
        if (asked := self.job.question) is None:
            return
        self.job.adapter.eval()
        sampling = Sampling(max_new_tokens=SAMPLE_TOKENS)
        self.sampled_at = self.progress.step
        try:
            (said,) = complete(self.job.model, self.job.tokenizer, [asked.ids], sampling)
        except UserError as e:  # it may come right again, and is seen at the loss if it does not
            yield Warned(text=f"Nothing can be said after step {self.progress.step}. {e.what}")
            return
        answer = said.text if said.whole else f"{said.text} …"
        yield Sampled(step=self.progress.step, question=asked.text, answer=answer, expected=asked.expected)

    def _given_up(self) -> bool:
        patience = self.job.settings.patience
        return bool(patience) and self.progress.worse >= patience

    def _end(self, reason: str) -> Iterator[Event]:
        job, progress = self.job, self.progress
        if self.saver.step != progress.step:
            yield from self._save()
        if job.settings.keep_best and progress.best_step not in (None, progress.step):
            yield from self._take_best()
        elif self.sampled_at != progress.step:
            yield from self._sample()
        job.adapter.eval()
        job.ranks.whole(job.model)
        yield from self.saver.result()
        yield self._finished(reason if job.run.adapter.exists() else DISK_FULL)

    def _take_best(self) -> Iterator[Event]:
        progress = self.progress
        try:
            self.saver.take_best()
        except UserError:
            yield Warned(text=f"The best adapter, that of step {progress.best_step}, is gone or damaged: "
                         f"this is the one of step {progress.step}.")  # fmt: skip
            progress.best_step = progress.best_loss = None
        yield from self._sample()

    def _diverged(self, what: str = "The loss was not finite twice.") -> Iterator[Event]:
        job, best = self.job, self.progress.best_step
        yield from (Warned(text=text) for text in self.resume())
        good = self.progress.step
        if job.settings.keep_best and best is not None and job.run.best.exists():
            self.saver.take_best()
            good = best
        yield from self.saver.result()
        yield self._finished("diverged")
        saved = f"The adapter as it was at step {good} is saved." if job.run.adapter.exists() else "The disk is full."
        raise Diverged(what, where=str(job.run.folder), why=saved,
                       remedy=f"Train with a lower rate: --learning-rate {job.learning_rate / 4:.0e}")  # fmt: skip

    def _finished(self, reason: str) -> Finished:
        p = self.progress
        return Finished(reason=reason, step=p.step, loss=self.last_loss, best_step=p.best_step, best_loss=p.best_loss,
                        train_seconds=p.seconds, peak_bytes=peak_bytes(self.job.model.device))  # fmt: skip


@torch.no_grad()
def validation_loss(job: Job) -> float:
    """Mean loss over the trained tokens of the validation rows, in nats."""
    job.adapter.eval()
    ranks, total = job.ranks, torch.zeros(1, dtype=torch.float64, device=job.model.device)
    for first in range(0, len(job.val), ranks.count):
        own = min(first + ranks.own, len(job.val) - 1)  # of the last few, some compute one that is another's
        loss = batch_loss(job.model, job.val[own].to(job.model.device))
        total += loss if own == first + ranks.own else 0.0
    return ranks.sum(total).item() / sum(batch.targets for batch in job.val)
