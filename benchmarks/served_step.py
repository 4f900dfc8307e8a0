"""Where does the time of a server's step go, beside what the machine can do?

    python benchmarks/served_step.py

Steps of SmolLM2 in bfloat16, as `benchmarks/serving.py` has them: 32 sequences that say one token each behind 160, and
16 of these beside two prompts of 128; by the base, and by 8 and 64 adapters of rank 16, of which each draws one. Each
kind of native call is made by itself, all layers' at once, medians of nine; what is not in them is the head, the draw
and Python. A kind cannot be quicker than its operations at the rate of a large product, nor than its bytes at that of a
copy. Needs a quiet machine.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import beside
from roofline import median_seconds, rates
from serving import RANK, VOCABULARY, made

SAYING, PAST, PROMPT = 32, 160, 128
SHAPES = {"32 that say": (SAYING, 0), "16 that say, two prompts": (SAYING // 2, 2)}
ADAPTERS = (0, 8, 64)


def loaded(path):
    """The model, by a thread that ends: with those that it leaves, OpenMP's threads would sleep between products."""
    import torch

    from deltaw.models import checkpoint

    box = []
    thread = threading.Thread(target=lambda: box.append(checkpoint.load(path, torch.bfloat16)))
    thread.start()
    thread.join()
    return box[0]


def worn(folder, count, engine, model):
    """So many adapters, laid and ready."""
    from deltaw.models import checkpoint
    from deltaw.serve.catalog import Catalog, Source

    print_of = checkpoint.fingerprint(model)
    catalog = Catalog(model, print_of, engine.wardrobe, [], folder / "laid")
    catalog.kept.mkdir(parents=True, exist_ok=True)
    entries = [catalog.add(f"a{i:04d}", Source.of(folder / f"a{i:04d}", print_of)) for i in range(count)]
    engine.wardrobe.fetch(entries)
    while not engine.wardrobe.ready(entries):
        time.sleep(0.01)
    return entries


def stepped(engine, entries, saying, prompts, rng):
    """Sequences that were begun, and those that are to begin: the next step is the one to look at."""
    from deltaw.decode.sampling import Sampling
    from deltaw.serve.sequence import Sequence

    def submit(count, asked):
        for _ in range(count):
            ids = tuple(rng.choice(VOCABULARY) for _ in range(asked))
            own = ((rng.choice(entries), 1.0),) if entries else ()
            engine.submit(Sequence(ids, Sampling(max_new_tokens=64), frozenset(), own))

    submit(saying, PAST)
    while any(s.pending > 1 for s in engine.running) or engine.waiting or not engine.running:
        engine.step()
    submit(prompts, PROMPT)


def costs(model, rows, saying, prompts, distinct):
    """Of each kind of call in all layers: operations, and bytes."""
    from deltaw.models.checkpoint import linears

    c = model.config
    sizes = [slot.weight.shape for _, slot in linears(model)]
    numbers, ranks = sum(o * i for o, i in sizes), sum(RANK * (o + i) for o, i in sizes)
    seen = saying * PAST + prompts * PROMPT / 2
    pairs = saying * PAST + prompts * PROMPT**2 / 2
    kv, wide = 4 * c.kv_heads * c.head_width * c.layers, c.layers * rows
    return {
        "product": (2 * rows * numbers, 2 * numbers),
        "wear": (2 * rows * ranks if distinct else 0, 2 * ranks * distinct),
        "paged": (4 * pairs * c.heads * c.head_width * c.layers, kv * seen),
        "norm": (0, 2 * 2 * 2 * c.width * wide),
        "gated": (0, 3 * 2 * c.hidden * wide),
        "turn": (0, 2 * 2 * (c.heads + c.kv_heads) * c.head_width * wide),
        "add": (0, 2 * 3 * 2 * c.width * wide),
    }


def measured(folder, model, saying, prompts, count, rate, bandwidth):
    """Rows of one shape: seconds of each kind, what it could not be quicker than, and what is left of a whole step."""
    import torch

    from deltaw.kernels.worn import KINDS, Calls
    from deltaw.serve.engine import Engine

    engine, found, native, rng = Engine(model, 1 << 30), {}, Calls.make, random.Random(1)
    entries = worn(folder, count, engine, model)

    def split(calls, *told):
        everything = calls.told
        for kind in KINDS:
            calls.told = [op for op in everything if op.kind == KINDS.index(kind)]
            found[kind] = median_seconds(lambda: native(calls, *told))
        calls.told = everything
        began = time.perf_counter()
        native(calls, *told)
        found["layers"] = time.perf_counter() - began

    whole = []
    for _ in range(7):
        stepped(engine, entries, saying, prompts, rng)
        began = time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - began)
        while engine.step():
            pass
    stepped(engine, entries, saying, prompts, rng)
    distinct = []
    engine.stepped = distinct.append
    Calls.make = split
    try:
        engine.step()
    finally:
        Calls.make = native
    rows = saying + prompts * PROMPT
    least = costs(model, rows, saying, prompts, distinct[0])
    whole_seconds = sorted(whole)[len(whole) // 2]
    for kind in sorted(least, key=lambda kind: -found[kind]):
        operations, size = least[kind]
        yield {"call": kind, "seconds": found[kind], "least_seconds": max(operations / rate, size / bandwidth)}
    head = model.head_VD()
    ends = torch.randn(saying + prompts, model.config.width).to(model.dtype)
    operations = 2 * head.numel() * len(ends)
    yield {"call": "head", "seconds": median_seconds(lambda: model.logits(ends)),
           "least_seconds": max(operations / rate, head.nbytes / bandwidth)}  # fmt: skip
    yield {"call": "step", "seconds": whole_seconds, "layers_seconds": found["layers"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where adapters are made and kept; default: nowhere")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder; default: %(default)s")
    args = parser.parse_args()
    import torch

    path, done = beside.base(), []
    rate, bandwidth = rates(torch.bfloat16)
    model = loaded(path)
    print(f"{rate / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s\n")
    print("| step | adapters | call | ms | the least | share |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        folder = made(args.folder or Path(scratch), max(ADAPTERS), RANK, path)
        for name, (saying, prompts) in SHAPES.items():
            for count in ADAPTERS:
                for row in measured(folder, model, saying, prompts, count, rate, bandwidth):
                    done.append({"step": name, "adapters": count, **row, "flops": rate, "bandwidth": bandwidth})
                    least = row.get("least_seconds")
                    share = f"{1e3 * least:.2f} | {least / row['seconds']:.0%}" if least else " | "
                    print(f"| {name} | {count} | {row['call']} | {1e3 * row['seconds']:.2f} | {share} |", flush=True)
    beside.keep("served_step", done, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
