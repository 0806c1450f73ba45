import dataclasses
import subprocess
import sys
from dataclasses import replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_rft.checks import ConfigError, UserError
from prefix_rft.cli import parse
from prefix_rft.config import Config, config_from_dict, load_config, save_config
from prefix_rft.methods import METHODS

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FIELDS = [
    (section.name, field.name, get_type_hints(section.type)[field.name])
    for section in dataclasses.fields(Config)
    if dataclasses.is_dataclass(section.type)
    for field in dataclasses.fields(section.type)
]


def toml_values(expected: Any) -> st.SearchStrategy:
    """What TOML may hold for a field of this type."""
    kind, options = get_origin(expected) or expected, get_args(expected)
    if kind in (Union, UnionType):
        return st.one_of([toml_values(option) for option in options if option is not type(None)])
    if kind is Literal:
        return st.sampled_from(options)
    if kind is tuple and options[-1] is Ellipsis:
        return st.lists(toml_values(options[0]), max_size=2)
    if kind is tuple:
        return st.tuples(*map(toml_values, options)).map(list)
    if kind is dict:
        return st.dictionaries(st.sampled_from(["prompt", "answer", "demonstration"]), TEXT)
    return {
        str: TEXT,
        bool: st.booleans(),
        int: st.integers(-2, 2**40),
        float: st.one_of(st.floats(0, 1), st.floats(), st.integers(0, 3)),
    }[kind]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """A configuration of some random fields, as far as the checks let them in."""
    accepted: dict[str, Any] = {}
    for section, key, expected in draw(st.lists(st.sampled_from(FIELDS), max_size=12)):
        value = draw(toml_values(expected))
        candidate = accepted | {section: accepted.get(section, {}) | {key: value}}
        try:
            config_from_dict(candidate)
        except ConfigError:
            continue
        accepted = candidate
    return config_from_dict(accepted)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(config=configs())
