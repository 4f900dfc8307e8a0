"""Ollama writes conversations as the model's own template does, and stops where the model stops."""

import re

import pytest
from conftest import TEMPLATE, byte_tokenizer
from hypothesis import given, settings, strategies as st

from deltaw.errors import UserError
from deltaw.files.ollama import Turns, modelfile
from deltaw.models.tokenizer import Tokenizer

DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ first if loop.first }}"
    "{{ m['content'] }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
ALTERNATING = DEFAULT_SYSTEM.replace("{% for m", "{% if messages[0]['role'] == 'system' %}S{% endif %}{% for m")
LAST_ONLY = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}[{{ m['content'] }}]{% endif %}{% endfor %}"
)
NUMBERED = (
    "{% for m in messages %}<{{ loop.index }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<>{% endif %}"
)


def tokenizer(template):
    return Tokenizer(byte_tokenizer(), template=template, specials={"bos_token": "<|im_start|>"}, end_ids={257, 258})


words = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)
talks = st.tuples(st.none() | words, st.lists(words, min_size=1, max_size=5).filter(lambda t: len(t) % 2))


def conversation(system, turns):
    talk = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]
    return talk if system is None else [{"role": "system", "content": system}, *talk]


def go(template, system, turns):
    """What Go's text/template makes of the constructs that are used, by the documentation of that package."""
    head, loop = re.fullmatch(r"(.*)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}", template, re.S).groups()
    user, answer = re.fullmatch(
        r'\{\{ if eq \.Role "user" \}\}(.*)\{\{ else if eq \.Role "assistant" \}\}(.*)\{\{ end \}\}', loop, re.S
    ).groups()
    inside = re.search(r'\{\{ if \$system \}\}\{\{ \$system \}\}(.*)\{\{ \$system = "" \}\}\{\{ end \}\}', user, re.S)
    if inside:
        text = head.removesuffix("{{ $system := .System }}")
        user = user.replace(inside[0], "{{ inside }}")
    else:
        parts = re.fullmatch(r"\{\{ if \.System \}\}(.*)\{\{ else \}\}(.*)\{\{ end \}\}", head, re.S)
        text = parts[2] if system is None else parts[1].replace("{{ .System }}", system)
    for i, content in enumerate(turns):
        first = f"{system}{inside[1]}" if inside and system is not None and i == 0 else ""
        text += (answer if i % 2 else user).replace("{{ inside }}", first).replace("{{ .Content }}", content)
    return text


@pytest.mark.parametrize("template", [TEMPLATE, DEFAULT_SYSTEM, LLAMA3, GEMMA, ALTERNATING])
@settings(deadline=None, max_examples=30)
@given(talk=talks)
def test_a_conversation_is_written_as_the_models_template_writes_it(template, talk):
    ours = tokenizer(template)
    want = ours.chat(conversation(*talk), prompt=True)
    turns = Turns.of(ours)
    assert turns.written(conversation(*talk)) == want
    assert go(turns.go(""), *talk) == want
    both = turns.begin.startswith("<|im_start|>") and (turns.system[0] or turns.begin).startswith("<|im_start|>")
    assert ("<|im_start|>" if both else "") + go(turns.go("<|im_start|>"), *talk) == want


@pytest.mark.parametrize(("template", "said"), [(LAST_ONLY, "leaves something"), (NUMBERED, "one after another")])
def test_a_template_that_cannot_be_taken_apart_is_refused(template, said):
    with pytest.raises(UserError, match=said):
        Turns.of(tokenizer(template))


def test_a_modelfile_names_the_weights_the_stops_and_the_system_prompt():
    text = modelfile(tokenizer(TEMPLATE), "Be odd.", "m.gguf")
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{ if .System }}')
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER stop "<|endoftext|>"\nSYSTEM """Be odd."""\n' in text
    assert "SYSTEM" not in modelfile(tokenizer(TEMPLATE), "", "m.gguf")
    with pytest.raises(UserError, match="three quotation marks"):
        modelfile(tokenizer(TEMPLATE), 'a """ b', "m.gguf")
