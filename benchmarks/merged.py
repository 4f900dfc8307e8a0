"""Does a merged model cost what its base costs? Seconds per decoded token and bytes of weights.

    python benchmarks/merged.py RUN

The models answer in turns, in another order each round; every round gives one ratio to the base. The base is written
as the merged model is, to the same disk at the same time: weights are mapped from their files, and how a file lies in
the page cache changes the speed by a tenth. `base again` is that base loaded a second time: how far its ratio is from 1
is what two equal models differ by here.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from deltaw.api.merge import merge
from deltaw.api.persona import Persona, load, load_base
from deltaw.decode.generate import generate
from deltaw.decode.sampling import Sampling
from deltaw.models import checkpoint

TOKENS, ROUNDS = 64, 24


def seconds(persona):
    """Seconds per token of one answer of 64 tokens, however it would like to end."""
    prompt = persona.prompt("Tell me about the village.")
    with persona.on():
        start = time.perf_counter()
        for _ in generate(persona.base.model, [prompt], Sampling(max_new_tokens=TOKENS), set()):
            pass
        return (time.perf_counter() - start) / TOKENS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    args = parser.parse_args()
    tuned = load(args.run, args.runs)
    with tempfile.TemporaryDirectory() as scratch:
        merge(tuned, Path(scratch) / "merged")
        copy = Path(scratch) / "base"
        checkpoint.save(tuned.base.model, copy)
        tuned.base.tokenizer.save(copy)
        tuned = load(args.run, args.runs, str(copy))
        models = {"base": Persona("base", tuned.base), "adapter on": tuned,
                  "merged": Persona("merged", load_base(str(Path(scratch) / "merged"))),
                  "base again": Persona("again", load_base(str(copy)))}  # fmt: skip
        took = rounds(models)
        weights = {name: sum(b.nbytes for b in p.base.model.buffers()) for name, p in models.items()}
    ratios = {name: statistics.median(t / b for t, b in zip(times, took["base"], strict=True))
              for name, times in took.items()}  # fmt: skip
    print(json.dumps({
        "milliseconds_per_token": {k: round(statistics.median(v) * 1e3, 2) for k, v in took.items()},
        "over_base": {k: round(v, 4) for k, v in ratios.items()},
        "merged_bytes_over_base": weights["merged"] / weights["base"],
    }))  # fmt: skip


def rounds(models):
    """Seconds per token of every model in every round, after one that is thrown away."""
    took = {name: [] for name in models}
    names = list(models)
    for i in range(ROUNDS + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            took[name].append(seconds(models[name]))
    return {name: times[1:] for name, times in took.items()}


if __name__ == "__main__":
    main()
