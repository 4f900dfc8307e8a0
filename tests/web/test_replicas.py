"""`deltaw serve --replicas 2`: personas are asked where they are loaded, and a replica that dies is replaced."""

import json
import os
import re
import signal
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import yaml
from web.hubs import saved
from web.test_serve_command import PATIENCE, Process

from deltaw.api.persona import load_base
from deltaw.cli.app import run
from deltaw.web.keys import hashed

NAMES = [f"persona-{i}" for i in range(6)]
GREEDY = {"prompt": "abcdef", "temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def replicas(tiny_path, tmp_path_factory):
    """A server of two replicas, and what one alone says."""
    folder = tmp_path_factory.mktemp("replicas")
    (folder / "base").symlink_to(tiny_path)
    base = load_base(str(folder / "base"), dtype="float32", device="cpu")
    for i, name in enumerate(NAMES):
        saved(base, folder / "personas" / f"{name}.safetensors", "lora", {"rank": 4}, seed=i)
    rights = {"all": {"manage": True}, "few": {"requests_per_minute": 2, "personas": ["persona-0"]}}
    keys = {name: {"sha256": hashed(name), **each} for name, each in rights.items()}
    (folder / "keys.yaml").write_text(yaml.safe_dump(keys))
    alone = Process(folder, "--personas", "personas", "--base", "base")
    want = {name: said(alone.url, name) for name in NAMES}
    alone.end()
    both = Process(folder, "--personas", "personas", "--base", "base", "--replicas", "2", "--keys", "keys.yaml")
    yield both.url, want
    code, rest = both.end()
    assert "Traceback" not in rest
    assert code in (0, 143), rest


def asked(url, path, body=None, key="all"):
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    return urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=PATIENCE)


def said(url, name, key="all"):
    with asked(url, "/v1/completions", {"model": name, **GREEDY}, key) as reply:
        return json.load(reply)["choices"][0]["text"]


def streamed(url, name, heard=lambda: None):
    """A text, as it comes in pieces."""
    text = ""
    with asked(url, "/v1/completions", {"model": name, **GREEDY, "stream": True}) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
                heard()
    return text


def counted(url):
    with asked(url, "/metrics/routing") as reply:
        return {
            name: float(value) for name, value in re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", reply.read().decode(), re.M)
        }


def pids():
    """The processes of replicas."""
    return [
        p.pid for p in psutil.process_iter(["cmdline"]) if "ServeReplica:deltaw" in "".join(p.info["cmdline"] or [])
    ]


def test_whoever_is_asked_says_what_one_alone_says(replicas):
    url, want = replicas
    assert len(pids()) == 2
    assert {name: said(url, name) for name in NAMES} == want
    assert {name: streamed(url, name) for name in NAMES} == want
    with asked(url, "/v1/models") as reply:
        assert {card["id"] for card in json.load(reply)["data"]} == {"base", *NAMES}


def test_who_asks_again_comes_to_where_the_persona_is(replicas):
    url, want = replicas
    for name in NAMES:
        said(url, name)
    before = counted(url)
    for _ in range(3):
        for name in NAMES:
            assert said(url, name) == want[name]
    hits = {loaded: counted(url).get(key, 0) - before.get(key, 0)
            for loaded in ("true", "false") for key in [f'deltaw_routed_total{{loaded="{loaded}"}}']}  # fmt: skip
    assert hits["true"] / sum(hits.values()) >= 0.9, hits


def test_every_request_is_answered_though_a_replica_is_killed(replicas):
    url, want = replicas
    killed = []

    def kill():
        if not killed:
            killed.append(pids()[0])
            os.kill(killed[0], signal.SIGKILL)

    with ThreadPoolExecutor(12) as clients:
        texts = [(name, clients.submit(streamed, url, name, kill)) for name in NAMES * 4]
        texts += [(name, clients.submit(said, url, name)) for name in NAMES * 4]
        for name, text in texts:
            assert text.result() == want[name]
    assert counted(url)["deltaw_again_total"] >= 1


def test_a_base_that_is_not_there_is_told_before_any_replica_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "personas").mkdir()
    assert run(["serve", "--base", "smollm2-136m", "--personas", "personas", "--replicas", "2", "--port", "0"]) == 2
    assert "smollm2-135m" in capsys.readouterr().err


def test_a_cluster_that_is_none_is_a_mistake(here, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    saved(load_base("base", dtype="float32"), here / "runs" / "poet.safetensors", "lora", {"rank": 2})
    assert run(["serve", "--replicas", "2", "--port", "0"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_keys_are_asked_for_and_limits_are_those_of_all_replicas_together(replicas):
    url, want = replicas
    for key, name, status in (("none", "persona-0", 401), ("few", "persona-1", 404)):
        with (
            pytest.raises(urllib.error.HTTPError) as refused,
            asked(url, "/v1/completions", {"model": name, **GREEDY}, key),
        ):
            pass
        assert refused.value.code == status
        refused.value.close()
    assert [said(url, "persona-0", key="few") for _ in range(2)] == [want["persona-0"]] * 2
    with pytest.raises(urllib.error.HTTPError, match="429") as refused:
        said(url, "persona-0", key="few")
    assert 0 < int(refused.value.headers["retry-after"]) <= 30
    refused.value.close()
    with pytest.raises(urllib.error.HTTPError, match="403") as refused, asked(url, "/metrics/routing", key="few"):
        pass
    refused.value.close()
