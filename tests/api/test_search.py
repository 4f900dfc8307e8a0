"""The search through a GLoRA supernet: within its budget, never twice, resumable bit for bit, on rows of its own."""

import json
import math

import pytest
import torch
from oracles import scramble
from small import write_rows

from deltaw.adapters.adapter import Adapter
from deltaw.api import search as api
from deltaw.api.evaluate import perplexity
from deltaw.api.persona import Base, Persona, load
from deltaw.api.search import Search, search, write
from deltaw.cli.app import run
from deltaw.data.batch import lay
from deltaw.data.encode import Encoded
from deltaw.errors import UserError
from deltaw.files.runs import Run
from deltaw.methods import method

BATCHES = [lay([Encoded(tuple(range(7, 27)), (False,) + (True,) * 19)])]
SUPER = ("train", "rows.jsonl", "--base", "base", "--dtype", "float32", "--threads", "1", "--method", "glora",
         "--supernet", "--steps", "4", "--name", "super")  # fmt: skip


@pytest.fixture
def supernet(tiny):
    adapter = scramble(Adapter.build(method("glora", supernet=True), tiny), 0.1).eval()
    return Persona("super", Base("tiny", None, tiny, None, "0"), adapter)


def found(supernet, log, **chosen):
    how = Search(**{"budget": 3000, "evaluations": 24, "population": 8, **chosen})
    return list(search(supernet, BATCHES, how, log))


def test_no_candidate_is_over_the_budget_and_none_is_measured_twice(supernet, tmp_path):
    for budget in (40, 1500, 6000):
        measured = found(supernet, tmp_path / f"{budget}", budget=budget)
        assert len({m.paths for m in measured}) == len(measured) == 24
        assert 0 < min(m.parameters for m in measured) <= max(m.parameters for m in measured) <= budget
        best = [min(m.perplexity for m in measured[: i + 1]) for i in range(24)]
        assert best == sorted(best, reverse=True)
        assert all(math.isfinite(m.perplexity) for m in measured)


def test_what_is_measured_is_the_persona_that_is_written(supernet, tmp_path):
    best = min(found(supernet, tmp_path / "log"), key=lambda m: m.perplexity)
    supernet = Persona("super", Base("tiny", tmp_path, supernet.base.model, None, "0"), supernet.adapter)
    file = write(supernet, best.paths, Run(tmp_path / "runs" / "small"))
    again = supernet.wearing("small", file)
    assert again.adapter.parameter_count == best.parameters
    assert not again.adapter.method.supernet
    with again.on(), torch.no_grad():
        assert perplexity(again.base.model, BATCHES) == pytest.approx(best.perplexity, rel=1e-6)
    with supernet.on(), torch.no_grad():
        assert perplexity(supernet.base.model, BATCHES) != pytest.approx(best.perplexity, rel=1e-6)


def test_it_goes_on_where_it_was_stopped_and_a_line_cut_off_is_measured_again(supernet, tmp_path, monkeypatch):
    whole = found(supernet, tmp_path / "whole")
    part = tmp_path / "part"
    lines = (tmp_path / "whole").read_text().splitlines()
    odd = [
        "{}",
        "3",
        '{"paths": "x"}',
        '{"paths": [1], "perplexity": "low"}',
        '{"paths": "x", "perplexity": NaN}',
        "\xff",
    ]
    part.write_text("\n".join([*lines[:11], *odd, lines[11][:40]]), encoding="latin-1")
    counted = []
    real = api.perplexity
    monkeypatch.setattr(api, "perplexity", lambda *a: counted.append(1) or real(*a))
    assert found(supernet, part) == whole
    assert len(counted) == 24 - 10
    assert found(supernet, tmp_path / "other", seed=1) != whole
    kept = part.read_text(encoding="latin-1")
    assert all(line in kept for line in lines)


def test_later_candidates_come_from_the_best_unless_they_are_to_be_random(supernet, tmp_path, monkeypatch):
    """With a score that only counts one term, evolution finds it everywhere, and chance does not."""
    monkeypatch.setattr(api, "measure", lambda *a: 1.0 + sum(path.b != "constant" for path in a[2]))
    bred = found(supernet, tmp_path / "a", evaluations=200, budget=10**6)
    drawn = found(supernet, tmp_path / "b", evaluations=200, budget=10**6, evolve=False)
    assert bred[:8] == drawn[:8]
    assert min(m.perplexity for m in bred) <= min(m.perplexity for m in drawn) - 2
    still = found(supernet, tmp_path / "c", evaluations=60, budget=10**6, mutation=0.0, parents=2)
    assert min(m.perplexity for m in still) >= min(m.perplexity for m in bred)


def test_what_is_no_supernet_or_cannot_fit_is_refused(tiny, supernet, tmp_path):
    plain = Persona("plain", supernet.base, Adapter.build(method("glora"), tiny))
    with pytest.raises(UserError, match="no supernet"):
        found(plain, tmp_path / "log")
    with pytest.raises(UserError, match="No new paths within 1 parameters"):
        found(supernet, tmp_path / "log", budget=1, evaluations=1000)


def test_the_command_makes_a_run_and_refuses_rows_that_were_trained_on(here, capsys):
    assert run(list(SUPER)) == 0
    write_rows(here / "search.jsonl", *[{"prompt": f"say {i}", "completion": "bbb"} for i in range(6)])
    asked = [
        "search",
        "super",
        "search.jsonl",
        "-o",
        "small",
        "--budget",
        "900",
        "--evaluations",
        "12",
        "--population",
        "4",
    ]
    capsys.readouterr()
    assert run([*asked, "--dtype", "float32", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["parameters"] <= 900
    assert said["perplexity"] <= said["first"]
    assert said["evaluations"] == 12
    small = load("small", dtype="float32")
    assert small.adapter.parameter_count == said["parameters"]
    assert small.ask("say 1", max_new_tokens=2) is not None
    assert run(asked) == 2
    assert "There is a run 'small' already." in capsys.readouterr().err
    assert run(["search", "super", "rows.jsonl", "-o", "other", "--budget", "900"]) == 2
    assert "These rows were trained on" in capsys.readouterr().err
