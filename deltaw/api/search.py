"""Which path each layer of a GLoRA supernet is to take, within a number of parameters: evolution, as in the paper.

The rows that decide are neither those of training nor those of a test (the authors' code looks at the test set).
"""

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from deltaw.adapters.adapter import Adapter
from deltaw.api.evaluate import perplexity
from deltaw.api.persona import Persona
from deltaw.data.batch import Batch
from deltaw.errors import UserError
from deltaw.files.runs import Run, kept
from deltaw.methods import glora
from deltaw.methods.glora import CHOICES, General
from deltaw.models.slots import lent
from deltaw.settings import Count, Seed, Share, settings

Candidate = tuple[glora.Path, ...]
"""A path for each layer."""
NOTHING = glora.Path("none", "none", "none", "none", "none")
TRIES = 200
"""Draws before it is said that nothing fits; half of them from the best."""


@settings
class Search:
    """How paths are looked for."""

    budget: Count = 500_000
    """How many trained numbers the result may have."""
    evaluations: Count = 64
    """How many candidates are measured."""
    population: Count = 16
    """How many of them begin, and how many each generation has."""
    parents: Annotated[int, Field(ge=1, le=1000)] = 4
    """How many of the best each generation comes from."""
    mutation: Share = 0.2
    """How likely each term of each layer is drawn anew."""
    evolve: bool = True
    """Whether later candidates come from the best, or all are drawn at random, as a comparison."""
    seed: Seed = 0
    """Seed of all that is drawn."""


@dataclass(frozen=True)
class Measured:
    """A candidate, its trained numbers, and its perplexity on the search rows."""

    paths: Candidate
    parameters: int
    perplexity: float


def search(persona: Persona, batches: Sequence[Batch], chosen: Search, log: Path) -> Iterator[Measured]:
    """Measure candidate after candidate, none over the budget and none twice.

    What is in `log` is not measured again: with the same settings the same candidates come, and it goes on from there.

    Raises:
        UserError: the adapter is no supernet, or nothing fits the budget.
    """
    deltas = list(_supernet(persona)[2].values())
    rng, known = random.Random(chosen.seed), _known(log)
    found: list[Measured] = []
    while len(found) < chosen.evaluations:
        best = sorted(found, key=lambda m: m.perplexity)[: chosen.parents if chosen.evolve else 0]
        for i in range(min(chosen.population, chosen.evaluations - len(found))):
            paths = _legal(best, i, deltas, chosen, rng, {m.paths for m in found})
            key, size = "|".join("/".join(path) for path in paths), numbers(deltas, paths)
            if key not in known:
                value = measure(persona, deltas, paths, batches)
                known[key] = math.inf if math.isnan(value) else value
                with log.open("a", encoding="utf-8") as file:
                    file.write("\n" + json.dumps({"paths": key, "parameters": size, "perplexity": known[key]}))
            found.append(Measured(paths, size, known[key]))
            yield found[-1]


def numbers(deltas: Sequence[General], paths: Candidate) -> int:
    """How many numbers these paths train."""
    return sum(path.numbers(*delta.size) for delta, path in zip(deltas, paths, strict=True))


def write(persona: Persona, paths: Candidate, run: Run) -> Path:
    """Save the supernet by these paths, without all that they do not use, as a run: its file."""
    supernet, method, layers = _supernet(persona)
    told = {name: "/".join(path) for name, path in zip(layers, paths, strict=True)}
    along = {name: delta.along(path) for (name, delta), path in zip(layers.items(), paths, strict=True)}
    taken = supernet.like(replace(method, supernet=False, paths=told), along)
    return kept(taken, persona.base.header(taken, persona.system), run)


def _supernet(persona: Persona) -> tuple[Adapter, glora.GLoRA, dict[str, General]]:
    """The adapter, its method, and what it has at each layer."""
    adapter = persona.adapter
    if adapter is None or not isinstance(adapter.method, glora.GLoRA) or not adapter.method.supernet:
        raise UserError(f"'{persona.name}' is no supernet.", remedy="Train one: --method glora --supernet.")
    return adapter, adapter.method, {n: delta for n, delta in adapter.named_deltas() if isinstance(delta, General)}


def _known(log: Path) -> dict[str, float]:
    """What was measured before; a line that was cut off by a sudden end is measured again."""
    known: dict[str, float] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []:
        with suppress(ValueError, TypeError, KeyError):
            said = json.loads(line)
            if not math.isnan(value := float(said["perplexity"])):
                known[str(said["paths"])] = value
    return known


def measure(persona: Persona, deltas: Sequence[General], paths: Candidate, batches: Sequence[Batch]) -> float:
    """The perplexity of a supernet by these paths; afterwards it is as it was."""
    with persona.on(), lent((delta, "path", path) for delta, path in zip(deltas, paths, strict=True)):
        return perplexity(persona.base.model, batches)


def _legal(best: Sequence[Measured], i: int, deltas: Sequence[General], chosen: Search, rng: random.Random,
           seen: set[Candidate]) -> Candidate:  # fmt: skip
    """A new candidate within the budget: a mutation or a crossing of the best, or at random where there are none."""
    for attempt in range(TRIES):
        if best and attempt < TRIES // 2:
            mother, rate = rng.choice(best).paths, chosen.mutation if i % 2 else 0.0
            father = mother if i % 2 else rng.choice(best).paths
        else:  # with a share of the terms drawn that is drawn too: some fit any budget
            mother = father = (NOTHING,) * len(deltas)
            rate = rng.random()
        paths = tuple(_child(m, f, rate, delta, rng) for m, f, delta in zip(mother, father, deltas, strict=True))
        if paths not in seen and 0 < numbers(deltas, paths) <= chosen.budget:
            return paths
    raise UserError(f"No new paths within {chosen.budget:,} parameters were found.", remedy="Take a larger --budget.")


def _child(mother: glora.Path, father: glora.Path, rate: float, delta: General, rng: random.Random) -> glora.Path:
    """Each term that of one parent, or drawn anew."""
    terms = (rng.choice(some) if rng.random() < rate else rng.choice(pair)
             for some, pair in zip(CHOICES, zip(mother, father, strict=True), strict=True))  # fmt: skip
    return delta.within(glora.Path(*terms))