def test_a_saved_configuration_loads_as_itself(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    save_config(config, path)
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("values", "unknown", "nearest"),
    [
        ({"trainer": {"num_step": 3}}, "trainer.num_step", "trainer.num_steps"),
        ({"trainr": {"num_steps": 3}}, "trainr", "trainer"),
        ({"trainer": {"lr": 1.0}}, "trainer.lr", "optimizer.lr"),
        ({"temperature": 1.0}, "temperature", "eval.temperature"),
        ({"zzz": 1}, "zzz", None),
        # an unknown key is told before a value that is refused
        ({"seed": "x", "data": {"pth": 1}}, "data.pth", "data.path"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(values, unknown, nearest):
    with pytest.raises(ConfigError) as error:
        config_from_dict(values)
    assert str(error.value).startswith(f"unknown key '{unknown}'; did you mean '")
    if nearest:
        assert str(error.value).endswith(f"'{nearest}'?")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"testbed": {"max_value": "20"}}, "testbed.max_value: expected a whole number, got '20'"),
        ({"testbed": {"max_value": 2.5}}, "testbed.max_value: expected a whole number, got 2.5"),
        ({"testbed": {"max_value": True}}, "testbed.max_value: expected a whole number, got True"),
        ({"loss": {"clip_low": False}}, "loss.clip_low: expected a number, got False"),
        ({"data": {"strict": 1}}, "data.strict: expected true or false, got 1"),
        ({"data": {"eval_path": 1}}, "data.eval_path: expected a string or none, got 1"),
        (
            {"data": {"columns": {"prompt": 1}}},
            "data.columns: expected a table of strings, got {'prompt': 1}",
        ),
        ({"data": "testbed"}, "data: expected a table, got 'testbed'"),
        (
            {"optimizer": {"betas": [0.9]}},
            "optimizer.betas: expected [a number in [0, 1), a number in [0, 1)], got [0.9]",
        ),
        (
            {"loss": {"prefix_clip": "sme"}},
            "loss.prefix_clip: expected 'same' or 'none' or [a number, a number], got 'sme'",
        ),
        (
            {"prefix_rft": {"selection_order": "hi"}},
            "prefix_rft.selection_order: expected 'high' or 'low' or 'random', got 'hi'",
        ),
    ],
)
def test_a_value_of_the_wrong_type_names_key_type_and_value(values, message):
    with pytest.raises(ConfigError) as error:
        config_from_dict(values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("trainer", "num_steps", 0, "a whole number above 0"),
        ("trainer", "checkpoint_every", -1, "a whole number of at least 0"),
        ("trainer", "profile_steps", [3, -1], "[a whole number of at least 0, ...]"),
        ("model", "lora_rank", 0, "a whole number above 0 or none"),
        ("optimizer", "lr", float("nan"), "a number above 0"),
        ("optimizer", "lr", float("inf"), "a number above 0"),
        ("data", "demonstration_fraction", 1.1, "a fraction in [0, 1]"),
        ("data", "answer_pattern", " ", '"boxed" or a marker'),
        ("vllm", "gpu_memory_utilization", 0.0, "a fraction in (0, 1]"),
        ("model", "device", "cuda:", "auto, cpu, cuda or cuda:<number>"),
    ],
)
def test_a_value_out_of_bounds_names_them(section, key, value, expected):
    with pytest.raises(ConfigError) as error:
        config_from_dict({section: {key: value}})
    assert str(error.value) == f"{section}.{key}: expected {expected}, got {value!r}"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("loss", "clip_low", 1.0),
        ("loss", "clip_high", -0.1),
        ("loss", "prefix_clip", [1.5, 0.2]),
        ("loss", "dual_clip", 1.0),
        ("loss", "importance_cap", 0.0),
        ("loss", "entropy_coef", -0.1),
        ("loss", "entropy_coef", float("nan")),
        ("model", "device", "cuda:"),
        ("model", "device", "mps"),
        ("base", "max_position_embeddings", 511),  # below base.max_length
        ("model", "rope_theta", 0.0),
        ("model", "max_position_embeddings", 9215),  # below 1024 + 8192
        ("rollout", "group_size", 1),
        ("rollout", "temperature", 0.0),
        ("prefix_rft", "num_hybrid", 9),  # of a group of 8
        ("prefix_rft", "min_prefix_tokens", 8192),
        ("prefix_rft", "low", 0.96),
        ("optimizer", "betas", [0.9, 1.0]),
        ("optimizer", "eps", 0.0),
        ("optimizer", "final_lr_fraction", 0.1),  # of a constant schedule
        ("optimizer", "weight_decay", -1.0),
        ("trainer", "prompts_per_update", 60),  # of 128 a step
        ("trainer", "sample_every", 0),
        ("eval", "temperature", 0.0),
        ("eval", "max_response_length", 1),
        ("data", "demonstration_fraction", 1.1),
        ("data", "columns", {"question": "q"}),
    ],
)
def test_a_value_out_of_range_names_its_key(section, key, value):
    with pytest.raises(ConfigError, match=rf"\b{section}\.{key}\b.*: expected .*, got "):
        config_from_dict({section: {key: value}})


def test_a_warm_up_is_given_in_steps_or_as_a_fraction():
    with pytest.raises(ConfigError, match=r"^optimizer.warmup_fraction: expected 0 beside .*3"):
        config_from_dict({"optimizer": {"warmup_steps": 3, "warmup_fraction": 0.1}})


@pytest.mark.parametrize("values", [{"name": "a/b"}, {"name": ""}, {"seed": -1}])
def test_a_bad_name_or_seed_is_refused(values):
    with pytest.raises(ConfigError, match=f"^{next(iter(values))}: expected "):
        config_from_dict(values)


