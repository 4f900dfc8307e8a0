"""Does a merged model cost what its base costs? Seconds per decoded token and bytes of weights, interleaved.

python benchmarks/merged.py RUN
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

TOKENS, ROUNDS = 64, 15


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
        models = {"base": Persona("base", tuned.base), "adapter on": tuned,
                  "merged": Persona("merged", load_base(str(Path(scratch) / "merged")))}  # fmt: skip
        took = {name: [] for name in models}
        for _ in range(ROUNDS + 1):
            for name, persona in models.items():
                took[name].append(seconds(persona))
        median = {name: statistics.median(times[1:]) for name, times in took.items()}
        weights = {name: sum(b.nbytes for b in p.base.model.buffers()) for name, p in models.items()}
    print(json.dumps({"milliseconds_per_token": {k: round(v * 1e3, 2) for k, v in median.items()},
                      "merged_over_base": round(median["merged"] / median["base"], 4),
                      "bytes_over_base": weights["merged"] / weights["base"]}))  # fmt: skip


if __name__ == "__main__":
    main()
