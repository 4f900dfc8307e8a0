"""`deltaw serve` as a process, and `deltaw chat --url` talking with it."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from small import ROOT
from web.hubs import peft_folder, saved

from deltaw.api.persona import load_base
from deltaw.cli.app import run

PATIENCE = 90


class Process:
    """A server in a process of its own; `told` is what it says when it is ready."""

    def __init__(self, folder, *arguments, module=(), **environment):
        command = [
            sys.executable,
            "-m",
            *module,
            "deltaw.cli",
            "serve",
            "--port",
            "0",
            "--dtype",
            "float32",
            "--threads",
            "1",
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DELTAW_CACHE": str(folder / "cache"), **environment}
        self.process = subprocess.Popen([*command, *arguments], cwd=folder, env=environment, bufsize=0,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        self.told, self.url = [], ""
        while "/v1" not in "".join(self.told):
            assert select.select([self.process.stdout], [], [], PATIENCE)[0], self.told
            line = self.process.stdout.readline().decode()  # unbuffered, so that nothing is read and not seen
            assert line, "\n".join(self.told)
            self.told.append(line.rstrip())
        self.url = re.search(r"http://\S+", self.told[0])[0]

    def wait(self, beginning):
        """Until it says a line that begins so."""
        while not self.told[-1].startswith(beginning):
            assert select.select([self.process.stdout], [], [], PATIENCE)[0], self.told
            self.told.append(self.process.stdout.readline().decode())

    def get(self, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as f:
            return json.loads(f.read())

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        rest, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, rest.decode()


@pytest.fixture
def personas(here):
    base = load_base("base", dtype="float32")
    saved(base, here / "runs" / "poet" / "adapter" / "adapter.safetensors", "lora", {"rank": 4}, system="You rhyme.")
    saved(base, here / "more" / "chef.safetensors", "lora", {"rank": 2}, seed=3)
    peft_folder(here / "more" / "pefted", base)
    (here / "more" / "broken.safetensors").write_bytes(b"nothing")
    return here


def test_a_process_serves_files_runs_and_folders_and_says_what_it_cannot(personas):
    server = Process(personas, "--personas", "runs", "more/chef.safetensors", "more")
    assert server.told[0] == f"base with 3 personas at {server.url}"
    cards = {card["id"]: card for card in server.get("/v1/models")["data"]}
    assert set(cards) == {"base", "poet", "chef", "pefted", "broken"}
    assert (cards["poet"]["state"], cards["broken"]["state"]) == ("known", "known")
    told = server.get("/v1/completions", {"model": "poet", "prompt": "abc", "max_tokens": 3})
    assert told["usage"]["completion_tokens"] == 3
    late = personas / "more" / "late.safetensors"
    late.write_bytes((personas / "more" / "chef.safetensors").read_bytes())
    server.wait("+ late")
    late.unlink()
    server.wait("- late")
    code, rest = server.end()
    assert code == 128 + signal.SIGTERM
    assert any(line.startswith("Not served: broken.") for line in server.told)
    assert "Traceback" not in rest


def test_two_processes_say_what_one_says_and_one_that_is_lost_is_told(personas):
    def told(server):
        asked = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "logprobs": 2}
        answers = [server.get("/v1/completions", {"model": model, **asked}) for model in ("base", "poet", "pefted")]
        return [answer["choices"][0]["logprobs"]["tokens"] for answer in answers]

    alone = Process(personas, "--personas", "runs", "more")
    want = told(alone)
    assert alone.end()[0] == 143
    both = Process(personas, "--personas", "runs", "more", "--tensor-parallel", "2")
    assert told(both) == want
    code, rest = both.end()
    assert code == 143
    assert "Traceback" not in rest
    (personas / "meetings").mkdir()
    met = {"TMPDIR": str(personas / "meetings")}
    both = Process(personas, "--personas", "runs", "more", "--tensor-parallel", "2", **met)
    other = int(Path(f"/proc/{both.process.pid}/task/{both.process.pid}/children").read_text().split()[0])
    os.kill(other, signal.SIGKILL)
    assert both.process.wait(PATIENCE) == 1
    assert not list((personas / "meetings").glob("deltaw-*"))
    assert "Process 1 of those that compute the model has ended" in both.process.communicate()[0].decode()
    told = {"cwd": personas, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "timeout": PATIENCE}
    three = [*both.process.args[:-1], "3"]
    refused = subprocess.run(three, capture_output=True, text=True, check=False, **told)
    assert refused.returncode == 2
    assert refused.stderr.count("2 heads of keys and values are not shared by 3 processes") == 1


def test_torchrun_asked_to_end_lets_several_processes_answer_to_the_end(personas):
    began = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    server = Process(personas, module=began, OMP_NUM_THREADS="1")  # or torchrun says that it sets it
    body = {"model": "poet", "prompt": "abc", "max_tokens": 400, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})  # fmt: skip
    with urllib.request.urlopen(request, timeout=PATIENCE) as f:
        f.readline()
        server.process.send_signal(signal.SIGTERM)
        told = f.read().decode()
    assert '"finish_reason": "length"' in told.replace('":"', '": "'), told[-500:]
    assert "A step" not in server.process.communicate(timeout=PATIENCE)[0].decode()


def test_the_base_and_its_form_are_those_of_the_first_persona(personas):
    server = Process(personas, OMP_NUM_THREADS="1")
    assert server.told[0].startswith("base with 1 persona at")
    code, rest = server.end(signal.SIGINT)
    assert code == 130
    assert "Traceback" not in rest


def test_asked_to_end_twice_it_cuts_who_is_being_answered_and_says_so(personas):
    server = Process(personas)
    body = {"model": "poet", "prompt": "abc", "max_tokens": 480, "ignore_eos": True, "n": 100, "stream": True}
    request = urllib.request.Request(server.url + "/v1/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})  # fmt: skip
    with urllib.request.urlopen(request, timeout=PATIENCE) as f:
        f.readline()
        server.process.send_signal(signal.SIGINT)
        while "Ending, once" not in (line := server.process.stdout.readline().decode()):
            assert line
        code, rest = server.end(signal.SIGINT)
        told = f.read().decode()
    assert (code, "Traceback" in rest) == (130, False)
    assert "The server is closing." in told


def test_personas_of_peft_alone_name_their_base(personas):
    config = personas / "more" / "pefted" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "base"}))
    server = Process(personas, "--personas", "more/pefted")
    assert server.told[0].startswith("base with 1 persona at")
    server.end()


def test_a_key_from_the_environment_is_asked_for(personas, monkeypatch, capsys):
    server = Process(personas, DELTAW_API_KEY="secret")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        server.get("/v1/models")
    assert run(["chat", "--url", server.url]) == 2
    assert "This server asks for a key" in capsys.readouterr().err
    monkeypatch.setenv("DELTAW_API_KEY", "secret")
    monkeypatch.setattr(sys, "stdin", io.StringIO("/personas\n"))
    assert run(["chat", "--url", server.url]) == 0
    assert capsys.readouterr().out.splitlines() == ["* base", "  poet"]
    server.end()


def test_one_talks_with_a_server_as_with_ones_own_personas(personas, monkeypatch, capsys):
    server = Process(personas, "--personas", "runs", "more")

    def talk(*arguments):
        lines = [
            "say 1",
            "/persona poet",
            "say 2",
            "/compare say 3",
            "/save talk.jsonl",
            "/system Be brief.",
            "/base",
            "x",
        ]
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
        (personas / "talk.jsonl").unlink(missing_ok=True)
        assert run(["chat", *arguments, "--temperature=0", "--max-new-tokens=9", "--frequency-penalty=2"]) == 0
        return capsys.readouterr().out, json.loads((personas / "talk.jsonl").read_text())

    there = talk("chef", "poet", "--url", server.url)
    here = talk("more/chef.safetensors", "poet", "--base", "base", "--dtype", "float32")
    assert there == here
    for arguments, complaint in ((["nobody"], "There is no persona 'nobody' there."), ([], "")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("/persona broken\nhello\n"))
        code = run(["chat", *arguments, "--url", server.url])
        told = capsys.readouterr()
        assert (code, complaint in told.err) == ((2, True) if complaint else (0, True))
        assert complaint or "damaged" in told.out
    server.end()
    for url in (server.url, "ftp://x", "http://127.0.0.1:1"):
        assert run(["chat", "--url", url]) == 2
    assert capsys.readouterr().err.count("exit code 2") == 3


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--personas", "nothing"], "There is no such file or folder."),
    (["--personas", "empty"], "There is no adapter in empty, and no base is named."),
    (["--base", "base", "--budget-gb", "0.0001"], "have no room for 32 answers at once. remedy Take --budget-gb 0.0"),
    (["--base", "base", "--host", "0.0.0.0"], "there is no key"),
    (["--base", "base", "--port", "99999"], "port"),
    (["--base", "base", "--budget-gb", "0"], "budget_gb"),
    (["--base", "nowhere/x"], "nowhere/x"),
])  # fmt: skip
def test_what_cannot_be_served_is_told(here, said, arguments, complaint):
    (here / "empty").mkdir()
    assert complaint in said("serve", *arguments)


def test_without_the_extra_one_is_told_what_to_install(here, said, monkeypatch):
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastapi" else find(name))
    assert "pip install 'deltaw[serve]'" in said("serve", "--base", "base")


def test_without_all_of_ray_one_is_told_what_replicas_need(here, said, monkeypatch):
    monkeypatch.delattr("ray.serve", raising=False)  # where another test has imported it
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    monkeypatch.delitem(sys.modules, "deltaw.web.replicas", raising=False)
    complaint = said("serve", "--base", "base", "--replicas", "2")
    assert "Replicas need Ray." in complaint
    assert "pip install 'deltaw[serve,scale]'" in complaint
