"""A server at work: adapters come and go, clients leave, keys are asked for, what is measured is true; its end."""

import errno
import json
import os
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from serve.integrity import check
from web.hubs import peft_folder, running, saved

from deltaw.errors import UserError
from deltaw.serve.catalog import adapters_in
from deltaw.settings import Serving
from deltaw.web.server import bound

PATIENCE = 30
ASK = {"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0}
LONG = {"prompt": [5, 6, 7], "max_tokens": 400, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def shelf(base, tmp_path, monkeypatch):
    """A server of its own, whose folder has one persona."""
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "personas"
    saved(base, home / "one.safetensors", "lora", {"rank": 2}, seed=1)
    with (
        running(base, [home], Serving(port=0, budget_gb=0.02)) as (url, hub),
        httpx.Client(base_url=url, timeout=PATIENCE) as http,
    ):
        yield http, home, hub
        hub.service.do(partial(check, hub.service.engine)).result(PATIENCE)


def text(http, model, **more):
    told = http.post("/v1/completions", json={**ASK, "model": model, **more}).json()
    return told["choices"][0]["text"] if "choices" in told else told["error"]["message"]


def names(http):
    return {card["id"] for card in http.get("/v1/models").json()["data"][1:]}


def until(true):
    end = time.monotonic() + PATIENCE
    while not (got := true()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return got


def test_an_adapter_is_put_up_by_its_path_and_taken_down(shelf, base):
    http, home, _ = shelf
    saved(base, home / "deep" / "two.safetensors", "lora", {"rank": 3}, seed=2)
    told = http.post("/v1/adapters", json={"name": "two", "path": str(home / "deep" / "two.safetensors")})
    assert told.status_code == 201
    assert (told.json()["rank"], told.json()["state"]) == (3, "known")
    assert text(http, "two") != text(http, "one")
    assert http.delete("/v1/adapters/two").json()["deleted"]
    assert http.delete("/v1/adapters/two").status_code == 404
    assert http.post("/v1/completions", json={**ASK, "model": "two"}).status_code == 404
    assert (home / "deep" / "two.safetensors").exists()


def test_what_does_not_fit_is_refused_with_all_that_does_not(shelf, base, tmp_path):
    http, home, _ = shelf
    folder = peft_folder(home / "cold", base)
    (folder / "adapter_model.safetensors").write_bytes(foreign_tensors(folder))
    told = http.post("/v1/adapters", json={"name": "cold", "path": str(folder)})
    assert told.status_code == 400
    assert all(f"layers.{n}.self_attn.q_proj.lora_A.weight" in told.json()["error"]["message"] for n in (7, 8))
    outside = saved(base, tmp_path / "outside.safetensors", "lora", {}) and tmp_path / "outside.safetensors"
    for path, why in (
        (outside, "none of the folders"),
        (home / "nothing", "no adapter"),
        (home / ".." / "x", "none of"),
    ):
        told = http.post("/v1/adapters", json={"name": "x", "path": str(path)})
        assert told.status_code == 400
        assert why in told.json()["error"]["message"]
    for name in ("base", "a/b", "", "-x", base.path.name):
        assert http.post("/v1/adapters", json={"name": name, "path": str(home / "one.safetensors")}).status_code == 400
    assert "cold" not in names(http) or text(http, "cold")


def foreign_tensors(folder):
    """The folder's tensors, of layers that the base has not."""
    from safetensors.torch import load, save

    tensors = load((folder / "adapter_model.safetensors").read_bytes())
    return save({k.replace("layers.0", f"layers.{n}"): t.clone() for k, t in tensors.items() for n in (7, 8)})


@pytest.mark.parametrize(("route", "body"), [
    ("/v1/completions", {**ASK, "model": "base", "max_tokens": 10**10}),
    ("/v1/completions", {**ASK, "model": "base", "min_tokens": 10**30}),
    ("/v1/completions", {**ASK, "model": "base", "top_k": 10**30}),
    ("/v1/completions", {**ASK, "model": "base", "prompt": [10**30]}),
    ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "a"}],
                              "max_completion_tokens": 10**10}),
    ("/detokenize", {"tokens": [2**40]}),
    ("/v1/adapters", {"name": "x", "path": "a\0b"}),
    ("/v1/completions", {**ASK, "model": "base", "structured_outputs": {"regex": "\ud800"}}),
    ("/tokenize", {"prompt": "\ud800"}),
    ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "a\0b"}),
])  # fmt: skip
def test_numbers_and_paths_that_are_none_are_mistakes_of_who_asks(shelf, route, body):
    http, _, _ = shelf
    told = http.post(route, content=json.dumps(body), headers={"content-type": "application/json"})
    assert told.status_code == 400, told.text
    assert told.json()["error"]["type"] == "invalid_request_error"


