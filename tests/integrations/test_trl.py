"""`PrefixGRPOTrainer` against the trainer of this package, and what it refuses."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from datasets import Dataset
from rft_kernels import select_top_entropy
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOTrainer

from prefix_rft.checks import ConfigError
from prefix_rft.data_types import Group, Problem, Rollout
from prefix_rft.integrations.trl import PrefixGRPOConfig, PrefixGRPOTrainer
from prefix_rft.integrations.trl import trainer as trainer_module
from prefix_rft.metrics import StepMetrics
from tests.tiny import CHAT_TEMPLATE, make_model, make_tokenizer, make_trainer

ROOT = Path(__file__).parents[2]
GROUP, LENGTH = 4, 24


def rows(num: int = 4) -> list[dict[str, str]]:
    texts = [(f"add {i}+{2 * i} ", f"{i}+{2 * i}={3 * i} is it{'!' * i}") for i in range(num)]
    texts = [(prompt, text.replace("!", "+")) for prompt, text in texts]
    return [{"prompt": prompt, "completion": text} for prompt, text in texts]


def reward(completions: list[str], **columns: Any) -> list[float]:
    """The group of the first problem is always right, so that it teaches nothing."""
    return [
        float(prompt.startswith("add 0") or sum(map(ord, text)) % 3 == 0)
        for prompt, text in zip(columns["prompts"], completions, strict=True)
    ]


class Gradients(TrainerCallback):
    """What every optimizer step was taken from."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        named = model.named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


class Recorded(PrefixGRPOTrainer):
    """Keeps what was generated: (prompt ids, prefix, response)."""

    generated: list[list[tuple]]

    def _generate_single_turn(self, prompt_ids, *arguments):
        found = super()._generate_single_turn(prompt_ids, *arguments)
        prefixes = self._prefixes or [()] * len(found[0])
        self.__dict__.setdefault("generated", []).append(
            [tuple(map(tuple, row)) for row in zip(prompt_ids, prefixes, found[0], strict=True)]
        )
        return found


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Recorded]:
    def made(
        *, data: Any = None, trainer: dict | None = None, reward: Any = reward, **options: Any
    ) -> Recorded:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = CHAT_TEMPLATE
        values = {
            "output_dir": str(tmp_path),
            "use_cpu": True,
            "bf16": False,
            "report_to": [],
            "max_steps": 1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "num_generations": GROUP,
            "max_completion_length": LENGTH,
            "temperature": 0.8,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "prefix_schedule": "uniform",
        }
        model = make_model(len(tokenizer))
        if options.get("beta"):  # TRL reads the reference from where the policy came
            model.save_pretrained(tmp_path / "base")
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        return Recorded(
            model=model,
            reward_funcs=reward,
            args=PrefixGRPOConfig(**values | options),
            train_dataset=Dataset.from_list(rows() if data is None else data),
            processing_class=tokenizer,
            callbacks=[Gradients()],
            **trainer or {},
        )

    return made


def gradients(trainer: PrefixGRPOTrainer) -> list[dict[str, torch.Tensor]]:
    [found] = [c for c in trainer.callback_handler.callbacks if isinstance(c, Gradients)]
    return found.steps


def our_update(generated: list[tuple], section: dict) -> tuple[float, float, dict]:
    """Loss, kept fraction and gradients of one update of this package on the same rollouts."""
    ours = make_trainer(
        {
            "rollout": {
                "group_size": GROUP,
                "max_response_length": LENGTH,
                "temperature": 0.8,
                "max_log_prob_gap": 1e9,
            },
            "trainer": {"num_steps": 1, "prompts_per_step": 4, "prompts_per_update": 4},
            "prefix_rft": section,
        }
    )
    ours.policy.lm_head.vocab_size = None  # TRL's softmax has the padding of the lm_head too
    tokenizer, groups = ours.tokenizer, []
    for start in range(0, len(generated), GROUP):
        prompts, prefixes, responses = zip(*generated[start : start + GROUP], strict=True)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        scores = reward(texts, prompts=tokenizer.batch_decode(prompts))
        problem = Problem(index=start, prompt="", prompt_ids=prompts[0], answer="")
        rollouts = tuple(
            Rollout(
                prompt_ids=prompts[0],
                response_ids=response,
                prefix_length=len(prefix),
                rollout_log_probs=(0.0,) * (len(response) - len(prefix)),
                finish_reason="stop",
                text=text,
                reward=score,
                status="correct" if score else "wrong",
            )
            for prefix, response, text, score in zip(
                prefixes, responses, texts, scores, strict=True
            )
        )
        groups.append(Group(problem=problem, rollouts=rollouts))
    found: dict[str, torch.Tensor] = {}

    def take(mini_batch) -> tuple[float, bool]:
        named = ours.policy.model.named_parameters()
        found.update({n: p.grad.clone() for n, p in named if p.grad is not None})
        return 0.0, True

    ours.optimizer_step = take
    [mini_batch] = ours.method.mini_batches(groups, 0)
    metrics = StepMetrics()
    update = ours.update(mini_batch, ours.pack(mini_batch, metrics), metrics)
    batch = update.batch
    kept = batch.selected_mask.sum() / (batch.prefix_mask & batch.has_advantage).sum()
    return update.loss.item(), kept.item(), found


