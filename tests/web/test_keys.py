"""Who may ask what: keys, what each sees, how much it may, and that nothing of one is seen by another."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx2 as httpx
import openai
import pytest
import yaml
from serve.integrity import check
from web.hubs import running, saved
from web.test_server import until

from deltaw.cli import app
from deltaw.errors import UserError
from deltaw.settings import Rights, Serving
from deltaw.web import keys
from deltaw.web.keys import Bucket, Keys, Tenant, TooMuch, hashed

SECONDS = 60
ASK = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(keys, "monotonic", lambda: now[0])
    return now


def test_a_minute_has_so_much_and_no_more(clock):
    bucket, taken = Bucket("things", 6), 0
    for _ in range(6):
        bucket.take(1)
    for _ in range(240):  # a second each
        clock[0] += 1
        with contextlib.suppress(TooMuch):
            bucket.take(1)
            taken += 1
    assert taken == 24
    with pytest.raises(TooMuch, match=r"6 things a minute\. Ask again in 10 s") as told:
        bucket.take(1)
    clock[0] += told.value.seconds
    bucket.take(1)
    clock[0] += 3600
    for _ in range(6):
        bucket.take(1)  # what was not used is kept for a minute only
    with pytest.raises(TooMuch):
        bucket.take(1)


def test_tokens_that_were_said_are_owed(clock):
    tenant = Tenant("a", Rights(tokens_per_minute=60, requests_per_minute=100))
    tenant.ask()
    tenant.had(50, requests=1)
    tenant.had(100)
    with pytest.raises(TooMuch, match="60 tokens") as told:
        tenant.ask()
    assert told.value.seconds == 91
    assert tenant.requests.room == 99  # who is not answered has sent nothing
    clock[0] += 91
    tenant.ask()


def made(path, **rights):
    """A file of keys that are called as their names are."""
    told = {name: {"sha256": hashed(f"key-of-{name}"), **more} for name, more in rights.items()}
    path.write_text(yaml.safe_dump(told))
    return path


@pytest.fixture
def home(base, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    for n, name in enumerate(("poet", "chef")):
        saved(base, tmp_path / "personas" / f"{name}.safetensors", "lora", {"rank": 2}, seed=n)
    return tmp_path


@contextlib.contextmanager
def served(base, home, told, **more):
    path = made(home / "keys.yaml", **told)
    with running(base, [home / "personas"], Serving(port=0, budget_gb=0.02, keys=path, **more)) as (url, hub):
        yield url, hub, path
        hub.service.do(partial(check, hub.service.engine)).result(10)


class http:
    """Who asks with the key of a name; each request is a connection of its own."""

    def __init__(self, url, name):
        self.told = {"base_url": url, "timeout": SECONDS, "headers": {"authorization": f"Bearer key-of-{name}"}}

    def request(self, method, route, **more):
        with httpx.Client(**self.told) as client:
            return client.request(method, route, **more)

    def __getattr__(self, method):
        return partial(self.request, method.upper())


def test_each_key_sees_its_own_personas_and_has_its_own_rights(base, home):
    told = {"all": {"manage": True}, "one": {"personas": ["poet"]}, "bare": {"personas": ["base"]}}
    with served(base, home, told) as (url, hub, _):
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert http(url, "nobody").get("/v1/models").status_code == 401
        names = {name: {card["id"] for card in http(url, name).get("/v1/models").json()["data"]} for name in told}
        assert names == {"all": {hub.name, "poet", "chef"}, "one": {"poet"}, "bare": {hub.name}}
        one = http(url, "one")
        assert str(home) not in one.get("/v1/models").text + one.get("/v1/models/poet").text
        assert str(home) in http(url, "all").get("/v1/models/poet").text
        assert one.post("/v1/completions", json={**ASK, "model": "poet"}).status_code == 200
        for model in ("chef", "base", hub.name, "poet+chef", "chef:0.5", "che"):
            there = one.post("/v1/completions", json={**ASK, "model": model})
            assert there.status_code == 404
            assert "Did you" not in there.text or "chef" not in there.json()["error"]["message"].partition("'.")[2]
            chat = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
            assert one.post("/v1/chat/completions", json=chat).status_code == 404
        assert one.get("/v1/models/chef").text == one.get("/v1/models/chof").text.replace("chof", "chef")
        for method, route in (("GET", "/metrics"), ("DELETE", "/v1/adapters/poet"), ("POST", "/v1/adapters")):
            assert one.request(method, route, json={"name": "x", "path": "y"}).status_code == 403
        assert one.post("/v1/adapters/upload", data={"name": "x"}, files={"files": b""}).status_code == 403
        assert one.post("/v1/completions", json={**ASK, "model": "poet:0.123"}).status_code == 200
        text = http(url, "all").get("/metrics").text
        assert 'persona="poet"' in text
        assert "0.123" not in text  # there is no end of weights
        assert 'deltaw_key_requests_total{key="one"} 2.0' in text
        assert 'deltaw_key_tokens_total{key="one"} 14.0' in text
        assert http(url, "all").delete("/v1/adapters/poet").status_code == 200


def test_openais_client_is_told_to_wait_and_does(base, home):
    with served(base, home, {"few": {"requests_per_minute": 60}}) as (url, _, _):
        ask = dict(model="poet", prompt="a", max_tokens=1)  # noqa: C408 (keywords)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="key-of-few", max_retries=0) as client:
            for _ in range(60):
                client.completions.create(**ask)
            with pytest.raises(openai.RateLimitError, match="60 requests a minute") as told:
                [client.completions.create(**ask) for _ in range(40)]
            assert told.value.response.headers["retry-after"] == "1"
            began = time.monotonic()
            for _ in range(3):  # of which there was less than one left, and one comes each second
                client.with_options(max_retries=5).completions.create(**ask)
            assert time.monotonic() - began > 1.5


def test_what_one_key_asked_is_not_known_to_another_unless_that_is_said(base, home):
    prompt = list(range(100, 164))

    def known(url, hub, name):
        """How many tokens of the prompt were not computed anew."""
        parts, engine = [], hub.service.engine
        plan = engine.plan
        engine.plan = lambda: parts.append(plan()) or parts[-1]
        told = http(url, name).post("/v1/completions", json={**ASK, "model": "poet", "prompt": prompt}).json()
        engine.plan = plan
        read = next(count for step in parts for _, count in step)
        return len(prompt) - read, told["choices"][0]["text"]

    for shared in (False, True):
        with served(base, home, {"a": {}, "b": {}}, share_prefixes=shared) as (url, hub, _):
            first = known(url, hub, "a")
            assert first[0] == 0
            assert known(url, hub, "b") == (32 if shared else 0, first[1])
            assert known(url, hub, "b")[0] == 32


def test_a_file_of_keys_that_changes_counts_at_once_and_a_broken_one_changes_nothing(base, home):
    with served(base, home, {"a": {}, "b": {"requests_per_minute": 2}}) as (url, _, path):
        ask = {**ASK, "model": "base"}
        assert [http(url, "b").post("/v1/completions", json=ask).status_code for _ in range(3)] == [200, 200, 429]
        path.write_text("a: [")
        assert http(url, "a").get("/v1/models").status_code == 200
        made(path, b={"requests_per_minute": 2}, c={})
        assert [http(url, name).get("/v1/models").status_code for name in "abc"] == [401, 200, 200]
        assert http(url, "b").post("/v1/completions", json=ask).status_code == 429  # it has not become another
        path.unlink()
        assert http(url, "c").get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    "told",
    [
        "a: 3",
        f"a: {{sha256: {'0' * 64}, personas: }}",
        "a: {personas: [b]}",
        "a: {sha256: '00'}",
        f"a: {{sha256: {'0' * 64}, x: 1}}",
    ],
)
def test_a_file_that_says_something_else_is_a_mistake_with_its_place(tmp_path, told):
    (tmp_path / "keys.yaml").write_text(told)
    with pytest.raises(UserError, match=r"keys\.yaml"):
        Keys(tmp_path / "keys.yaml", "")


def test_a_key_is_printed_once_and_only_its_hash_is_kept(tmp_path, capsys):
    path = tmp_path / "keys.yaml"
    more = ["--personas", "poet", "--personas", "chef", "--tokens-per-minute", "9", "--manage", "--priority", "-1"]
    assert app.run(["key", "shop", "--file", str(path), *more]) == 0
    assert app.run(["key", "other", "--file", str(path)]) == 0
    first, second = capsys.readouterr().out.split()
    assert len(first) > 40
    assert first != second
    assert first not in path.read_text()
    found = Keys(path, "")
    assert found.of(first).name == "shop"
    assert found.of(first).rights == Rights(personas=("poet", "chef"), tokens_per_minute=9, manage=True, priority=-1)
    assert (found.of(second).name, found.of(second).rights) == ("other", Rights())
    assert found.of("") is None
    assert app.run(["key", "shop", "--file", str(path)]) == 2
    assert app.run(["key", "../x", "--file", str(path)]) == 2


def test_a_request_may_be_so_large_and_take_so_long(base, home):
    told = {"a": {"manage": True}, "b": {}}
    with served(base, home, told, body_mb=0.01, upload_mb=0.05, request_seconds=0.3) as (
        url,
        hub,
        _,
    ):
        client = http(url, "a")
        told = client.post("/v1/completions", json={**ASK, "model": "base", "prompt": "a" * 20_000})
        assert (told.status_code, "0.01 MB" in told.json()["error"]["message"]) == (413, True)
        chunks = (b"a" * 1000 for _ in range(20))  # whose length nobody tells before
        assert client.post("/v1/completions", content=chunks).status_code == 413
        many = {"data": {"name": "x"}, "files": [("files", ("adapter.safetensors", b"0" * 60_000))]}
        assert client.post("/v1/adapters/upload", **many).status_code == 413
        assert not (home / "personas" / "x").exists()
        many["files"] = [("files", ("adapter.safetensors", b"0" * 30_000))]
        assert client.post("/v1/adapters/upload", **many).status_code == 400
        assert http(url, "b").post("/v1/adapters/upload", **many).status_code == 413  # it may not, and sends no more
        step, gate = hub.service.engine.step, threading.Event()
        hub.service.engine.step = lambda: gate.wait(5) and step()
        told = client.post("/v1/completions", json={**ASK, "model": "base", "max_tokens": 50})
        gate.set()
        assert (told.status_code, told.json()["error"]["message"]) == (504, "This took longer than 0.3 s.")
        hub.service.engine.step, gate = step, threading.Event()
        hub.service.do(lambda: gate.wait(5))  # so that nobody is let in
        assert client.post("/v1/completions", json={**ASK, "model": "base"}).status_code == 504
        gate.set()
        until(lambda: not hub.service.do(lambda: len(hub.service.engine.running)).result(10))


def test_who_brings_no_key_is_told_so_before_a_body_is_there(base, home):
    with served(base, home, {"a": {}}) as (url, _, _):
        port = int(url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 10) as s:
            s.sendall(b"POST /v1/adapters/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n")
            assert s.recv(1000).startswith(b"HTTP/1.1 401")


def test_who_would_wait_too_long_is_told_when_to_come_again(base, home, monkeypatch):
    told = {"a": {"requests_per_minute": 2}, "boss": {"manage": True}}
    with served(base, home, told, first_token_seconds=1.0) as (url, hub, _):
        ask = partial(http(url, "a").post, "/v1/completions", json={**ASK, "model": "base"})
        assert ask().status_code == 200
        monkeypatch.setattr(hub.service.engine.waiting, "wait", lambda _: 5.5)
        told = ask()
        assert (told.status_code, told.headers["retry-after"]) == (503, "5")
        assert "Ask again in 5 s" in told.json()["error"]["message"]
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="key-of-a", max_retries=0) as client,
            pytest.raises(openai.InternalServerError, match="Ask again"),
        ):
            client.completions.create(model="base", prompt=[5] * 300, stream=True)
        assert 'deltaw_refused_total{key="a",why="Busy"} 2.0' in http(url, "boss").get("/metrics").text
        monkeypatch.undo()
        assert [ask().status_code, ask().status_code] == [200, 429]  # those who were refused have had nothing


def test_who_asks_at_once_is_let_in_no_more_often_than_one_after_another(base, home):
    with served(base, home, {"a": {"requests_per_minute": 1}}) as (url, hub, _), ThreadPoolExecutor() as clients:
        gate = threading.Event()
        hub.service.do(lambda: gate.wait(10))  # nobody is let in yet
        asked = [clients.submit(http(url, "a").post, "/v1/completions", json={**ASK, "model": "base"}) for _ in "abc"]
        until(lambda: sum(each.done() for each in asked) == 2)
        gate.set()
        assert sorted(each.result().status_code for each in asked) == [200, 429, 429]


def test_health_tells_the_truth(base, home, monkeypatch):
    monkeypatch.setattr("deltaw.serve.service.STUCK_SECONDS", 0.2)
    with served(base, home, {"a": {}}) as (url, hub, _):
        ready = lambda: httpx.get(f"{url}/readyz")  # noqa: E731
        time.sleep(0.4)
        assert ready().json() == {"status": "ok"}  # nothing to do is well
        step, gate = hub.service.engine.step, threading.Event()
        hub.service.engine.step = lambda: gate.wait(5) and step()
        ask = {"json": {**ASK, "model": "base"}}
        asking = threading.Thread(target=http(url, "a").post, args=("/v1/completions",), kwargs=ask)
        asking.start()
        until(lambda: ready().json() == {"status": "stuck"})
        assert ready().status_code == 503
        gate.set()
        asking.join()
        hub.service.engine.step = step
        until(lambda: ready().status_code == 200)
        hub.ending = True
        assert (ready().status_code, ready().json()) == (503, {"status": "ending"})