def test_an_adapter_is_uploaded_in_either_form_and_nothing_is_left_of_a_bad_one(shelf, base, tmp_path):
    http, home, _ = shelf
    saved(base, tmp_path / "adapter.safetensors", "lora", {"rank": 5}, seed=5)
    files = [("files", ("adapter.safetensors", (tmp_path / "adapter.safetensors").read_bytes()))]
    assert http.post("/v1/adapters/upload", data={"name": "up"}, files=files).json()["rank"] == 5
    assert text(http, "up") != text(http, "one")
    pefted = peft_folder(tmp_path / "p", base)
    files = [("files", (p.name, p.read_bytes())) for p in pefted.iterdir()]
    assert http.post("/v1/adapters/upload", data={"name": "pefted"}, files=files).status_code == 201
    assert text(http, "pefted") != text(http, "up")
    for name, parts in (("bad", [("files", ("adapter.safetensors", b"nothing"))]), ("half", files[:1]),
                        ("twice", [*files, files[0]]), ("up", files), ("one", files), ("n" * 101, files),
                        ("sly", [("files", ("../x.safetensors", b""))])):  # fmt: skip
        assert http.post("/v1/adapters/upload", data={"name": name}, files=parts).status_code == 400, name
    assert {p.name for p in home.iterdir()} == {"one.safetensors", "up", "pefted"}
    assert {name for name, _ in adapters_in(home)} == {"one", "up", "pefted"}
    http.delete("/v1/adapters/up")
    again = http.post("/v1/adapters/upload", data={"name": "up"}, files=files)
    assert (again.status_code, "Here are files already" in again.text) == (400, True)


def test_of_uploads_of_one_name_at_once_one_is_taken(shelf, base, tmp_path):
    http, home, _ = shelf
    saved(base, tmp_path / "adapter.safetensors", "lora", {"rank": 5}, seed=5)
    files = [("files", ("adapter.safetensors", (tmp_path / "adapter.safetensors").read_bytes()))]
    with ThreadPoolExecutor(6) as pool:
        codes = list(pool.map(lambda _: http.post("/v1/adapters/upload", data={"name": "up"}, files=files).status_code,
                              range(6)))  # fmt: skip
    assert sorted(codes) == [201, *[400] * 5]
    assert text(http, "up") != text(http, "one")
    assert (home / "up").exists()


def test_what_another_replica_was_given_meanwhile_stays(shelf, base, tmp_path, monkeypatch):
    http, home, _ = shelf
    saved(base, tmp_path / "adapter.safetensors", "lora", {"rank": 5}, seed=5)
    files = [("files", ("adapter.safetensors", (tmp_path / "adapter.safetensors").read_bytes()))]
    copy = shutil.copyfileobj

    def slowly(told, file):
        copy(told, file)
        (home / "up" / "adapter").mkdir(parents=True)
        shutil.copy(tmp_path / "adapter.safetensors", home / "up" / "adapter")

    with monkeypatch.context() as patch:
        patch.setattr("deltaw.web.adapters.shutil.copyfileobj", slowly)
        refused = http.post("/v1/adapters/upload", data={"name": "up"}, files=files)
    assert (refused.status_code, "Here are files already" in refused.text) == (400, True)
    assert [path.name for path in (home / "up").rglob("*.safetensors")] == ["adapter.safetensors"]