EXCLUDE = {"num_hybrid": 2, "selection_scope": "sequence"}
DROP = {"drop_negative_prefix_advantage": True, "selection_fraction": 0.5, "num_hybrid": 3}


def parts(size: int) -> dict[str, int]:
    """16 rows in micro-batches of `size`."""
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size}


@pytest.mark.parametrize(
    ("options", "section"),
    [
        ({}, {}),
        (parts(16), {}),
        (parts(1), {}),
        (parts(8) | {"head": "trl"}, {}),
        (
            EXCLUDE | {"advantage_baseline": "exclude_hybrid"},
            EXCLUDE | {"advantage": "exclude_hybrid"},
        ),
        (DROP, DROP),
    ],
    ids=["4 times 4", "16 at once", "1 by 1", "TRL's loss", "exclude_hybrid", "drop_negative"],
)
def test_one_update_is_that_of_our_trainer(make, options, section):
    trainer = make(**options)
    trainer.train()
    [generated] = trainer.generated
    tokenizer, num_ordinary = make_tokenizer(), GROUP - options.get("num_hybrid", 1)
    demonstrations = {
        tuple(tokenizer(row["prompt"])["input_ids"]): tokenizer(row["completion"])["input_ids"]
        for row in rows()
    }
    for place, (prompt, prefix, _) in enumerate(generated):
        assert bool(prefix) == (place % GROUP >= num_ordinary)
        assert demonstrations[prompt][: len(prefix)] == list(prefix)
    assert all(response[: len(prefix)] == prefix for _, prefix, response in generated)
    assert max(len(response) for _, _, response in generated) == LENGTH

    loss, kept, expected = our_update(generated, section)
    [logged, *_] = trainer.state.log_history
    assert logged["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert logged["policy/kept_frac"] == pytest.approx(kept, rel=1e-6)
    [found] = gradients(trainer)
    largest = max(grad.abs().max() for grad in expected.values())
    assert largest > 1e-3 and set(found) == set(expected)
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() < 1e-5 * largest, name


def weights(trainer: PrefixGRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(found: dict, expected: dict, *, tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance, name


NOT_COMPARED = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def history(trainer: PrefixGRPOTrainer) -> list[dict[str, float]]:
    logs = trainer.state.log_history
    return [{k: v for k, v in log.items() if k not in NOT_COMPARED} for log in logs]


@pytest.mark.parametrize(
    "options",
    [
        # A generation serves two updates, twice.
        parts(4)
        | {
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 4,
            "num_iterations": 2,
            "max_steps": 4,
            "loss_type": "dapo",
            "beta": 0.1,
            "use_bias_correction_kl": False,
        },
        {"loss_type": "grpo", "scale_rewards": "batch", "max_steps": 2},
        {"loss_type": "bnpo", "scale_rewards": "group", "max_steps": 2},
    ],
    ids=["dapo", "grpo", "bnpo"],
)
def test_both_heads_give_the_same(make, options, monkeypatch):
    pools = []

    def counted(entropy, candidates, **given):
        selected = select_top_entropy(entropy, candidates, **given)
        pools.append((candidates.sum().item(), selected.sum().item()))
        return selected

    monkeypatch.setattr(trainer_module, "select_top_entropy", counted)
    found = []
    for head in ("trl", "fused"):
        trainer = make(head=head, **options)
        trainer.train()
        found.append((weights(trainer), history(trainer)))
        assert len(trainer.generated) == (1 if "num_iterations" in options else 2)
    assert len(pools) == 2 * options["max_steps"] and pools[:2] != pools[1:3]
    assert all(selected == n - n * 4 // 5 for n, selected in pools)
    (expected, by_trl), (own, by_us) = found
    start = dict(make_model(len(make_tokenizer())).named_parameters())
    assert max((expected[name] - start[name]).abs().max() for name in start) > 1e-3
    assert_same(own, expected, tolerance=1e-6)
    for log, other in zip(by_us, by_trl, strict=True):
        assert log == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_without_hybrids_it_is_trl(make, monkeypatch):
    """The same rollouts, losses and weights, of data without demonstrations."""
    data = [{"prompt": row["prompt"]} for row in rows()]
    options = {"num_hybrid": 0, "max_steps": 2, "loss_type": "sapo", "data": data}
    trainer = make(**options)
    trainer.train()
    own = make(**options)
    for name in vars(PrefixGRPOTrainer):
        if hasattr(GRPOTrainer, name) and callable(getattr(GRPOTrainer, name)):
            monkeypatch.setattr(PrefixGRPOTrainer, name, getattr(GRPOTrainer, name))
    monkeypatch.delattr(Recorded, "_generate_single_turn")
    own.train()
    assert history(trainer) == history(own)
    assert_same(weights(trainer), weights(own), tolerance=0.0)


def test_messages_a_named_column_and_rows_without_a_demonstration(make):
    """As TRL has conversations; a column that is no signature column; evaluation as TRL has it."""
    data = [
        {
            "prompt": [{"role": "user", "content": row["prompt"].strip()}],
            "worked": [{"role": "assistant", "content": row["completion"]}] if i else None,
        }
        for i, row in enumerate(rows())
    ]
    evaluated = Dataset.from_list([{"prompt": row["prompt"]} for row in data])

    def length(completions: list, **columns: Any) -> list[float]:
        return [float(len(each[0]["content"]) % 2) for each in completions]

    options = {
        "demonstration_column": "worked",
        "remove_unused_columns": True,
        "mask_truncated_completions": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "per_device_eval_batch_size": 4,
    }
    trainer = make(data=data, trainer={"eval_dataset": evaluated}, reward=length, **options)
    trainer.train()
    [generated] = [each for each in trainer.generated if len(each) == 16]
    ids = {tuple(trainer.processing_class(row["completion"])["input_ids"]) for row in rows()}
    prefixes = [prefix for _, prefix, _ in generated if prefix]
    assert len(prefixes) == 3
    assert all(any(own[: len(prefix)] == prefix for own in ids) for prefix in prefixes)
    assert trainer.state.log_history[0]["prefix/groups_frac"] == 0.75
    assert any("eval_reward" in log for log in trainer.state.log_history)


def test_lora_trains_adapters_alone_and_equals_trls_loss(make):
    pytest.importorskip("peft", reason="peft is not installed")
    from peft import LoraConfig

    found = []
    for head in ("trl", "fused"):
        lora = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
        trainer = make(head=head, trainer={"peft_config": lora})
        trainer.train()
        [grads] = gradients(trainer)
        assert grads and all("lora" in name for name in grads)
        found.append(grads)
    assert max(grad.abs().max() for grad in found[0].values()) > 1e-3
    assert_same(found[1], found[0], tolerance=1e-6)


def test_a_resumed_run_is_one_that_went_on(make, tmp_path):
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    # Three generations: TRL does not continue the order of rows across the end of an epoch.
    options["data"] = rows(12)
    whole = make(**options, prefix_schedule="linear_window")
    whole.train()
    rest = make(**options, prefix_schedule="linear_window")
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rest.generated[-1] == whole.generated[-1]
    assert history(rest)[2] == history(whole)[2]
    assert_same(weights(rest), weights(whole), tolerance=0.0)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Started as accelerate starts them; pool, normalizer, prefixes and figures are of both."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)])
    found = []
    for num in (1, 2):
        out = tmp_path / f"{num}.pt"
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num)]
        script = [str(ROOT / "tests/integrations/two_processes.py"), str(out), "fused"]
        done = subprocess.run(
            [sys.executable, *(launch if num > 1 else []), *script],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(torch.load(out))
    one, two = found
    assert one["rollouts"] == two["rollouts"] and one["log"]["policy/kept_frac"] < 0.25
    largest = max(grad.abs().max() for grad in one["grads"].values())
    assert largest > 1e-3
    assert_same(two["grads"], one["grads"], tolerance=1e-5 * largest)
    for name, value in one["log"].items():
        # TRL averages these over micro-batches, and there are half as many.
        is_of_parts = name == "entropy" or name.startswith("clip_ratio")
        if name not in NOT_COMPARED and not is_of_parts:
            assert two["log"][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hybrid": 5}, "num_hybrid: expected at most 4, given num_generations, got 5"),
        (
            {"num_hybrid": 4, "advantage_baseline": "exclude_hybrid"},
            "num_hybrid: expected at most 3, given num_generations, got 4",
        ),
        ({"prefix_low": 0.9, "prefix_high": 0.5}, "prefix_low: expected at most high"),
        ({"prefix_schedule": "sine"}, "prefix_schedule: expected 'cosine_window' or"),
        ({"selection_fraction": 1.5}, "selection_fraction: expected a fraction in"),
        ({"steps_per_generation": 6}, "steps_per_generation: expected a multiple of"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation: "),
        ({"head": "liger"}, "head: expected 'fused' or 'trl', got 'liger'"),
        ({"loss_type": "cispo"}, "loss_type: expected 'grpo' or .*, or head = 'trl', got 'cispo'"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level: expected 'token'"),
        ({"delta": 3.0}, "delta: expected None with"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile: expected 1.0 with"),
        ({"entropy_coef": 0.1}, "entropy_coef: expected 0.0 with"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy: expected False with"),
        ({"off_policy_mask_threshold": 1.0}, "off_policy_mask_threshold: expected None with"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32: expected False with"),
        ({"beta": 0.1}, "use_bias_correction_kl: expected False"),
        (
            {"beta": 0.1, "loss_type": "grpo", "use_bias_correction_kl": False},
            "beta: expected 0 with loss_type = 'grpo' and",
        ),
    ],
)
def test_options_are_refused_by_name(options, message, tmp_path):
    values = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": []}
    values |= {"num_generations": GROUP, "gradient_accumulation_steps": 4}
    with pytest.raises(ConfigError, match=message):
        PrefixGRPOConfig(**values | options)
    PrefixGRPOConfig(**values | options | {"num_hybrid": 0, "head": "trl"} | _allowed(options))


def _allowed(options: dict) -> dict:
    """Without hybrid rollouts only a value that is none of the allowed stays refused."""
    wrong = {"prefix_low": 0.05, "prefix_schedule": "uniform", "selection_fraction": 0.2}
    return {name: value for name, value in wrong.items() if name in options}


def test_one_generation_is_refused(make):
    with pytest.raises(ValueError, match="at least 2 generations"):
        make(num_generations=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"prompt": "a"}], r"demonstration_column: expected a column of train_dataset, which has"),
        ([{"prompt": "a", "completion": None}], "which has none in 1 rows"),
        (
            [*rows(), {"prompt": "a", "completion": "b" * 40}, {"prompt": "a", "completion": "c"}],
            "2 of 6 demonstrations do not fit, such as that of row 4: prefix: expected fewer than "
            "max_completion_length = 24 tokens, got 38",
        ),
    ],
)
def test_demonstrations_are_refused(make, data, message):
    with pytest.raises(ConfigError, match=message):
        make(data=data)


def test_arguments_are_refused(make):
    for name in ("rollout_func", "tools", "environment_factory"):
        with pytest.raises(ConfigError, match=f"{name}: expected none with num_hybrid > 0: "):
            make(trainer={name: [print]})
    with pytest.raises(ConfigError, match="args: expected a PrefixGRPOConfig, got 'NoneType'"):
        PrefixGRPOTrainer("model", reward)


def test_another_version_of_trl_is_one_clear_error(monkeypatch):
    import prefix_rft.integrations.trl as door

    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.17.0")
    with pytest.raises(ImportError, match=r"trl: expected version 1.16.\*, got 1.17.0"):
        importlib.reload(door)
    monkeypatch.setattr("prefix_rft.config.is_installed", lambda name: False)
    with pytest.raises(ImportError, match="trl is not installed; run pip install '.\\[trl\\]'"):
        importlib.reload(door)


def test_it_overrides_what_its_docstring_says():
    own = {name for name in vars(PrefixGRPOTrainer) if hasattr(GRPOTrainer, name)}
    own = {name for name in own if inspect.isfunction(getattr(GRPOTrainer, name))} - {"__init__"}
    assert own == set(re.findall(r"^    - `(\w+)`", PrefixGRPOTrainer.__doc__, re.MULTILINE))
