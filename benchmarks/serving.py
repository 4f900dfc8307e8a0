"""How many tokens a second does a server say, by how many adapters its requests wear?

    make bench-peers
    python benchmarks/serving.py                          # base, 1, 8, 64 and 256 adapters; PEFT with none, 8 and 32
    benchmarks/peers/vllm.sh && python benchmarks/serving.py --vllm 0 1 8 64 256   # vLLM too
    python benchmarks/serving.py --scale                  # 2,000 of rank 8 on disk, 1 GiB for them and all pages

128 requests of 128 random tokens, each answered by 64, 32 at a time (closed loop, greedy, streamed); random adapters of
rank 16 on all linear layers of SmolLM2 in bfloat16, of which each request draws one. The median of three runs on one
server after one that is not counted, before which each adapter was met; memory is what the server's process holds for
itself (smaps' Anonymous) at most. PEFT answers batches of 32 with `adapter_names`, without a server. Needs a quiet
machine, and 5 GB of disk (--scale: 20).
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import beside
import psutil

REQUESTS, AT_ONCE, ASKED, SAID, RANK = 128, 32, 128, 64, 16
VOCABULARY = range(100, 49152)
OURS, THEIRS = (0, 1, 8, 64, 256), (0, 8, 32)
SCALE, SCALE_RANK = 2000, 8


def made(folder, count, rank, model):
    """So many adapters as PEFT writes them, with random numbers; those that are there are kept."""
    import torch
    from safetensors.torch import save_file

    c = json.loads((model / "config.json").read_text())
    width, inner = c["hidden_size"], c["intermediate_size"]
    head = c.get("head_dim") or width // c["num_attention_heads"]
    q, kv = head * c["num_attention_heads"], head * c["num_key_value_heads"]
    sizes = {"self_attn.q_proj": (width, q), "self_attn.k_proj": (width, kv), "self_attn.v_proj": (width, kv),
             "self_attn.o_proj": (q, width), "mlp.gate_proj": (width, inner), "mlp.up_proj": (width, inner),
             "mlp.down_proj": (inner, width)}  # fmt: skip
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
            "base_model_name_or_path": str(model), "target_modules": [n.split(".")[1] for n in sizes]}  # fmt: skip
    for number in range(count):
        home = folder / f"a{number:04d}"
        if (home / "adapter_config.json").exists():
            continue
        home.mkdir(parents=True)
        rng, tensors = torch.Generator().manual_seed(number), {}
        for layer in range(c["num_hidden_layers"]):
            for name, (i, o) in sizes.items():
                at = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{at}.lora_A.weight"] = (torch.randn(rank, i, generator=rng) / i**0.5).bfloat16()
                tensors[f"{at}.lora_B.weight"] = (torch.randn(o, rank, generator=rng) * 0.01).bfloat16()
        save_file(tensors, home / "adapter_model.safetensors", metadata={"format": "pt"})
        (home / "adapter_config.json").write_text(json.dumps(told))
    return folder


def asked(names, seed, power=False):
    """Requests: what they ask of whom; uniform, or by a power law as S-LoRA's traces have it."""
    rng = random.Random(seed)
    weights = [1 / (k + 1) for k in range(len(names))] if power else None
    return [(rng.choices(names, weights)[0], [rng.choice(VOCABULARY) for _ in range(ASKED)]) for _ in range(REQUESTS)]


@contextmanager
def served(personas, budget_gb=1.0, more=()):
    """A server in a process of its own; gives its port and its process."""
    command = [sys.executable, "-m", "deltaw.cli", "serve", "--base", "smollm2-135m", "--port", "0",
               "--budget-gb", str(budget_gb), "--most", str(AT_ONCE), *more,
               "--personas", *map(str, personas)]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as p:
        port = int(re.search(r"http://[\d.]+:(\d+)", p.stdout.readline())[1])
        try:
            yield port, p
        finally:
            p.terminate()