def test_names_that_are_no_text_stop_neither_the_server_nor_its_eyes(shelf, base):
    http, home, hub = shelf
    Path(os.fsdecode(os.fsencode(home) + b"/\xff.safetensors")).write_bytes(b"nothing")
    folder = peft_folder(home / "odd", base)
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": "\ud800"}))
    peft_folder(home / "lost", base)
    (home / "lost" / "adapter_config.json").unlink()
    until(lambda: {"one", "odd", "lost", "?"} <= names(http))
    assert "adapter_config.json" in http.get("/v1/models/lost").json()["fault"]
    found = hub.catalog.found
    hub.catalog.found = lambda _: 1 / 0
    time.sleep(2.5)
    hub.catalog.found = found
    saved(base, home / "late.safetensors", "lora", {"rank": 2}, seed=4)
    until(lambda: "late" in names(http))


def test_a_wrong_route_and_a_body_of_another_kind_are_told_in_the_same_form(shelf):
    http, _, _ = shelf
    told = http.post("/chat/completions", json={})
    assert (told.status_code, "/v1" in told.json()["error"]["message"]) == (404, True)
    assert http.get("/v1/adapters").status_code == 405
    body = json.dumps({**ASK, "model": "\ud800"})
    told = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert (told.status_code, "There is no persona" in told.json()["error"]["message"]) == (404, True)
    told = http.post("/v1/completions", content='{"model": "one"}', headers={"content-type": "text/plain"})
    assert (told.status_code, "Content-Type: application/json" in told.json()["error"]["message"]) == (400, True)


def test_the_words_of_vllm(shelf, base):
    http, home, _ = shelf
    saved(base, home / "more" / "v.safetensors", "lora", {"rank": 3}, seed=7)
    load = {"lora_name": "v", "lora_path": str(home / "more" / "v.safetensors")}
    assert http.post("/v1/load_lora_adapter", json=load).status_code == 200
    assert http.post("/v1/load_lora_adapter", json=load).status_code == 400
    assert http.post("/v1/load_lora_adapter", json={**load, "load_inplace": True}).status_code == 200
    first = text(http, "v")
    saved(base, home / "more" / "v.safetensors", "lora", {"rank": 3}, seed=8)
    assert http.post("/v1/load_lora_adapter", json={**load, "load_inplace": True}).status_code == 200
    assert text(http, "v") != first
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "v"}).status_code == 200
    assert "v" not in names(http)


def test_folders_are_followed_and_a_new_version_never_mixes_with_the_old(shelf, base):
    """The prompt is longer than a page, whose keys and values the old version computed."""
    http, home, _ = shelf
    more = {"prompt": list(range(40, 120))}
    old, bare = text(http, "one", **more), text(http, "base", **more)
    saved(base, home / "new.safetensors", "lora", {"rank": 2}, seed=3)
    until(lambda: "new" in names(http))
    new = text(http, "new", **more)
    saved(base, home / "one.safetensors", "lora", {"rank": 2}, seed=3)
    until(lambda: text(http, "one", **more) != old)
    assert text(http, "one", **more) == new
    (home / "one.safetensors").unlink()
    until(lambda: "one" not in names(http))
    (home / "new.safetensors").write_bytes(b"damaged")
    until(lambda: "damaged" in text(http, "new", **more))
    assert text(http, "base", **more) == bare


