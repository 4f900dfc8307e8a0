"""A server over the tiny model with personas of several kinds, in a thread; and OpenAI's own client to ask it."""

import json
import threading
import time
from contextlib import contextmanager
from functools import partial

import openai
import pytest
import torch
from oracles import scramble
from safetensors.torch import save_file
from serve.integrity import check

from deltaw.adapters.adapter import Adapter
from deltaw.api.persona import Persona, load_base
from deltaw.files import adapters
from deltaw.methods import method
from deltaw.settings import Serving
from deltaw.web.app import application
from deltaw.web.server import Listener, bound, hub_of

MADE = {
    "poet": ("lora", {"rank": 4}),
    "second": ("lora", {"rank": 6, "alpha": 3.0}),
    "chef": ("dora", {"rank": 2}),
    "prefix": ("prefix_tuning", {}),
    "whole": ("full", {}),
}
SYSTEM = "You are a poet."


@contextmanager
def running(base, folders, serving=None):
    """A server in a thread, for the length of a `with` block; gives its address."""
    serving = serving or Serving(port=0)
    with hub_of(base, folders, serving) as (hub, shelf):
        at, server = bound(serving), Listener(application(hub, shelf, serving), hub, print)
        thread = threading.Thread(target=server.run, args=([at],))
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield f"http://{serving.host}:{at.getsockname()[1]}", hub
        finally:
            server.should_exit = True
            thread.join()


def saved(base, path, name, chosen, seed=1, system=""):
    """An adapter of random numbers, in a file."""
    adapter = scramble(Adapter.build(method(name, **chosen), base.model, seed=seed).eval(), size=0.3, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    adapters.save(adapter, adapters.Header.of(adapter, str(base.path), base.fingerprint, system), path)
    return adapter


def peft_folder(folder, base, rank=3, seed=5):
    """A LoRA as PEFT writes it, on one layer."""
    rng = torch.Generator().manual_seed(seed)
    name, slot = "layers.0.self_attn.q_proj", base.model.layers[0].self_attn.q_proj
    o, i = slot.weight.shape
    tensors = {f"base_model.model.model.{name}.lora_A.weight": torch.randn(rank, i, generator=rng),
               f"base_model.model.model.{name}.lora_B.weight": torch.randn(o, rank, generator=rng)}  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"], "bias": "none",
            "base_model_name_or_path": "tiny"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def base(tiny_path):
    return load_base(str(tiny_path), dtype="float32")


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """Personas of every kind in one folder: files, a run, one of PEFT's, one of another base, one that is none."""
    home = tmp_path_factory.mktemp("personas")
    for name in ("chef", "second", "prefix", "whole"):
        saved(base, home / f"{name}.safetensors", *MADE[name], seed=len(name))
    saved(base, home / "poet" / "adapter" / "adapter.safetensors", *MADE["poet"], system=SYSTEM)
    peft_folder(home / "pefted", base)
    foreign = saved(base, home / "foreign.safetensors", "lora", {})
    header = adapters.Header.of(foreign, "elsewhere", "0" * 32)
    adapters.save(foreign, header, home / "foreign.safetensors")
    (home / "broken.safetensors").write_bytes(b"nothing")
    return home


@pytest.fixture(scope="module")
def server(base, folder, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("DELTAW_CACHE", str(tmp_path_factory.mktemp("cache")))
    with running(base, [folder], Serving(port=0, budget_gb=0.02)) as (url, hub):
        yield url, hub
    patch.undo()


@pytest.fixture
def hub(server):
    """The server's inside; after each test every page and every adapter is where it should be."""
    _, hub = server
    yield hub
    hub.service.do(partial(check, hub.service.engine)).result(10)
    assert hub.service.do(lambda: sum(hub.service.engine.arena.held.values())).result(10) == 0


@pytest.fixture
def client(server, hub):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def personas(base, folder):
    """The same personas without a server."""
    at = {name: folder / f"{name}.safetensors" for name in ("chef", "second", "prefix", "whole")}
    at["poet"] = folder / "poet" / "adapter" / "adapter.safetensors"
    bare = Persona("base", load_base(str(base.path), dtype="float32"))  # a base that the server does not compute with
    return {"base": bare, **{name: bare.wearing(name, path) for name, path in at.items()}}