@contextmanager
def vllm_served(personas, path):
    """vLLM for CPUs, as its handbook starts it; gives its port and the process that holds the model."""
    home, port = Path(".venv-vllm").absolute(), 8123
    command = [home / "bin/vllm", "serve", path, "--served-model-name", "base", "--dtype", "bfloat16", "--port", port,
               "--max-model-len", 1024, "--max-num-seqs", AT_ONCE, "--no-enable-prefix-caching"]  # fmt: skip
    if personas:
        command += ["--enable-lora", "--max-lora-rank", RANK, "--max-loras", min(AT_ONCE, len(personas)),
                    "--max-cpu-loras", max(64, len(personas)), "--lora-modules",
                    *(f"{folder.name}={folder}" for folder in personas)]  # fmt: skip
    cores = f"0-{len(os.sched_getaffinity(0)) - 1}"
    more = {"LD_PRELOAD": f"libtcmalloc_minimal.so.4:{home}/lib/libiomp5.so", "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip
    # In a group of its own: it has children, which are to end too.
    with tempfile.TemporaryFile("w+") as told, subprocess.Popen(
        [*map(str, command)], stdout=told, stderr=told, env={**os.environ, **more}, start_new_session=True
    ) as p:  # fmt: skip
        try:
            for _ in range(600):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if p.poll() is not None:
                    told.seek(0)
                    sys.exit(told.read()[-3000:])
                time.sleep(1)
            yield port, max(psutil.Process(p.pid).children(recursive=True), key=lambda each: each.memory_info().rss)
        finally:
            os.killpg(p.pid, signal.SIGTERM)


async def answered(port, name, ids):
    """One request; gives when its first token came and when its last did, and how many there were."""
    body = json.dumps({"model": name, "prompt": ids, "max_tokens": SAID, "temperature": 0, "stream": True,
                       "ignore_eos": True, "stream_options": {"include_usage": True}}).encode()  # fmt: skip
    began, times, said = time.perf_counter(), [], 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                 b"Connection: close\r\nContent-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body)  # fmt: skip
    async for line in reader:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
            if b'"usage"' in line:
                said = json.loads(line[6:])["usage"]["completion_tokens"]
    writer.close()
    if said != SAID:
        sys.exit(f"{name} was not answered.")
    return times[0] - began, (times[-2] - times[0]) / (SAID - 1)


async def load(port, requests):
    """All requests, so many at once; gives seconds and what each had."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(name, ids):
        async with gate:
            return await answered(port, name, ids)

    began = time.perf_counter()
    got = await asyncio.gather(*(one(*request) for request in requests))
    return time.perf_counter() - began, got


class Watched:
    """The most anonymous memory of a process, looked at five times a second."""

    def __init__(self, pid):
        self.pid, self.most, self.over = pid, 0, threading.Event()
        threading.Thread(target=self.look, daemon=True).start()

    def look(self):
        while not self.over.wait(0.2):
            told = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
            self.most = max(self.most, 1024 * int(re.search(r"Anonymous:\s+(\d+)", told)[1]))


def ours(folder, count, runs, power=False, total=None, path=None, more=()):
    """Runs of one server, vLLM's if `path` is a model's; the first is not counted."""
    names = [f"a{i:04d}" for i in range(count)] or ["base"]
    folders = [folder] if total else [folder / name for name in names if count]
    with vllm_served(folders, path) if path else served(folders, more=more) as (port, process):
        watched, found = Watched(process.pid), []
        if count and not total:
            asyncio.run(load(port, [(name, [1] * 8) for name in names]))
        for seed in range(runs + 1):
            seconds, got = asyncio.run(load(port, asked(names, seed, power)))
            first, each = (sorted(times) for times in zip(*got, strict=True))
            found.append({"tokens_per_second": REQUESTS * SAID / seconds, "first_p50": first[len(first) // 2],
                          "first_p95": first[int(len(first) * 0.95)], "each_p50": each[len(each) // 2]})  # fmt: skip
        watched.over.set()
    kept = {key: statistics.median(each[key] for each in found[1:]) for key in found[0]}
    return {**kept, "runs": [each["tokens_per_second"] for each in found], "anonymous_bytes": watched.most}


def theirs(folder, count, path):
    """PEFT's mixed batches, of 32, one after another."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    names = [f"a{i:04d}" for i in range(int(count))]
    for name in names:
        if isinstance(model, PeftModel):
            model.load_adapter(f"{folder}/{name}", adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, f"{folder}/{name}", adapter_name=name)
    requests, found = asked(names or ["base"], 1), []
    for _ in range(2):
        began = time.perf_counter()
        for at in range(0, REQUESTS, AT_ONCE):
            some = requests[at : at + AT_ONCE]
            ids = torch.tensor([ids for _, ids in some])
            more = {"adapter_names": [name for name, _ in some]} if names else {}
            with torch.inference_mode():
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=SAID,
                               min_new_tokens=SAID, pad_token_id=0, **more)  # fmt: skip
        found.append(REQUESTS * SAID / (time.perf_counter() - began))
    return {"tokens_per_second": found[-1], "runs": found, "peak_bytes": beside.peak_bytes()}


def measured(args, folder):
    """Rows, as they come."""
    path = beside.base()
    if args.scale:
        made(folder, SCALE, SCALE_RANK, path)
        for met in ("met anew", "laid before"):  # the second time, every adapter was laid into a file by the first
            for power, count in ((False, 8), (True, SCALE), (False, SCALE)):
                name = f"deltaw, {'power law' if power else 'uniform'}, {met}"
                yield {"side": name, "adapters": count, **ours(folder, count, args.runs, power, total=True)}
        return
    made(folder, max([*args.adapters, 32]), RANK, path)
    for count in args.adapters:
        yield {"side": f"deltaw {args.more}".strip(), "adapters": count,
               **ours(folder, count, args.runs, more=args.more.split())}  # fmt: skip
    for count in args.vllm:
        yield {"side": "vLLM", "adapters": count, **ours(folder, count, args.runs, path=path)}
    for count in args.peft:
        yield {"side": "PEFT", "adapters": count, **beside.alone(__file__, "peft", folder, count, path)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="*", type=int, default=OURS, help="default: %(default)s")
    parser.add_argument("--peft", nargs="*", type=int, default=THEIRS, help="default: %(default)s")
    parser.add_argument("--vllm", nargs="*", type=int, default=(), help="after benchmarks/peers/vllm.sh; default: none")
    parser.add_argument("--scale", action="store_true", help="2,000 adapters")
    parser.add_argument("--more", default="", help="what our server is told beside, such as --more='--replicas 2'")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where adapters are made and kept; default: nowhere")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="a folder; default: %(default)s")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(theirs(*args.one[1:])))
        return 0
    done = []
    print("| side | adapters | tokens/s | first token p50, p95 | a token p50 | memory |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for row in measured(args, args.folder or Path(scratch)):
            done.append(row)
            first = f"{row['first_p50']:.2f}, {row['first_p95']:.2f} s | {1e3 * row['each_p50']:.0f} ms" if (
                "first_p50" in row) else "| "  # fmt: skip
            print(f"| {row['side']} | {row['adapters']:,} | {row['tokens_per_second']:.0f} | {first} "
                  f"| {row.get('anonymous_bytes', row.get('peak_bytes')) / 1e9:.2f} GB |", flush=True)  # fmt: skip
            beside.keep("scale" if args.scale else "serving", done, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
