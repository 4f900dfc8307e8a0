"""Adapters that are uploaded damaged are refused by a sentence, or are as good as whole: no traceback, nothing left."""

import json
import pickle
import random
import struct
from functools import partial

import httpx2 as httpx
import pytest
import torch
from safetensors.torch import load, save
from serve.integrity import check
from web.hubs import peft_folder, running, saved

from deltaw.settings import Serving

UPLOADS = 1000
ODD = [None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**30, "", "x", [], {}, [1], {"a": 1}, "\ud800", 2**31]
COUNTED = ("peft_type", "r", "lora_alpha")
"""What changes the numbers that are worn; which layers are, tensors say by themselves."""
ASK = {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """An adapter of ours, and one of PEFT's, as they are uploaded."""
    home = tmp_path_factory.mktemp("whole")
    saved(base, home / "own.safetensors", "lora", {"rank": 2})
    folder = peft_folder(home / "peft", base)
    return [
        {"adapter.safetensors": (home / "own.safetensors").read_bytes()},
        {name: (folder / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")},
    ]


def parts(body):
    """A safetensors file's header and what follows."""
    (size,) = struct.unpack("<Q", body[:8])
    return json.loads(body[8 : 8 + size]), body[8 + size :]


def joined(header, rest):
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + rest


def odd_field(rng, told):
    """A JSON object with something odd in it, somewhere."""
    key = rng.choice(sorted(told))
    if isinstance(told[key], dict) and told[key] and rng.random() < 0.6:
        return {**told, key: odd_field(rng, told[key])}
    if rng.random() < 0.2:
        return {k: v for k, v in told.items() if k != key}
    return {**told, key: rng.choice(ODD)}


def flipped(rng, body):
    body = bytearray(body)
    for _ in range(rng.randint(1, 4)):
        body[rng.randrange(min(len(body), rng.choice([16, 400, len(body)])))] ^= 1 << rng.randrange(8)
    return bytes(body)


def poisoned(rng, body):
    """Values that are no numbers, or other types and shapes."""
    tensors = load(body)
    name = rng.choice(sorted(tensors))
    t = tensors[name].clone()
    kind = rng.randrange(5)
    if kind == 0:
        t.view(-1)[rng.randrange(t.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    tensors[name] = [t, t.to(torch.int8), t[:1].clone(), t.new_zeros(0), t.reshape(-1)][kind]
    header, _ = parts(body)
    return save(tensors, metadata=header.get("__metadata__"))


def damaged(rng, files):
    """One way to damage an upload."""
    name = rng.choice(sorted(files))
    body = files[name]
    if name.endswith(".json"):
        made = [lambda: json.dumps(odd_field(rng, json.loads(body))).encode("utf-8", "surrogatepass"),
                lambda: body[: rng.randrange(len(body))], lambda: b"[" * 10**5, lambda: flipped(rng, body)]  # fmt: skip
    else:
        header, rest = parts(body)
        made = [lambda: body[: rng.randrange(len(body))], lambda: flipped(rng, body), lambda: poisoned(rng, body),
                lambda: joined(odd_field(rng, header), rest), lambda: body + rng.randbytes(9),
                lambda: struct.pack("<Q", rng.choice([0, 2**63, 2**40, 1])) + body[8:],
                lambda: pickle.dumps(load(body))]  # fmt: skip
    return {**files, name: rng.choice(made)()}


def test_a_thousand_damaged_uploads_are_refused_by_a_sentence_or_speak(base, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("DELTAW_CACHE", str(tmp_path / "cache"))
    (home := tmp_path / "personas").mkdir()
    rng, taken, refused = random.Random(1), 0, set()
    with (
        running(base, [home], Serving(port=0, budget_gb=0.02)) as (url, hub),
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        for n in range(UPLOADS):
            files = damaged(rng, whole[n % 2])
            own = "adapter.safetensors" in files
            sent = [("files", (name, body)) for name, body in files.items()]
            told = http.post("/v1/adapters/upload", data={"name": f"u{n}"}, files=sent)
            assert told.status_code in (201, 400), told.text
            if told.status_code == 400:
                refused.add(told.json()["error"]["message"].partition(" ")[0])
                assert not (home / f"u{n}").exists()
                continue
            taken += 1
            if own:  # it carries a checksum: what is read is what was written
                kept = load(whole[0]["adapter.safetensors"])
                assert all(torch.equal(t, kept[name]) for name, t in load(files["adapter.safetensors"]).items())
            else:
                config, kept = (json.loads(each["adapter_config.json"]) for each in (files, whole[1]))
                assert {key: config.get(key) for key in COUNTED} == {key: kept[key] for key in COUNTED}
                assert type(config["lora_alpha"]) is int
            said = http.post("/v1/completions", json={**ASK, "model": f"u{n}"})
            assert said.status_code == 200 or "no number" in said.text, said.text
            assert http.delete(f"/v1/adapters/u{n}").status_code == 200
        hub.service.do(partial(check, hub.service.engine)).result(10)
        assert http.post("/v1/completions", json={**ASK, "model": "base"}).status_code == 200
    assert 0 < taken < UPLOADS / 3
    assert len(refused) > 5
