"""How would 8 GPUs serve 100,000 personas? The scheduler as it is, the hardware by its figures.

    python benchmarks/scale.py                      # three ways to send requests to eight replicas
    python benchmarks/scale.py --rate 300 --personas 1000
    python benchmarks/scale.py --counts             # bytes and messages of eight processes, by their formulas
    python benchmarks/scale.py --catalog 100000     # what so many files cost one server, measured here

Eight engines (`deltaw.serve.engine.Engine`, with its order, pages and wardrobe) run by a clock of their own: a step
takes what a GPU of 80 GB would (bytes of weights, keys, values and adapters by its bandwidth, tokens by its
arithmetic), an adapter what a disk takes to give it. The model is Llama 3 8B in bfloat16, with adapters of rank 16 on
all linear layers. Requests come by chance, for personas of a power law (the k-th with a weight of 1 / k), with 128 to
512 tokens asked and 64 to 192 said. They go by chance; or to where their persona is, and at first to the shorter of two
queues; or so, but aside if there are many more than elsewhere. Seconds are simulated, decisions are not.
"""

import argparse
import heapq
import itertools
import json
import random
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import psutil
import torch

from deltaw.decode.sampling import Sampling
from deltaw.models.config import ModelConfig
from deltaw.models.decoder import Decoder
from deltaw.serve import engine as engines, order, sequence, wardrobe
from deltaw.serve.order import Busy
from deltaw.serve.sequence import Sequence

GPUS, MEMORY, BANDWIDTH, RATE, DISK = 8, 80e9, 2.5e12, 4e14, 5e9
"""How many; bytes; bytes a second (of 3.35e12 at best); operations a second (of 9.9e14); bytes a second of a disk."""
STEP_SECONDS = 0.002
"""What a step takes beside: launching, drawing, telling."""
WEIGHTS, LAYERS, KV_HEADS, HEAD, WIDTH, HIDDEN, RANK = 16.06e9, 32, 8, 128, 4096, 14336, 16
ADAPTER = 2 * RANK * LAYERS * (2 * (2 * WIDTH) + 2 * (WIDTH + KV_HEADS * HEAD) + 3 * (WIDTH + HIDDEN))
"""Bytes: A and B of q and o, k and v, and of gate, up and down."""
PAGE = 2 * 2 * LAYERS * KV_HEADS * HEAD * order.SIDE
MOST, CHUNK, RESERVED = 192, 512, 4e9
"""Answers at once; tokens of prompts in a step; bytes for what flows."""
FAR = 32
"""So many more requests at a persona's replica than elsewhere: another one loads it, too."""


class Clock:
    """Seconds, as the engine that runs now has them."""

    now = 0.0

    def __call__(self):
        return self.now


clock = Clock()
for module in (engines, order, sequence, wardrobe):
    module.monotonic = clock


class Memory:
    """What an adapter takes the place of, of a pool whose pages are small here."""

    slab, before, alone, digest = None, (), None, b""

    def __init__(self, size_bytes):
        self.size_bytes = size_bytes


class Reader:
    """A disk: one adapter after another."""

    def __init__(self):
        self.free, self.read = 0.0, 0

    def submit(self, _, entry):
        self.free, self.read = max(self.free, clock.now) + ADAPTER / DISK, self.read + 1
        done, at = Future(), self.free
        done.set_result(entry.read())
        done.done = lambda: clock.now >= at
        return done


