"""Minutes of everything at once: no wrong text, no request without an answer, no leak.

Adapters come, change, go and are damaged, clients leave, bodies are nonsense, the pool is full, the server is killed.
`make soak` does it for half an hour.
"""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2 as httpx
import torch
from oracles import our_logits
from serve.test_engine import model_as
from web.hubs import saved

from deltaw.decode.generate import generate
from deltaw.decode.sampling import Sampling

SECONDS = 60 * float(os.environ.get("DELTAW_SOAK_MINUTES", "2"))
TESTS = Path(__file__).parents[1]
SAID = 10
NEAR = 1e-3
"""Where two tokens are as likely as that, either may be said: such questions are not asked."""
KINDS = [("lora", {"rank": 4}), ("lora", {"rank": 16}), ("dora", {"rank": 2}), ("prefix_tuning", {}), ("full", {})]
GREEDY = Sampling(max_new_tokens=SAID)
LEAK = 1.02
SEEN_SECONDS = 20
NONSENSE = [b"", b"{", b"[]", b"\xff\xfe", b'{"model": 3}', b'{"model": "base", "prompt": [99999], "max_tokens": 2}',
            b'{"model": "base", "prompt": "a", "temperature": -1}', b'{"model": "base", "prompt": "a", "best_of": 7}',
            b'{"model": "nobody", "prompt": "a"}', b'{"model": "base", "prompt": "a", "max_tokens": 1e99}',
            b'{"model": "base", "prompt": "a", "stop": [1]}', b'{"prompt": "a"}', b"[" * 50_000]  # fmt: skip


class Server:
    """A server in a process of its own, that may be killed and begun anew."""

    def __init__(self, base, folder, log):
        self.command = [sys.executable, "-m", "web.soak_server", str(base), str(folder)]
        self.log, self.port, self.kills, self.down = log, 0, 0, False

    def __enter__(self):
        self.begin()
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)
        self.process.stdout.close()

    def begin(self):
        command = [*self.command, str(self.port), "0.004"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=TESTS)
        said = self.process.stdout.readline()
        assert said, Path(self.log.name).read_text()
        self.port = int(said)
        self.url = f"http://127.0.0.1:{self.port}"

    def kill(self):
        self.down = True
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.begin()
        self.kills += 1
        self.down = False

    def memory(self):
        told = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return 1024 * int(re.search(r"Anonymous:\s+(\d+)", told)[1])


class World:
    """What the personas should say: for each name the versions that there were, and since and until when."""

    def __init__(self, base, folder):
        self.base, self.folder, self.versions = base, folder, {}
        self.prompts = [[random.Random(i).randrange(100) for _ in range(3 + 7 * i)] for i in range(5)]
        self.answers = {}
        """By adapter, prompt: text."""
        self.lock, self.made = threading.Lock(), 0
        self.versions["base"] = [(0.0, float("inf"), self.expected(None))]

    def expected(self, adapter):
        """The text that follows each prompt, but where two tokens are about as likely."""
        found = {}
        for n, ids in enumerate(self.prompts):
            with model_as(self.base.model, adapter), torch.no_grad():
                steps = generate(self.base.model, [ids], GREEDY, set(self.base.tokenizer.end_ids))
                said = [token for step in steps for _, token in step]
                logits = our_logits(self.base.model, [*ids, *said])[len(ids) - 1 :]
            best = logits.topk(2).values
            if (best[:, 0] - best[:, 1]).min() > NEAR:
                found[n] = self.base.tokenizer.fast.decode(said, skip_special_tokens=True)
        return found

    def new(self, name):
        """An adapter's file under a name; what was there is replaced at once."""
        self.made += 1
        scratch = self.folder.parent / "made" / f"{self.made}.safetensors"
        kind = KINDS[self.made % len(KINDS)]
        adapter = saved(self.base, scratch, *kind, seed=self.made)
        expected = self.expected(adapter)
        with self.lock:
            scratch.replace(self.folder / f"{name}.safetensors")
            self.end(name)
            self.versions.setdefault(name, []).append((time.monotonic(), float("inf"), expected))

    def end(self, name):
        """The last version of a name ends: by and by, as folders are looked at now and then (the busier, the less)."""
        if self.versions.get(name):
            since, _, expected = self.versions[name][-1]
            self.versions[name][-1] = since, time.monotonic() + SEEN_SECONDS, expected

    def revive(self):
        """After a new beginning, what was taken down and has its file still is there again."""
        with self.lock:
            for versions in self.versions.values():
                versions[-1] = versions[-1][0], float("inf"), versions[-1][2]

    def may(self, name, prompt, began):
        """The texts that may be answered to a prompt that was asked then."""
        with self.lock:
            told = [v[2].get(prompt) for v in self.versions.get(name, []) if v[1] > began]
        return None if None in told else set(told)


