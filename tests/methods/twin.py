"""A step of a method beside its twin: a loss written straight from the definition, in float64.

The twin sees graded groups and two models, and materialises every softmax, a row at a time. What is
compared: each update's loss and gradient, and the weights after the optimizer's steps.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from prefix_rft.data_types import Group, Problem, Rollout
from prefix_rft.metrics.step_metrics import StepMetrics
from prefix_rft.train.interrupt import Interrupt
from prefix_rft.train.trainer import Trainer
from tests.tiny import make_tokenizer, make_trainer
from tests.train.test_update import apply_update, largest_difference

EOS = make_tokenizer().eos_token_id
VOCAB_SIZE = len(make_tokenizer())  # the model has more columns
GROUP_SIZE, MAX_LENGTH, TEMPERATURE = 4, 24, 0.8
VALUES = {
    "model": {"dtype": "float64"},
    "rollout": {
        "group_size": GROUP_SIZE,
        "max_response_length": MAX_LENGTH,
        "temperature": TEMPERATURE,
    },
    "optimizer": {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "max_grad_norm": 0.5},
    "trainer": {"num_steps": 10, "prompts_per_step": 4, "prompts_per_update": 4},
}


@dataclass(frozen=True)
class View:
    """A model as the twin sees it: log-probs and entropies of a response, from whole softmaxes."""

    model: torch.nn.Module
    temperature: float = TEMPERATURE

    def __call__(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([(*prompt_ids, *response_ids)])
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :, :VOCAB_SIZE]
        log_p = torch.log_softmax(logits / self.temperature, -1)[len(prompt_ids) - 1 : -1]
        log_probs = log_p.gather(1, torch.tensor(response_ids)[:, None])[:, 0]
        return log_probs, -(log_p.exp() * log_p).sum(-1)

    def rollout(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
        return self(rollout.prompt_ids, rollout.response_ids)

    def demonstration(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        return self(problem.prompt_ids, (*problem.demonstration_ids, EOS))


# (the policy now, the policy before the step, the groups of the update) -> loss
Loss = Callable[[View, View, Sequence[Group]], torch.Tensor]


@dataclass(frozen=True)
class Step:
    """What a step of the trainer did beside what it should have done."""

    groups: list[Group]
    losses: list[tuple[float, float]]  # an update: ours, the twin's
    gradient_errors: list[float]  # norm of the difference over the norm
    weight_error: float  # the largest difference after the step
    moved: float  # the largest change of a weight
    metrics: dict[str, float]


def norm(tensors: Sequence[torch.Tensor]) -> float:
    return sum(x.square().sum().item() for x in tensors) ** 0.5


def take_step(trainer: Trainer, updates: Sequence[tuple[Loss, slice, str]]) -> Step:
    """One step of `trainer` and of the twin from the same weights and groups.

    Args:
        updates: of each expected update its loss, its groups, and the name of its optimizer. The
            optimizers of the twin begin at their first step, so take the first of `trainer`.
    """
    groups = trainer.rollouts(StepMetrics(), Interrupt())
    before = copy.deepcopy(trainer.policy.model).double()
    model = copy.deepcopy(before)
    ours: list[tuple[float, list[torch.Tensor]]] = []
    optimizer_step, update = trainer.optimizer_step, trainer.update

    def recorded_step(mini_batch):
        ours.append([0.0, [p.grad.double().clone() for p in trainer.policy.model.parameters()]])
        return optimizer_step(mini_batch)

    def recorded_update(*args, **options):
        done = update(*args, **options)
        ours[-1][0] = done.loss.item()
        return done

    trainer.optimizer_step, trainer.update = recorded_step, recorded_update
    metrics, _ = trainer.train_step(Interrupt())
    assert len(ours) == len(updates)

    losses, gradient_errors, moments, counts = [], [], {}, {}
    for (our_loss, our_gradient), (loss, part, optimizer) in zip(ours, updates, strict=True):
        value = loss(View(model), View(before), groups[part])
        value.backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradient = [parameter.grad for parameter in model.parameters()]
        difference = [a - b for a, b in zip(our_gradient, gradient, strict=True)]
        gradient_errors.append(norm(difference) / norm(gradient))
        losses.append((our_loss, value.item()))
        counts[optimizer] = counts.get(optimizer, 0) + 1
        config = replace(trainer.config, optimizer=trainer.optimizer_configs[optimizer])
        apply_update(config, model, moments.setdefault(optimizer, {}), counts[optimizer])
    return Step(
        groups=groups,
        losses=losses,
        gradient_errors=gradient_errors,
        weight_error=largest_difference(trainer.policy.model, model),
        moved=largest_difference(model, before),
        metrics=metrics,
    )


def method_trainer(name: str, options: dict | None = None, **sections: dict) -> Trainer:
    """A trainer of `name` over 4 problems; `sections` are laid over `VALUES`."""
    values = VALUES | {"method": {"name": name}} | ({name: options} if options else {})
    for section, fields in sections.items():
        values[section] = values.get(section, {}) | fields
    return make_trainer(values)


def assert_equals_twin(
    name: str,
    loss: Loss,
    options: dict | None = None,
    *,
    rule: Callable[[str, Problem], float] | None = None,
    setup: Callable[[Trainer], None] | None = None,
    float32_error: float = 1e-6,
    **sections: dict,
) -> Step:
    """Steps of `name` equal the twin's: for any micro-batches, one update and two, both dtypes.

    The gradient and the loss to 1e-9 in float64, and to `float32_error` in float32; the weights
    after the optimizer in float64.

    Args:
        setup: changes a trainer before its step.
        float32_error: of the gradient; the rows' gradients may cancel to a small one.
    Returns:
        the step of one update in float64.
    """
    one = [(loss, slice(0, 4), "policy")]
    two = [(loss, slice(0, 2), "policy"), (loss, slice(2, 4), "policy")]
    trainer_fields = sections.pop("trainer", {})

    def step(updates, dtype, **fields) -> Step:
        trainer = method_trainer(
            name, options, model={"dtype": dtype}, trainer=trainer_fields | fields, **sections
        )
        if rule is not None:
            trainer.rewarder.rule = rule
        if setup is not None:
            setup(trainer)
        return take_step(trainer, updates)

    whole = step(one, "float64", micro_batch_tokens=100_000)
    for done in (
        whole,
        step(one, "float64", micro_batch_tokens=40),
        step(one, "float64", micro_batch_tokens=1),
        step(two, "float64", prompts_per_update=2, micro_batch_tokens=60),
    ):
        for ours, expected in done.losses:
            assert abs(ours - expected) <= 1e-9 * abs(expected) + 1e-12
        assert max(done.gradient_errors) < 1e-9
        assert done.weight_error < 1e-9
        assert done.moved > 1e-3
    single = step(one, "float32", micro_batch_tokens=60)
    for ours, expected in single.losses:
        assert abs(ours - expected) <= 1e-6 * max(1.0, abs(expected))
    assert max(single.gradient_errors) < float32_error
    return whole
