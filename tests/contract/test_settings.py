"""Settings: each has a sentence, unknown ones are refused with the nearest and the line, what is written reads back."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import deltaw
from deltaw import methods
from deltaw.adapters.adapter import Method
from deltaw.decode.sampling import Sampling
from deltaw.errors import UserError, nearest
from deltaw.settings import Training, build, check_file, names, plain, read_yaml


def settings_classes():
    """Every class under @settings in the package: its source and itself."""
    names = {info.name for info in pkgutil.walk_packages(deltaw.__path__, "deltaw.")} - {"deltaw.web.replicas"}
    modules = [importlib.import_module(name) for name in sorted(names)]  # Ray has settings of an older kind
    classes = [(m, n) for m in modules for n in ast.parse(inspect.getsource(m)).body if isinstance(n, ast.ClassDef)]
    return [
        pytest.param(node, getattr(module, node.name), id=f"{module.__name__}.{node.name}")
        for module, node in classes
        if any(getattr(decorator, "id", "") == "settings" for decorator in node.decorator_list)
    ]


@pytest.mark.parametrize(("node", "cls"), settings_classes())
def test_every_setting_has_a_sentence_under_it(node, cls):
    assert ast.get_docstring(node)
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
            said = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            assert re.fullmatch(r"[A-Z0-9].{8,}[.)}]", said, re.DOTALL), f"{node.name}.{field.target.id}: {said!r}"


@pytest.mark.parametrize(("node", "cls"), settings_classes())
def test_settings_are_frozen_and_refuse_what_they_do_not_know(node, cls):
    with pytest.raises(UserError, match="Unknown setting 'nonsense'"):
        build(cls, {"nonsense": 1}, "config.yaml")
    if inspect.isabstract(cls):
        return
    made = build(cls, {})
    with pytest.raises(AttributeError):
        setattr(made, names(cls)[0], None)
    assert build(cls, yaml.safe_load(yaml.safe_dump(plain(made)))) == made


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (Training, {"epochs": 0}),
        (Training, {"learning_rate": 1.0}),
        (Training, {"batch_rows": 0}),
        (Training, {"batch_rows": "many"}),
        (Training, {"warmup": 1.1}),
        (Training, {"schedule": "step"}),
        (Training, {"train_on": "questions"}),
        (Training, {"seed": -1}),
        (Training, {"minutes": 0}),
        (Sampling, {"temperature": -0.1}),
        (Sampling, {"top_p": 0}),
        (Sampling, {"min_p": 2}),
        (Sampling, {"repetition_penalty": 0.9}),
        (Sampling, {"presence_penalty": 2.1}),
        (Sampling, {"frequency_penalty": -2.1}),
        (Sampling, {"max_new_tokens": 0}),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_name_and_itself(cls, values):
    ((name, value),) = values.items()
    with pytest.raises(UserError) as e:
        build(cls, values, "config.yaml")
    assert e.value.where == "config.yaml"
    assert f"{name} = {value!r}: " in e.value.what
    assert e.value.code == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["epochs", "minutes", "weight_decay"])
def test_numbers_are_finite(name, value):
    with pytest.raises(UserError, match=name):
        build(Training, {name: value})


@pytest.mark.parametrize("name", methods.names())
def test_no_setting_of_a_method_hides_one_of_training(name):
    assert issubclass(methods.find(name), Method)
    assert not set(names(methods.find(name))) & set(names(Training))


def test_values_that_flags_and_yaml_write_differently_mean_the_same():
    flags = build(Training, {"learning_rate": "1e-4", "steps": "20", "keep_best": "false", "runs": "out"})
    file = build(Training, {"learning_rate": 1e-4, "steps": 20, "keep_best": False, "runs": Path("out")})
    assert flags == file


def test_an_unknown_key_of_a_file_is_refused_with_its_line_and_the_nearest(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("base: smollm2-135m\n\n# the rate\nlerning_rate: 0.001\n")
    with pytest.raises(UserError) as e:
        check_file(file, read_yaml(file), Training)
    assert e.value.where == f"{file}:4"
    assert e.value.what == "Unknown setting 'lerning_rate'."
    assert e.value.remedy == "Did you mean 'learning_rate'?"
    file.write_text("learning_rate: 0.001\nepochs: 2\n")
    check_file(file, read_yaml(file), Training)
    assert read_yaml(file) == {"learning_rate": 0.001, "epochs": 2}


def test_a_value_of_a_file_that_does_not_fit_is_refused_with_its_line(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("val: 0.1\nepochs: -2\n")
    with pytest.raises(UserError, match="epochs = -2") as e:
        check_file(file, read_yaml(file), Training)
    assert e.value.where == f"{file}:2"


def test_a_key_far_from_any_gets_the_whole_list():
    assert nearest("zzz", ["b", "a"]) == "There are: a, b."


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("epochs: 2\nrank: [1\n", ":3", "not YAML"),
        ("epochs: 2\n\tsteps: 3\n", ":2", "not YAML"),
        ("- epochs\n", "", "mapping"),
        ("epochs", "", "mapping"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_with_its_line(text, where, said, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said) as e:
        read_yaml(file)
    assert e.value.where == f"{file}{where}"


def test_an_empty_file_sets_nothing_and_a_missing_one_is_named(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    check_file(tmp_path / "empty.yaml", {}, Training)
    with pytest.raises(UserError, match="cannot be read") as e:
        read_yaml(tmp_path / "none.yaml")
    assert e.value.where == str(tmp_path / "none.yaml")


def test_a_file_that_is_not_utf8_is_refused_by_a_sentence(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes("name: Käse\n".encode("latin-1"))
    with pytest.raises(UserError):
        read_yaml(file)