def test_who_wears_what_is_replaced_or_gone_goes_on_with_it(shelf, base):
    http, home, _ = shelf
    want = text(http, "one", **LONG)
    with http.stream("POST", "/v1/completions", json={**LONG, "model": "one", "stream": True}) as told:
        lines = told.iter_lines()
        got = [next(lines)]
        assert http.delete("/v1/adapters/one").status_code == 200
        saved(base, home / "one.safetensors", "lora", {"rank": 2}, seed=9)
        got += lines
    pieces = [json.loads(line[6:]) for line in got if line.startswith("data: {")]
    assert "".join(p["choices"][0]["text"] for p in pieces) == want
    until(lambda: text(http, "one", **LONG) not in (want, "There is no persona 'one'. There are: base."))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_pages_at_once(shelf, stream):
    http, _, hub = shelf
    engine = hub.service.engine
    body = json.dumps({**LONG, "model": "one", "max_tokens": 480, "stream": stream, "n": 8}).encode()
    host, port = http.base_url.host, http.base_url.port
    with socket.create_connection((host, port)) as s:
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                  b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body)  # fmt: skip
        until(lambda: engine.running)
    until(lambda: not hub.service.do(lambda: len(engine.running) + len(engine.waiting)).result(PATIENCE))
    assert not engine.arena.held
    metrics = http.get("/metrics").text
    assert 'deltaw_requests_total{finish="abort",persona="one"}' in metrics


def test_what_is_measured_is_what_happened(shelf):
    http, _, _ = shelf
    for model in ("one", "one", "base", "one:0.5+one:0.5"):
        text(http, model)
    text(http, "nobody")
    told = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(told['deltaw_requests_total{finish="length",persona="one"}']) == 2
    assert float(told['deltaw_prompt_tokens_total{persona="one"}']) == 6
    assert float(told['deltaw_answer_tokens_total{persona="base"}']) == 6
    assert float(told['deltaw_answer_tokens_total{persona="(blend)"}']) == 6
    assert not any("nobody" in line for line in told)
    assert float(told['deltaw_first_token_seconds_count{persona="one"}']) == 2
    assert float(told['deltaw_adapter_bytes{persona="one"}']) > 0
    assert float(told['deltaw_adapter_load_seconds{persona="one"}']) > 0
    assert float(told['deltaw_adapters{state="ready"}']) == 1
    assert float(told['deltaw_sequences{state="running"}']) == 0
    assert float(told['deltaw_batch_adapters_bucket{le="0.0"}']) >= 6
    assert float(told["deltaw_all_first_token_seconds_count"]) == 4