class Soak:
    """Those who do everything at once, and what came of it."""

    def __init__(self, world, server):
        self.world, self.server, self.folder = world, server, world.folder
        self.counts, self.wrong, self.memory = Counter(), [], []
        self.over = threading.Event()

    def run(self, seconds):
        """All of them for so long; after a sixth of it the server is killed, and begun anew."""
        works = [self.ask] * 5 + [self.leave] * 2 + [self.babble, self.change]
        workers = [threading.Thread(target=self.again, args=(work, random.Random(i))) for i, work in enumerate(works)]
        for worker in workers:
            worker.start()
        began = time.monotonic()
        while time.monotonic() < began + seconds and not self.wrong:
            time.sleep(0.5)
            if self.server.process.poll() is not None:
                self.wrong.append(f"the server ended: {Path(self.server.log.name).read_text()[-2000:]}")
            elif self.server.kills:
                self.memory.append(self.server.memory())
            elif time.monotonic() > began + seconds / 6:
                self.server.kill()
                self.world.revive()
        self.over.set()
        for worker in workers:
            worker.join()
        self.settle()

    def again(self, work, rng):
        """One's work, over and over; what fails as the server is killed is counted."""
        while not self.over.is_set():
            kills = self.server.kills
            try:
                work(rng)
            except httpx.TransportError as e:
                self.counts["cut by the kill"] += 1
                time.sleep(0.1)
                if kills == self.server.kills and not self.server.down and self.server.process.poll() is None:
                    self.wrong.append(f"no answer: {e!r}")
            except Exception as e:  # a worker that ends would be missed by nobody
                self.wrong.append(repr(e))

    def post(self, route, **more):
        with httpx.Client(base_url=self.server.url, timeout=60) as http:
            return http.post(route, **more)

    def ask(self, rng):
        with self.world.lock:
            name = rng.choice([*self.world.versions])
        n, began = rng.randrange(len(self.world.prompts)), time.monotonic()
        body = body_of(name, self.world.prompts[n], stream=rng.random() < 0.5)
        told = self.post("/v1/completions", json=body)
        self.counts[f"answers {told.status_code}"] += 1
        if told.status_code != 200:
            if told.status_code not in (400, 404, 503):
                self.wrong.append(told.text)
            return
        said = whole(told.text) if body["stream"] else told.json()["choices"][0]["text"]
        may = self.world.may(name, n, began)
        if said is None:
            self.counts["ended within a stream"] += 1
        elif may is None:
            self.counts["texts not compared"] += 1
        elif said in may:
            self.counts["texts compared"] += 1
        else:
            self.wrong.append(f"{name}, {n}: {said!r}, and not one of {may}: {told.text}")

    def leave(self, rng):
        body = body_of(rng.choice("abc"), [7] * rng.randrange(1, 200), stream=True, ignore_eos=True, max_tokens=200)
        with (
            httpx.Client(base_url=self.server.url, timeout=60) as http,
            http.stream("POST", "/v1/completions", json=body) as told,
        ):
            for _ in zip(range(rng.randrange(6)), told.iter_lines(), strict=False):
                pass
        self.counts["clients that left"] += 1
        time.sleep(0.05)

    def babble(self, rng):
        route = rng.choice(["/v1/completions", "/v1/chat/completions", "/v1/adapters"])
        told = self.post(route, content=rng.choice(NONSENSE), headers={"content-type": "application/json"})
        if not 400 <= told.status_code < 500:
            self.wrong.append(f"nonsense was answered: {told.status_code} {told.text}")
        self.counts["nonsense refused"] += 1
        time.sleep(0.05)

    def change(self, rng):
        name = rng.choice("abcdefgh")
        path = self.folder / f"{name}.safetensors"
        kind = rng.choice(["new", "new", "gone", "cut", "spoilt", "taken down"])
        if kind == "new" or not path.exists():
            kind = "new"
            self.world.new(name)
        else:
            with self.world.lock:
                # One that was taken down before its new file was seen is put up again when it is.
                if kind != "taken down" or time.monotonic() - self.world.versions[name][-1][0] > SEEN_SECONDS:
                    self.world.end(name)
            if kind == "gone":
                path.unlink()
            elif kind == "cut":
                os.truncate(path, rng.randrange(path.stat().st_size))
            elif kind == "spoilt":
                with path.open("r+b") as file:
                    file.seek(rng.randrange(path.stat().st_size))
                    file.write(rng.randbytes(40))
            else:
                with httpx.Client(base_url=self.server.url, timeout=60) as http:
                    http.delete(f"/v1/adapters/{name}")
        self.counts[f"adapters {kind}"] += 1
        time.sleep(0.3)

    def settle(self):
        """Once nobody asks any more, no page is held and nobody waits."""
        with httpx.Client(base_url=self.server.url, timeout=60) as http:
            for _ in range(100):
                told = http.get("/metrics").text
                if 'deltaw_pages{state="held"} 0.0' in told and 'deltaw_sequences{state="waiting"} 0.0' in told:
                    return
                time.sleep(0.1)
        self.wrong.append("pages are held by nobody")

    def report(self):
        third = len(self.memory) // 3
        parts = sorted(self.memory[third : 2 * third]), sorted(self.memory[2 * third :])
        megabytes = [part[len(part) // 2] / 1e6 for part in parts if part]
        return {**dict(sorted(self.counts.items())), "kills": self.server.kills, "MB, second third and last": megabytes}


def body_of(name, prompt, **more):
    return {"model": name, "prompt": prompt, "max_tokens": SAID, "temperature": 0, "add_special_tokens": False, **more}


def test_everything_at_once(base, tiny_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (folder := tmp_path / "personas").mkdir()
    world = World(base, folder)
    for name in "abcdef":
        world.new(name)
    with (tmp_path / "log").open("w") as log, Server(tiny_path, folder, log) as server:
        soak = Soak(world, server)
        soak.run(SECONDS)
    report = soak.report()
    with capsys.disabled():
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    assert not soak.wrong, soak.wrong[:5]
    middle, last = report["MB, second third and last"]
    assert last <= LEAK * middle
    assert all(soak.counts[each] for each in ("texts compared", "clients that left", "nonsense refused"))
    assert all(soak.counts[f"adapters {kind}"] for kind in ("new", "gone", "cut", "spoilt", "taken down"))
    assert server.kills == 1


def whole(stream):
    """The text of a stream; None: it ended with a mistake."""
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    if any("error" in event for event in events):
        return None
    return "".join(choice["text"] for event in events for choice in event["choices"])
