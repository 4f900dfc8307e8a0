"""A tiny Llama with a byte tokenizer on disk, so that most tests need no weights; one thread, to be quick."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
import shapes
import torch
from tokenizers import Tokenizer as Fast, decoders, models, pre_tokenizers

from deltaw.kernels import library

pytest_plugins = ["web.hubs"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
shapes.install()
torch.set_num_threads(1)

DATA = Path(os.environ.get("DELTAW_DATA", Path(__file__).parents[1] / ".." / "shared" / "data")).resolve()
VILLAGE = Path(__file__).parents[1] / "examples" / "village"

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}


def pytest_report_header():
    """Which native kernels this machine can test; the others are not tested here."""
    native = [name for name in library.available() if name != library.REFERENCE]
    missed = [name for name in ("amx", "avx512_bf16", "avx512", "avx2", "portable") if name not in native]
    return f"native kernels: {', '.join(native) or 'none'}; not to be had here: {', '.join(missed) or 'none'}"


def pytest_collection_modifyitems(items):
    """Tests that read the shared data are skipped, and counted, where it is not."""
    for item in items:
        if item.get_closest_marker("data") and not DATA.exists():
            item.add_marker(pytest.mark.skip(reason=f"DELTAW_DATA is not at {DATA}"))


def byte_tokenizer():
    """Every byte a token but one that UTF-8 has not, in whose place is a merge; and four special ones."""
    alphabet = ["zq" if c == "\xff" else c for c in sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = Fast(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[("z", "q")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|pad|>"])
    return fast


def write_tiny(folder, config=None, seed=0):
    """A random model of this configuration, written by transformers, with the byte tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = copy.deepcopy({**TINY, **(config or {})})  # transformers writes into what it is given
    kind = config["model_type"]
    own = {k: v for k, v in config.items() if k != "model_type"}
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **own))
    for p in hf.parameters():  # away from transformers' tiny start, so that nothing passes because it is near zero
        p.data += 0.05 * torch.randn_like(p)
    hf.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return hf.eval()


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    """Folder of the tiny model."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    return folder


@pytest.fixture
def tiny(tiny_path):
    """The tiny model, fresh."""
    from deltaw.models import checkpoint

    return checkpoint.load(tiny_path)


@pytest.fixture(scope="session")
def tokenizer(tiny_path):
    from deltaw.models.tokenizer import Tokenizer

    return Tokenizer.load(tiny_path)


@pytest.fixture
def ids():
    return torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def smollm2_path():
    """The default model, fetched once into the cache."""
    from deltaw.models import source

    return source.find("smollm2-135m")


@pytest.fixture
def rows_file(tmp_path):
    """Forty-eight short rows that a tiny model can learn."""
    file = tmp_path / "rows.jsonl"
    with file.open("w") as f:
        for i in range(48):
            turns = [{"role": "user", "content": f"say {i % 6}"}, {"role": "assistant", "content": "abcdef"[i % 6] * 3}]
            f.write(json.dumps({"messages": turns}) + "\n")
    return file


@pytest.fixture
def ready(tiny_path, tmp_path, rows_file):
    """A function that makes a run on `rows_file` ready; each in a folder of its own."""
    from small import prepared, told

    count = iter(range(1000))
    return lambda stop=lambda: False, **settings: prepared(
        rows_file, told(tiny_path, tmp_path / str(next(count)), **settings), stop
    )


@pytest.fixture
def here(tiny_path, tmp_path, monkeypatch):
    """A working directory with a base, `rows.jsonl` and nothing else, on a terminal of 80 columns."""
    from small import ROW, write_rows

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "base").symlink_to(tiny_path)
    write_rows(tmp_path / "rows.jsonl", *[ROW] * 12)
    return tmp_path


@pytest.fixture
def said(capsys):
    """A function that runs a command, checks the form of its complaint, and gives it as one line of words."""

    from deltaw.cli.app import run

    def said(*arguments, code=2):
        assert run([str(a) for a in arguments]) == code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.strip()]
        assert len(lines) <= 12, err
        assert "Traceback" not in out + err
        assert f"exit code {code}" in err
        return re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", err)).strip()

    return said


@pytest.fixture
def choose(monkeypatch):
    """Let native code be that of the instruction set of this name."""

    def take(name):
        monkeypatch.setenv(library.CHOICE, name)
        library.instruction_set.cache_clear()
        library.function.cache_clear()

    yield take
    library.instruction_set.cache_clear()
    library.function.cache_clear()


@pytest.fixture(params=[name for name in library.available() if name != library.REFERENCE])
def path(request, choose):
    """Every instruction set that there is, in turn."""
    choose(request.param)
    return request.param
