"""What listens before replicas, with one in this process, asked as Ray asks it: who is let in, and what it owes."""

import asyncio
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2 as httpx
import pytest
import uvicorn
from ray.exceptions import RayActorError
from web.hubs import saved
from web.test_keys import made

from deltaw.settings import Serving
from deltaw.web.replicas import GROUPS, Replica, front
from deltaw.web.server import bound

PATIENCE = 30
ASK = {"model": "poet", "prompt": "abc", "max_tokens": 4, "temperature": 0}
LONG = {**ASK, "max_tokens": 300, "ignore_eos": True, "stream": True}


class Local:
    """A handle as Ray's: of one replica, which for who asks next dies after `lives` messages.

    `order`: by which messages come, as they would from an engine that has other work.
    """

    def __init__(self):
        self.replica, self.groups, self.lives, self.order = Replica.__new__(Replica), [], None, None

    def options(self, multiplexed_model_id, stream):
        self.groups.append(multiplexed_model_id)
        return self

    @property
    def ask(self):
        return self

    def remote(self, *arguments):
        lives, self.lives = self.lives, None
        return Asked(self.replica.ask(*arguments), lives, self.order if lives is None else None)


class Asked:
    """An answer as Ray gives it: computed ahead, whoever reads it; and given up where it is computed."""

    def __init__(self, answer, lives, order):
        self.heard, self.lives, self.order = asyncio.Queue(), lives, order
        self.task = asyncio.create_task(self.hear(answer))
        self.cancel = self.task.cancel

    async def hear(self, answer):
        if self.order:
            for message in sorted([message async for message in answer], key=self.order):
                self.heard.put_nowait(message)
        async for message in answer:
            self.heard.put_nowait(message)
        self.heard.put_nowait(None)

    async def __aiter__(self):
        told = 0
        while (message := await self.heard.get()) is not None:
            if told == self.lives:
                raise RayActorError
            yield message
            told += 1


@contextmanager
def served(base, home, **told):
    """A front, in a thread; gives its address, and what it asks."""
    keys = made(home / "keys.yaml", **told) if told else None
    serving, local = Serving(port=0, budget_gb=0.02, keys=keys, replicas=2), Local()
    at = bound(serving)
    server = uvicorn.Server(uvicorn.Config(front(local, serving), log_level="warning"))

    async def serve():
        await local.replica.__init__(lambda: base, [home / "personas"], serving)
        await server.serve([at])
        await local.replica.stack.aclose()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        yield f"http://127.0.0.1:{at.getsockname()[1]}", local
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def home(base, tmp_path, monkeypatch):
    async def known(self, group):
        return group

    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Replica, "known", known)
    for n, name in enumerate(("poet", "a:b")):
        saved(base, tmp_path / "personas" / f"{name}.safetensors", "lora", {"rank": 2}, seed=n)
    return tmp_path


def of(name):
    return {"authorization": f"Bearer key-of-{name}"}


def test_what_is_open_to_all_is_open_before_replicas_too(base, home):
    with served(base, home, all={"manage": True}) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as http:
        routes = ("/", "/health", "/healthz", "/readyz", "/docs", "/openapi.json")
        assert [http.get(route).status_code for route in routes] == [200] * 6
        assert [http.get(route).status_code for route in ("/v1/models", "/metrics", "/metrics/routing")] == [401] * 3


def test_a_body_goes_on_as_it_came_and_none_breaks_what_listens(base, home, caplog):
    with served(base, home) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as http:
        assert http.post("/tokenize", json={"model": "poet", "prompt": "abc"}).json()["tokens"] == [64, 65, 66]
        deep = b'{"model": "poet", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        told = {"content-type": "application/json"}
        assert http.post("/v1/completions", content=deep, headers=told).status_code == 400
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as leaving:
            leaving.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{")
        time.sleep(0.2)
    assert "Traceback" not in caplog.text


def test_of_names_that_are_made_up_nothing_is_kept(base, home):
    with served(base, home) as (url, local), httpx.Client(base_url=url, timeout=PATIENCE) as http:
        for name in ("x" * 100_000, "poet", "poet:0.5", "a:b", "", "\ud800"):
            http.post("/v1/completions", content=json.dumps({**ASK, "model": name}),
                      headers={"content-type": "application/json"})  # fmt: skip
        assert all(not group or int(group) < GROUPS for group in local.groups)
        assert local.groups[1] == local.groups[2]
        told = http.get("/metrics/routing").text
        assert re.findall(r'routed_total{loaded="(.*)"} (\S+)', told) == [
            ("no persona", "3.0"),
            ("false", "2.0"),
            ("true", "1.0"),
        ]


def test_a_minute_has_so_many_requests_though_they_come_at_once(base, home):
    with (
        served(base, home, few={"requests_per_minute": 3}) as (url, _),
        httpx.Client(base_url=url, timeout=PATIENCE, headers=of("few")) as http,
        ThreadPoolExecutor(12) as pool,
    ):
        for _ in range(3):  # who is refused has not asked
            assert http.post("/v1/completions", json={**ASK, "model": "nobody"}).status_code == 404
        codes = list(pool.map(lambda _: http.post("/v1/completions", json=ASK).status_code, range(12)))
        assert sorted(codes) == [200] * 3 + [429] * 9


def test_who_leaves_early_owes_what_was_said_nevertheless(base, home):
    with (
        served(base, home, some={"tokens_per_minute": 60}) as (url, _),
        httpx.Client(base_url=url, timeout=PATIENCE, headers=of("some")) as http,
    ):
        with http.stream("POST", "/v1/completions", json=LONG) as reply:
            lines = reply.iter_lines()
            for _ in range(180):
                next(lines)
        time.sleep(0.5)
        assert http.post("/v1/completions", json=ASK).status_code == 200  # which tells
        assert http.post("/v1/completions", json=ASK).status_code == 429


def test_what_one_that_died_told_is_not_told_again_though_another_tells_it_in_another_order(base, home):
    def last_first(message):
        chunk = re.match(rb"data: (\{.*)", message[1].get("body", b""))
        choices = json.loads(chunk[1])["choices"] if chunk else []
        return 0 if "body" not in message[1] else 3 if not choices else 2 - choices[0]["index"]

    def told():
        texts, heads, usage = ["", ""], set(), None
        with http.stream("POST", "/v1/completions", json=asked) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    usage = chunk.get("usage", usage)
                    heads.add((chunk["id"], chunk["created"]))
                    for choice in chunk["choices"]:
                        texts[choice["index"]] += choice["text"]
        return texts, usage, len(heads)

    asked = {**LONG, "max_tokens": 12, "n": 2, "seed": 3, "temperature": 1, "logprobs": 2,
             "stream_options": {"include_usage": True}}  # fmt: skip
    with served(base, home) as (url, local), httpx.Client(base_url=url, timeout=PATIENCE) as http:
        want, local.order = told(), last_first
        for lives in (1, 2, 3, 8, 20, 26):
            local.lives = lives
            assert told() == want, lives
        assert "deltaw_again_total 6.0" in http.get("/metrics/routing").text
