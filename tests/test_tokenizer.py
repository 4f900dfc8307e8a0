"""Templates render as in transformers, in a sandbox; ids are transformers' ids; what is saved reads back."""

import json

import pytest
from conftest import TEMPLATE, byte_tokenizer
from hypothesis import given, settings, strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deltaw.errors import UserError
from deltaw.models.tokenizer import Tokenizer

END = "<|im_end|>"
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{- bos_token }}\n{%- if not tools is defined %}\n    {%- set tools = none %}\n{%- endif %}\n"
    "{%- if tools is not none %}\n    {{- 'Tools: ' + tools | tojson(indent=4) }}\n{%- endif %}\n"
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' }}\n"
    "    {{- message['content'] | trim }}\n"
    "    {{- '<|im_end|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
TEMPLATES = {
    "chatml": TEMPLATE,
    "llama 2": LLAMA2,
    "llama 3": LLAMA3,
    "tojson": "{% for m in messages %}{{ m | tojson }}\n{{ m | tojson(indent=2) }}{% endfor %}",
    "tojson, ordered and tight": "{{ messages[0] | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}",
    "break and continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }};{% endfor %}",
    "namespaces": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = m.content %}{% endfor %}{{ ns.n }}{{ ns.last }}",
    "no tools": "{% if tools is not none %}Tools:{% endif %}{% if documents is none %}x{% endif %}",
    "marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "blocks on their own lines": "{% for m in messages %}\n  {% if 1 %}\n {{ m.role }}\n  {% endif %}\n{% endfor %}\n",
    "markup": "{% for m in messages %}<b>{{ m['content'] }}</b>&amp;{{ m.content | tojson }}{% endfor %}",
}
TEXTS = ("Wer? <é> & \"q\" 'x'", " Hob.\n", "line\u2028sep \\n {{ 1 }} {% x %}", "")


def conversation(system=False, last="assistant"):
    turns = [{"role": "system", "content": TEXTS[2]}] if system else []
    turns += [
        {"role": r, "content": c}
        for r, c in zip(("user", "assistant", "user", "assistant"), (*TEXTS[:3], "a"), strict=True)
    ]
    return turns if last == "assistant" else turns[:-1]


def pair_of(template):
    specials = {"bos_token": "<|im_start|>", "eos_token": END}
    ours = Tokenizer(byte_tokenizer(), template=template, specials=specials, end_ids={257})
    return ours, PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), chat_template=template, **specials)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("last", ["user", "assistant"])
@pytest.mark.parametrize("prompt", [False, True])
def test_a_template_renders_as_in_transformers(template, system, last, prompt):
    ours, theirs = pair_of(template)
    messages = conversation(system, last)
    want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert ours.chat(messages, prompt=prompt) == want
    assert ours.chat(tuple(messages), prompt=prompt) == want


@settings(deadline=None, max_examples=50)
@given(contents=st.lists(st.text(max_size=15), min_size=1, max_size=4), prompt=st.booleans())
def test_any_text_renders_and_encodes_as_in_transformers(contents, prompt):
    ours, theirs = pair_of(TEMPLATE)
    messages = [{"role": "user", "content": c} for c in contents]
    want = theirs.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    assert ours.encode(ours.chat(messages, prompt=prompt)) == want


def test_a_template_that_refuses_is_quoted():
    ours, _ = pair_of(LLAMA2)
    with pytest.raises(UserError, match=r"refuses this conversation.*roles must alternate"):
        ours.chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self._TemplateReference__context }}{{ self.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
    ],
)
def test_the_sandbox_refuses_what_reaches_beyond_formatting(template):
    ours, _ = pair_of(template)
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(UserError):
        ours.chat(messages)
    assert messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("template", ["{{ ''.__class__ }}", "{{ raise_exception.__globals__ }}", "{{ open }}{{ os }}"])
def test_the_sandbox_shows_nothing_of_what_lies_beyond(template):
    ours, _ = pair_of(template)
    assert ours.chat([{"role": "user", "content": "x"}]) == ""


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content }}",
        "{{ messages | nofilter }}",
        "{{ messages | tojson(nothing=1) }}",
        "{% for i in range(999999999) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_broken_template_is_refused_by_a_sentence(template):
    ours, _ = pair_of(template)
    with pytest.raises(UserError, match="template refuses"):
        ours.chat([{"role": "user", "content": "x"}])


def test_a_model_without_a_template_says_so():
    ours, _ = pair_of(None)
    with pytest.raises(UserError, match=r"no chat template.*--train-on all"):
        ours.chat([{"role": "user", "content": "x"}])


@given(text=st.text())
def test_every_text_comes_back_from_its_ids_and_every_id_has_its_characters(text):
    ours, theirs = pair_of(TEMPLATE)
    ids, offsets = ours.encode_with_offsets(text)
    assert ids == ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == text
    assert len(offsets) == len(ids)
    for i, (a, b) in zip(ids, offsets, strict=True):
        assert ours.decode([i]) in (text[a:b], "\ufffd")


def test_special_tokens_are_recognised_and_left_out_when_asked():
    ours, _ = pair_of(TEMPLATE)
    ids = ours.encode(f"<|im_start|>a{END}")
    assert ids == [256, 64, 257]
    assert ours.decode(ids, skip_special=True) == "a"


def test_what_is_saved_reads_back_here_and_in_transformers(tmp_path):
    ours, _ = pair_of(LLAMA2)
    ours.save(tmp_path)
    again, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (again.template, again.specials, again.end_ids) == (ours.template, ours.specials, ours.end_ids)
    assert theirs.eos_token == END
    messages = conversation(system=True)
    assert again.chat(messages) == ours.chat(messages) == theirs.apply_chat_template(messages, tokenize=False)
    for text in TEXTS:
        assert again.encode(text) == ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    pair_of(None)[0].save(tmp_path / ".." / tmp_path.name)
    assert Tokenizer.load(tmp_path).end_ids == {257}


def written(folder, said, **files):
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return Tokenizer.load(folder)


def test_end_tokens_come_from_the_tokenizer_and_the_generation_config_or_the_config(tmp_path):
    config = {"eos_token": {"content": END, "lstrip": False}}
    assert written(tmp_path, config).end_ids == {257}
    assert written(tmp_path, config, config={"eos_token_id": 258}).end_ids == {257, 258}
    assert written(tmp_path, config, generation_config={"eos_token_id": [257, 259]}).end_ids == {257, 259}
    assert written(tmp_path, {"eos_token": "<absent>"}).end_ids == {257, 259}


def test_templates_are_found_where_the_hub_keeps_them(tmp_path):
    assert written(tmp_path, {"chat_template": "one"}).template == "one"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    assert written(tmp_path, {"chat_template": named}).template == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert Tokenizer.load(tmp_path).template == "three"


def test_a_folder_without_a_tokenizer_and_a_damaged_one_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in this model folder"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer"):
        Tokenizer.load(tmp_path)