def test_tokens_and_text_are_those_of_the_tokenizer(shelf, base):
    http, _, _ = shelf
    turns = [{"role": "user", "content": "é漢"}]
    told = http.post("/tokenize", json={"messages": turns}).json()
    assert told["tokens"] == base.tokenizer.encode(base.tokenizer.chat(turns, prompt=True))
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), base.model.context)
    told = http.post("/tokenize", json={"prompt": "zq é"}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": told}).json()["prompt"] == "zq é"
    assert http.post("/tokenize", json={}).status_code == 400


def test_only_who_brings_the_key_is_answered(base, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    with running(base, [], Serving(port=0, key="secret")) as (url, _):
        for path in ("/v1/models", "/metrics"):
            assert httpx.get(url + path).status_code == 401
            assert httpx.get(url + path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert httpx.get(url + path, headers={"authorization": "Bearer secret"}).status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.completions.create(model="base", prompt="a")
        for path in ("/", "/healthz", "/readyz"):
            assert httpx.get(url + path).status_code == 200
        assert httpx.get(url + "/healthz", headers={"host": "evil.example"}).status_code == 400
        assert httpx.post(f"{url}/v1/adapters/upload", data={"name": "x"}, files=[("files", ("a", b""))],
                          headers={"authorization": "Bearer secret"}).status_code == 400  # fmt: skip


def test_another_address_asks_for_a_key_and_a_port_that_is_taken_is_told():
    with pytest.raises(UserError, match="there is no key"):
        bound(Serving(host="0.0.0.0", port=0))
    bound(Serving(host="0.0.0.0", port=0, key="x")).close()
    with bound(Serving(port=0)) as taken, pytest.raises(UserError, match="cannot listen"):
        bound(Serving(port=taken.getsockname()[1]))


def test_closing_answers_who_is_being_answered(base, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path))
    with running(base, [], Serving(port=0, budget_gb=0.02)) as (url, _):
        told = httpx.stream("POST", f"{url}/v1/completions", json={**LONG, "model": "base", "stream": True})
        response = told.__enter__()
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
    assert list(lines)[-2] == "data: [DONE]"
    told.__exit__(None, None, None)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")


def test_laid_files_are_kept_between_servers_and_go_when_nobody_used_them_for_long(base, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "personas"
    saved(base, home / "one.safetensors", "lora", {"rank": 2})

    def once():
        with (
            running(base, [home], Serving(port=0, budget_gb=0.02)) as (url, _),
            httpx.Client(base_url=url, timeout=PATIENCE) as http,
        ):
            said = text(http, "one") if "one" in names(http) else ""
        return said, {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.slab")}

    first, laid = once()
    assert len(laid) == 1
    assert once() == (first, laid)
    (old,) = laid
    os.utime(old, (1, 1))
    assert once()[0] == first
    shutil.rmtree(home)
    home.mkdir()
    assert once()[1].keys() == laid.keys()  # another server may have its folder
    os.utime(old, (1, 1))
    assert once() == ("", {})


def test_after_a_restart_what_was_put_up_and_taken_down_is_as_it_was(base, tmp_path, monkeypatch):
    """By its path, under another name; taken down though its file is there; both again, once that file is another."""
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "personas"
    for i, name in enumerate(("one", "two", "deep/three")):
        saved(base, home / f"{name}.safetensors", "lora", {"rank": 2}, seed=i)
    for restart in range(3):
        with running(base, [home]) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as http:
            if not restart:
                told = {"name": "alias", "path": str(home / "deep" / "three.safetensors")}
                assert http.post("/v1/adapters", json=told).status_code == 201
                assert http.delete("/v1/adapters/one").status_code == 200
            if restart == 2:
                saved(base, home / "one.safetensors", "lora", {"rank": 2}, seed=9)
                until(lambda: names(http) == {"one", "two", "alias"})
                assert http.delete("/v1/adapters/alias").status_code == 200
                continue
            assert names(http) == {"two", "alias"}
            assert text(http, "alias") not in (text(http, "two"), text(http, "base"))
            time.sleep(2.5)  # the folders are looked at
            assert names(http) == {"two", "alias"}
    (noted,) = (tmp_path / "cache" / "served").glob("*.json")
    noted.write_text("{")
    with running(base, [home]) as (url, _), httpx.Client(base_url=url, timeout=PATIENCE) as http:
        assert names(http) == {"one", "two"}


def test_a_full_disk_ends_no_answer_and_leaves_nothing_half(shelf, base, monkeypatch):
    """Neither what is laid, nor what is uploaded, nor what is noted can be written."""
    http, home, hub = shelf
    saved(base, home / "deep" / "two.safetensors", "lora", {"rank": 3}, seed=2)
    saved(base, home.parent / "away.safetensors", "lora", {"rank": 3}, seed=4)

    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    real, denied = Path.open, []

    def opened(path, mode="r", *more, **told):
        if {"w", "a", "x"} & {*mode} and str(path).startswith((str(home), str(home.parent / "cache"))):
            denied.append(path)
            full(path)
        return real(path, mode, *more, **told)

    monkeypatch.setattr(Path, "open", opened)
    before = sorted(home.rglob("*"))
    assert text(http, "base")
    assert "The adapter 'one' cannot be read now. [Errno 28] No space left" in text(http, "one")
    with real(home.parent / "away.safetensors", "rb") as file:
        files = [("files", ("adapter.safetensors", file.read()))]
    refused = http.post("/v1/adapters/upload", data={"name": "up"}, files=files)
    assert refused.status_code == 507
    assert refused.json()["error"]["message"] == "No space left on device."
    assert sorted(home.rglob("*")) == before
    assert denied
    monkeypatch.setattr(Path, "open", real)
    assert text(http, "one") != text(http, "base")
    assert http.post("/v1/adapters/upload", data={"name": "up"}, files=files).status_code == 201
    hub.service.do(lambda: check(hub.service.engine)).result(PATIENCE)
