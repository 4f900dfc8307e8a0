"""What does a server do that is asked twice as much as it can say?

    python benchmarks/overload.py

Requests of 128 random tokens, each answered by 64, by eight adapters of rank 16 on SmolLM2 in bfloat16. First as many
at once as there are places, which tells what the server can say (its capacity); then requests that come by chance
(Poisson) twice as often as that, for a minute: to a server that takes all of them, and to one that promises a first
token within --target seconds or says when to come again. Then two tenants on the second server: a modest one, that asks
once a second, by itself; and beside a greedy one that asks twice as much as the server can say. Needs a quiet machine.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import beside
import serving

ADAPTERS = [f"a{i:04d}" for i in range(8)]


def keys(path):
    """A file of two tenants, and their keys."""
    from deltaw.web.keys import hashed

    told = {name: {"sha256": hashed(name)} for name in ("modest", "greedy")}
    path.write_text(json.dumps(told))
    return path


@contextmanager
def served(folder, target, at):
    """A server that promises a first token within so many seconds (0: it promises nothing); gives its port."""
    more = ["--keys", str(at), "--first-token-seconds", str(target)]
    with serving.served([folder / name for name in ADAPTERS], more=more) as (port, _):
        yield port


async def one(port, who, name, ids, told):
    """One request; what it had goes into `told`: who asked, when, after how long its first token came, and its end."""
    body = json.dumps({"model": name, "prompt": ids, "max_tokens": serving.SAID, "temperature": 0, "stream": True,
                       "ignore_eos": True}).encode()  # fmt: skip
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    began, first, status = time.perf_counter(), None, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Authorization: Bearer {who}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    async for line in reader:
        status = status or int(line.split()[1])
        if first is None and line.startswith(b"data: {"):
            first = time.perf_counter() - began
    writer.close()
    told.append({"who": who, "began": began, "status": status, "first": first, "end": time.perf_counter()})


async def coming(port, who, rate, seconds, seed, told):
    """Requests that come by chance, so many a second; all are waited for."""
    rng, tasks, until = random.Random(seed), [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        ids = [rng.choice(serving.VOCABULARY) for _ in range(serving.ASKED)]
        tasks.append(asyncio.create_task(one(port, who, rng.choice(ADAPTERS), ids, told)))
        await asyncio.sleep(rng.expovariate(rate))
    await asyncio.gather(*tasks)


async def both(port, *askers):
    """Several at once; gives what all had."""
    told = []
    await asyncio.gather(*(coming(port, *asker, seed, told) for seed, asker in enumerate(askers)))
    return told


def met(port):
    """Meet every adapter, and fill all places, so that the server knows how fast it is; gives requests a second."""

    async def load(count):
        gate, told = asyncio.Semaphore(serving.AT_ONCE), []

        async def gated(name, ids):
            async with gate:
                await one(port, "greedy", name, ids, told)

        began = time.perf_counter()
        await asyncio.gather(*(gated(*each) for each in serving.asked(ADAPTERS, count)[:count]))
        return count / (time.perf_counter() - began)

    asyncio.run(load(64))
    return asyncio.run(load(128))


def p95(values):
    """The value below which 95 of 100 are."""
    return sorted(values)[int(0.95 * len(values))] if values else None


def told_of(side, told, target, seconds):
    """A row: what those had who were answered, and how many were not."""
    start = min(each["began"] for each in told)
    well = [each for each in told if each["status"] == 200]
    lost = [each for each in told if each["status"] not in (200, 503)]
    if lost:
        sys.exit(f"{len(lost)} requests had no answer: {lost[0]}")
    ended = [each for each in well if 10 <= each["end"] - start <= seconds]
    return {"side": side, "requests": len(told), "answered": len(well), "refused": len(told) - len(well),
            "tokens_per_second": len(ended) * serving.SAID / (seconds - 10),
            "first_p50": sorted(each["first"] for each in well)[len(well) // 2],
            "first_p95": p95([each["first"] for each in well]),
            "in_time": sum(each["first"] <= target for each in well) / len(well)}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=2.0, help="seconds to a first token; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each load; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where adapters are made and kept; default: nowhere")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder; default: %(default)s")
    args = parser.parse_args()
    rows = []

    def row(side, told):
        each = told_of(side, told, args.target, args.seconds)
        rows.append(each)
        print(f"| {side} | {each['requests']} | {each['refused']} | {each['tokens_per_second']:.0f} | "
              f"{each['first_p50']:.2f}, {each['first_p95']:.2f} s | {each['in_time']:.1%} |", flush=True)  # fmt: skip

    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        serving.made(folder, len(ADAPTERS), serving.RANK, beside.base())
        at = keys(Path(scratch) / "keys.yaml")
        print(f"| | requests | told to come again | tokens/s | first token p50, p95 | within {args.target:g} s |")
        print("|---|---|---|---|---|---|")
        for side, target in (("takes all", 0), ("promises", args.target)):
            with served(folder, target, at) as port:
                told = met(port)
                if not target:
                    rate = told
                    print(f"What it can say: {rate:.2f} requests a second.", file=sys.stderr)
                row(side, asyncio.run(both(port, ("greedy", 2 * rate, args.seconds))))
                if target:
                    row("modest, alone", asyncio.run(both(port, ("modest", 1.0, args.seconds))))
                    told = asyncio.run(both(port, ("greedy", 2 * rate, args.seconds), ("modest", 1.0, args.seconds)))
                    row("modest, beside greedy", [each for each in told if each["who"] == "modest"])
                    row("greedy, beside modest", [each for each in told if each["who"] == "greedy"])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "overload.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