def test_a_file_gives_its_values_and_the_defaults_of_all_others(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("seed = 3\n[loss]\nprefix_clip = [0.1, 1]\n[optimizer]\nlr = 1\n")
    config = load_config(str(path))
    assert config.loss.prefix_clip == (0.1, 1.0)
    assert config.seed == 3
    assert type(config.optimizer.lr) is float
    assert config.trainer == Config().trainer


def test_an_error_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[trainer]\nnum_stps = 3\n")
    with pytest.raises(ConfigError, match=r"mine\.toml: unknown key 'trainer\.num_stps'"):
        load_config(path)
    path.write_text("[trainer\n")
    with pytest.raises(ConfigError, match=r"mine\.toml: no valid TOML: .*line 1"):
        load_config(path)
    path.write_bytes(b'name = "\xff"\n')
    with pytest.raises(ConfigError, match=r"mine\.toml: no valid TOML"):
        load_config(path)


def test_an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(
        ConfigError, match="expected a TOML file or one of .*testbed.*, got testbad"
    ):
        load_config("testbad")


def test_every_shipped_configuration_loads():
    from importlib import resources

    names = [p.name for p in (resources.files("prefix_rft") / "configs").iterdir()]
    assert names
    for name in names:
        assert isinstance(load_config(name.removesuffix(".toml")), Config)


def test_user_errors_are_no_value_errors():
    # tyro wraps a ValueError of a dataclass into a text of its own
    assert issubclass(ConfigError, UserError) and not issubclass(UserError, ValueError)


def test_command_line_configuration_and_methods_need_no_torch():
    code = (
        "import sys, prefix_rft.cli, prefix_rft.config, prefix_rft.methods\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.fixture
def own_method(tmp_path, monkeypatch):
    """The name of a method of one's own with a section [mine]."""
    (tmp_path / "own_method.py").write_text(
        "from prefix_rft.checks import config_section\n"
        "from prefix_rft.methods import Method\n"
        "@config_section('mine')\n"
        "class MineConfig:\n"
        "    alpha: float = 0.5\n"
        "class Mine(Method):\n"
        "    name = 'mine'\n"
        "    section = MineConfig\n"
        "class Taken(Mine):\n"
        "    name = 'data'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    known = dict(METHODS)
    yield "own_method:Mine"
    METHODS.clear()
    METHODS.update(known)
    sys.modules.pop("own_method", None)


def test_a_method_of_ones_own_brings_its_section_to_file_and_command_line(own_method, tmp_path):
    values = {"method": {"name": own_method}, "mine": {"alpha": 2}}
    config = config_from_dict(values)
    assert isinstance(config, Config) and config.mine.alpha == 2.0
    path = tmp_path / "config.toml"
    save_config(config, path)
    assert load_config(path) == config
    assert parse(["train", str(path), "--mine.alpha", "3"]).overrides == replace(
        config, mine=replace(config.mine, alpha=3.0)
    )
    with pytest.raises(ConfigError, match=r"unknown key 'mine.alpa'; did you mean 'mine.alpha'\?"):
        config_from_dict({"method": {"name": own_method}, "mine": {"alpa": 2}})


@pytest.mark.parametrize(
    "name", [["--method.name", "own_method:Mine"], ["--method.name=own_method:Mine"]]
)
def test_the_command_line_can_name_a_method_of_ones_own(own_method, name):
    config = parse(["train", "testbed", *name, "--mine.alpha", "3"]).overrides
    assert (config.method.name, config.mine.alpha) == (own_method, 3.0)


def test_a_saved_configuration_has_no_section_that_nothing_would_find(own_method, tmp_path):
    config_from_dict({"method": {"name": own_method}})
    config = config_from_dict({})
    assert config.mine
    save_config(config, tmp_path / "config.toml")
    assert "mine" not in (tmp_path / "config.toml").read_text()


def test_a_method_may_not_take_the_name_of_a_section(own_method):
    with pytest.raises(ConfigError, match="^method.name: expected .*, got 'data'"):
        config_from_dict({"method": {"name": "own_method:Taken"}})


def test_the_limits_of_a_method_count_where_it_is_chosen():
    values = {"prefix_rft": {"num_hybrid": 9}, "rollout": {"group_size": 8}}
    with pytest.raises(ConfigError, match=r"^prefix_rft.num_hybrid: expected at most 8, .*, got 9"):
        config_from_dict(values)
    assert config_from_dict(values | {"method": {"name": "rft"}}).prefix_rft.num_hybrid == 9


def test_a_scale_of_advantages_is_refused_where_it_has_no_effect():
    values = {"method": {"name": "rft", "advantage_scale": "std"}}
    assert config_from_dict(values).method.advantage_scale == "std"
    values["method"]["name"] = "luffy"
    with pytest.raises(ConfigError, match='^method.advantage_scale: expected "none" with .* luffy'):
        config_from_dict(values)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match="^method.name: expected one of prefix_rft, rft, sft, .*or "
    ):
        config_from_dict({"method": {"name": "prefixrft"}})