class Replica:
    """An engine on a GPU that is not there."""

    def __init__(self, model):
        probe = engines.Engine(model, 0).arena.page_bytes
        pages = int((MEMORY - WEIGHTS - RESERVED) / PAGE)
        self.engine = engines.Engine(model, pages * probe, MOST, CHUNK)
        self.engine.wardrobe.reader = self.reader = Reader()
        self.engine.compute = self.step
        self.size, self.entries, self.now, self.steps, self.said = -(-ADAPTER // PAGE) * probe, {}, 0.0, 0, 0
        self.logits = torch.zeros(MOST + 1, 16)
        self.logits[:, 1] = 1

    @property
    def queue(self):
        return len(self.engine.running) + len(self.engine.waiting)

    def entry(self, persona):
        if persona not in self.entries:
            name = str(persona)
            served = Memory(self.size)
            self.entries[persona] = self.engine.wardrobe.add(name, name.encode().ljust(16), lambda: served)
        return self.entries[persona]

    def step(self, step, _):
        """The seconds that a GPU takes: what must be read, or what must be computed, and what must be done beside."""
        distinct = len({entry for each in self.engine.running for entry in each.entries})
        kv = sum(run.past for run in step.runs) * PAGE / order.SIDE
        bytes_ = WEIGHTS + kv + distinct * ADAPTER
        operations = len(step.ids) * (WEIGHTS + ADAPTER)  # two a number, which has two bytes
        clock.now += STEP_SECONDS + max(bytes_ / BANDWIDTH, operations / RATE)
        self.steps += 1
        self.said += len(step.ends)
        return self.logits[: len(step.ends)]


def requests(personas, rate, seconds, seed):
    """When each comes, for whom, how much is asked and how much said."""
    rng, now = random.Random(seed), 0.0
    total = list(itertools.accumulate(1 / (k + 1) for k in range(personas)))
    while (now := now + rng.expovariate(rate)) < seconds:
        (persona,) = rng.choices(range(personas), cum_weights=total)
        yield now, persona, rng.randint(128, 512), rng.randint(64, 192)


def chosen(way, persona, replicas, homes, rng):
    """Where a request goes."""
    if way == "by chance":
        return rng.choice(replicas)
    shorter = min(rng.sample(replicas, 2), key=lambda r: r.queue)
    own = [replicas[i] for i in homes.get(persona, ())]
    home = min(own, key=lambda r: r.queue, default=None)
    if home is None or (way == "to its persona, or aside" and home.queue > shorter.queue + FAR):
        homes.setdefault(persona, set()).add(replicas.index(shorter))
        return shorter
    return home


def heard(one, firsts, since):
    """Told of tokens: when the first came is written down."""
    return lambda what: firsts.append(clock.now - since) if isinstance(what, int) and len(one.said) == 1 else None


def simulated(way, asked, target, model):
    """What comes of it."""
    clock.now = 0.0
    replicas, homes, rng = [Replica(model) for _ in range(GPUS)], {}, random.Random(1)
    firsts, hits, refused, busy = [], 0, 0, []
    coming = iter(asked)
    next_one = next(coming, None)
    while next_one is not None or any(r.queue for r in replicas):
        at, number = heapq.heappop(busy) if busy else (float("inf"), None)
        if next_one is not None and next_one[0] <= at:
            if number is not None:
                heapq.heappush(busy, (at, number))
            (now, persona, prompt, answer), next_one = next_one, next(coming, None)
            replica = chosen(way, persona, replicas, homes, rng)
            idle, clock.now = not replica.queue, now
            entry = replica.entry(persona)
            hits += entry.state == "ready"
            one = Sequence((3,) * prompt, Sampling(max_new_tokens=answer), frozenset(), ((entry, 1.0),),
                           secret=str(now), since=now)  # fmt: skip  # no two prompts begin alike
            one.heard = heard(one, firsts, now)
            try:
                replica.engine.submit(one, within=target)
            except Busy:
                refused += 1
                continue
            if idle:
                replica.now = max(replica.now, now)
                heapq.heappush(busy, (replica.now, replicas.index(replica)))
            continue
        replica = replicas[number]
        clock.now = at
        if not replica.engine.step():
            clock.now += 0.005  # what is worn is being read
        replica.now = clock.now
        if replica.queue:
            heapq.heappush(busy, (replica.now, number))
    firsts.sort()
    last = max(r.now for r in replicas)
    said, count = [r.said for r in replicas], len(firsts)
    return {
        "way": way,
        "requests": len(asked),
        "refused": refused,
        "loaded where they came": round(hits / len(asked), 3),
        "first token p50": round(firsts[count // 2], 3),
        "first token p95": round(firsts[int(count * 0.95)], 3),
        "within target": round(sum(first <= target for first in firsts) / count, 3),
        "tokens/s": round(sum(said) / last),
        "adapters read": sum(r.reader.read for r in replicas),
        "busiest over mean": round(max(said) * GPUS / sum(said), 2),
    }


def counts():
    """What eight processes tell each other and hold, for Llama 3, rank 16 on all layers."""
    kv, vocab = KV_HEADS * HEAD, 128256
    for name, layers, width, hidden in (("8B", LAYERS, WIDTH, HIDDEN), ("70B", 80, 8192, 28672)):
        matrices, ends = layers * (2 * width * width + 2 * width * kv + 3 * width * hidden), 2 * vocab * width
        adapter = RANK * layers * (2 * (2 * width) + 2 * (width + kv) + 3 * (width + hidden))
        whole = RANK * layers * 2 * width  # B of o_proj and down_proj
        row = {"model": f"Llama 3 {name}"}
        for what, tokens, said in (("a token of 64 answers", 64, 64), ("512 tokens of a prompt", 512, 1)):
            row[f"tensor parallel, {what}"] = {
                "sums": 4 * layers,
                "MB summed": round(2 * layers * tokens * width * 4 / 1e6, 1),
                "MB for adapters": round(layers * tokens * RANK * (3 + 1 + 2 + 1) * 4 / 1e6, 1),
                "MB of logits": round(2 * said * vocab / GPUS * (GPUS - 1) / 1e6, 1),
            }
        row["tensor parallel, held by each"] = {
            "GB": round((2 * matrices / GPUS + 2 * ends) / 1e9, 1),
            "MB of an adapter": round(2 * ((adapter - whole) / GPUS + whole) / 1e6, 1),
            "MB of a whole adapter": round(2 * adapter / 1e6, 1),
        }
        row["FSDP, a micro-batch"] = {
            "gathers": 2 * layers,
            "GB heard by each": round(2 * 2 * matrices * (GPUS - 1) / GPUS / 1e9, 1),
        }
        row["FSDP, a step"] = {"sums": 1, "MB summed": round(4 * adapter / 1e6, 1)}
        row["FSDP, held by each"] = {
            "GB of the base": round((2 * matrices / GPUS + 2 * ends + 2 * matrices / layers) / 1e9, 1),
            "GB of adapter, gradient and moments": round(16 * adapter / 1e9, 2),
        }
        print(json.dumps(row, indent=1))


def catalog(count):
    """What looking at so many adapters costs, each in a file, and what each takes of memory."""
    from deltaw.adapters.adapter import Adapter
    from deltaw.api.persona import load_base
    from deltaw.files import adapters
    from deltaw.methods import method
    from deltaw.serve.catalog import Catalog

    base = load_base("smollm2-135m")
    made = Adapter.build(method("lora", rank=1, targets="layers.0.self_attn.q_proj"), base.model)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "personas"
        adapters.save(made, base.header(made, ""), home / "p.safetensors")
        data = (home / "p.safetensors").read_bytes()
        for number in range(1, count):
            (home / f"p{number:06d}.safetensors").write_bytes(data)
        pool = engines.Engine(base.model, 1 << 28).wardrobe
        all_of = Catalog(base.model, base.fingerprint, pool, [home], Path(folder) / "kept")
        held, spent = psutil.Process().memory_full_info().uss, []
        for known in ({}, all_of.sources):
            begun = time.monotonic()
            all_of.update(all_of.found(known))
            spent.append(round(time.monotonic() - begun, 2))
        bytes_ = (psutil.Process().memory_full_info().uss - held) / count
        begun = time.monotonic()
        for number in range(1, 1001):
            all_of.worn(f"p{number % count:06d}" if number % count else "p")
        asked = (time.monotonic() - begun) / 1000
    return {"adapters": count, "first look s": spent[0], "another look s": spent[1], "bytes each": round(bytes_),
            "found by name us": round(1e6 * asked, 1)}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personas", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=450.0, help="requests a second, of all replicas together")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--target", type=float, default=2.0, help="a first token within so many seconds is promised")
    parser.add_argument("--catalog", type=int, help="measure what so many files of adapters cost a server")
    parser.add_argument("--counts", action="store_true", help="bytes and messages of eight processes")
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(1)
    if told.counts:
        return counts()
    if told.catalog:
        return print(json.dumps(catalog(told.catalog)))
    config = ModelConfig.from_hf({"model_type": "llama", "hidden_act": "silu", "vocab_size": 16, "hidden_size": 32,
                                  "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
                                  "intermediate_size": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
                                  "tie_word_embeddings": True}, "")  # fmt: skip
    with torch.device("meta"):
        model = Decoder(config)
    pages = int((MEMORY - WEIGHTS - RESERVED) / PAGE)
    print(
        f"A page has {PAGE / 1e6:.1f} MB, an adapter {ADAPTER / 1e6:.1f} MB: {pages:,} pages a GPU, "
        f"or {int(pages * PAGE / ADAPTER):,} adapters"
    )
    asked = list(requests(told.personas, told.rate, told.seconds, 0))
    rows = [simulated(way, asked, told.target, model)
            for way in ("by chance", "to its persona", "to its persona, or aside")]  # fmt: skip
    for row in rows:
        print(json.dumps(row))
    if told.out:
        (told.out / "scale.json").write_text(json.dumps(rows, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
