"""TRL's GRPOTrainer with rollouts that start inside a demonstration (arXiv 2507.01679)."""

import inspect
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import wraps
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import is_peft_model
from datasets import Dataset
from rft_kernels import PolicyConfig, select_top_entropy
from torch import Tensor
from transformers import ProcessorMixin
from trl import GRPOTrainer

from prefix_rft.checks import ConfigError, require
from prefix_rft.data_types import Problem
from prefix_rft.integrations.trl.advantages import generation_advantages
from prefix_rft.integrations.trl.config import PrefixGRPOConfig
from prefix_rft.integrations.trl.demonstrations import Demonstrations
from prefix_rft.integrations.trl.head import add_loss, fused_loss
from prefix_rft.integrations.trl.loss_metrics import loss_metrics

# Arguments of the trainer that do not go with hybrid rollouts, and why.
_REFUSED = {
    "rollout_func": "it generates from prompts, and would not start inside a demonstration",
    "tools": "what a tool answers is not in a demonstration",
    "environment_factory": "what an environment answers is not in a demonstration",
}


class PrefixGRPOTrainer(GRPOTrainer):
    """GRPOTrainer with the arguments of GRPOTrainer, where `args` is a `PrefixGRPOConfig`.

    Of TRL 1.16 it overrides, beside the constructor:

    - `_set_signature_columns_if_needed`: the demonstrations are no unused column;
    - `_generate_single_turn`: the last `num_hybrid` rollouts of a group continue a prefix of their
      demonstration, and have what is left of `max_completion_length`;
    - `_calculate_rewards`: keeps the rewards;
    - `_generate_and_score_completions`: draws the prefixes, and turns the rewards into advantages;
    - `_prepare_inputs`: selects among the prefix tokens of an optimizer step when it begins, over
      all processes; the others are out of the loss, as TRL has it of what tools answer;
    - `_compute_loss`: with `head = "fused"`, lm_head and loss in one op.

    Evaluation, and with `num_hybrid = 0` all, is TRL's own.

    Raises:
        ConfigError: an argument that hybrid rollouts do not go with, a dataset without the column,
            demonstrations that are too short to be cut or leave no room for a continuation.
    """

    _tag_names = [*GRPOTrainer._tag_names, "prefix-rft"]

    @wraps(GRPOTrainer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(GRPOTrainer.__init__).bind(self, *args, **kwargs)
        config = given.arguments.get("args")
        expected = "a PrefixGRPOConfig"
        require(isinstance(config, PrefixGRPOConfig), "args", expected, type(config).__name__)
        self._options = config.prefix_options()
        self._prefixes: list[tuple[int, ...]] | None = None  # of the rows being generated
        if self._options.num_hybrid:
            _check_arguments(given.arguments, config)
        super().__init__(*given.args[1:], **given.kwargs)
        if not self._options.num_hybrid:
            return
        self._demonstrations = Demonstrations(
            self.processing_class,
            column=config.demonstration_column,
            template={"chat_template": self.chat_template, **self.chat_template_kwargs},
        )
        if isinstance(self.train_dataset, Dataset):
            self._demonstrations.check(
                self.train_dataset, self._options, self.max_completion_length
            )
        if config.head == "fused":
            self._prepare_fused()

    def _prepare_fused(self) -> None:
        where = "a model on each process with head = 'fused', or head = 'trl'"
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        require(not is_sharded, "accelerate", where, "FSDP or DeepSpeed")
        coef = self.router_aux_loss_coef
        expected = "0 with head = 'fused', or head = 'trl'"
        require(not self.aux_loss_enabled, "router_aux_loss_coef", expected, coef)
        add_loss(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        self._policy_config = PolicyConfig(
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            kl="k3" if self.beta else "none",
            kl_coef=self.beta,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        column = self.args.demonstration_column
        if self._options.num_hybrid and column not in self._signature_columns:
            self._signature_columns.append(column)

    # Generation

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._options.num_hybrid or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._prefixes = self._draw_prefixes(inputs)
        try:
            output = super()._generate_and_score_completions(inputs)
            lengths = torch.tensor(
                [len(prefix) for prefix in self._prefixes], device=output["completion_ids"].device
            )
        finally:
            self._prefixes = None
        return output | self._token_advantages(output["completion_ids"], lengths)

    def _draw_prefixes(self, rows: list[dict[str, Any]]) -> list[tuple[int, ...]]:
        """The prefix of each row of this process, () of ordinary ones.

        A function of the seed, the optimizer step and the place of the group in the generation: the
        same in all processes, and in a run that is resumed.
        """
        step, config = self.state.global_step, self._options
        window = config.window(step, self.state.max_steps)
        self._metrics["train"]["prefix/low"].append(window[0])
        self._metrics["train"]["prefix/high"].append(window[1])
        first = self.accelerator.process_index * len(rows)
        num_ordinary = self.num_generations - config.num_hybrid
        places = [divmod(first + i, self.num_generations) for i in range(len(rows))]
        hybrids = [i for i, (_, member) in enumerate(places) if member >= num_ordinary]
        ids = self._demonstrations.ids([rows[i] for i in hybrids])
        prefixes: list[tuple[int, ...]] = [()] * len(rows)
        for i, demonstration_ids in zip(hybrids, ids, strict=True):
            if demonstration_ids:
                group, member = places[i]
                problem = Problem(
                    index=group,
                    prompt="",
                    prompt_ids=(),
                    answer="",
                    demonstration_ids=demonstration_ids,
                )
                requests = config.requests(
                    problem,
                    window,
                    np.random.default_rng([self.args.seed, step, group]),
                    self.max_completion_length,
                )
                prefixes[i] = requests[member - num_ordinary].prefix_ids
        return prefixes

    def _generate_single_turn(
        self,
        prompt_ids: Sequence[Sequence[int]],
        images: Any,
        multimodal_fields: Mapping[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], list[list[float | None]] | None]:
        if self._prefixes is None:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        prefixes = self._prefixes
        starts = [[*ids, *prefix] for ids, prefix in zip(prompt_ids, prefixes, strict=True)]
        # One generation each: rows of a group no longer start alike.
        completion_ids, log_probs = super()._generate_single_turn(
            starts, images, multimodal_fields, 1, has_tool_images
        )
        # Engines have one budget for all; what is past that of a row was sampled in vain.
        rooms = [self.max_completion_length - len(prefix) for prefix in prefixes]
        completion_ids = [
            [*prefix, *ids[:room]]
            for prefix, ids, room in zip(prefixes, completion_ids, rooms, strict=True)
        ]
        if log_probs is not None:  # None is TRL's word for a token without one
            log_probs = [
                [None] * len(prefix) + list(values[:room])
                for prefix, values, room in zip(prefixes, log_probs, rooms, strict=True)
            ]
        return completion_ids, log_probs

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _token_advantages(self, completion_ids: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """ "advantages" and "prefix_mask", [B, C], of the rows of this process."""
        per_func = self._rewards_per_func
        rewards = (per_func * self.reward_weights.to(per_func)).nansum(dim=1)
        rewards = rewards.masked_fill(per_func.isnan().all(dim=1), torch.nan).tolist()
        all_lengths = self.accelerator.gather(lengths).tolist()
        is_hybrid = [length > 0 for length in all_lengths]
        advantages = generation_advantages(
            rewards,
            is_hybrid,
            self._options,
            group_size=self.num_generations,
            scale=self.scale_rewards,
        )
        self._log_rollouts(rewards, is_hybrid, [each.continuation for each in advantages])
        first = self.accelerator.process_index * len(lengths)
        own = torch.tensor(advantages[first : first + len(lengths)], device=lengths.device)
        places = torch.arange(completion_ids.shape[1], device=lengths.device)
        prefix_mask = places < lengths[:, None]
        per_token = torch.where(prefix_mask, own[:, 1:], own[:, :1])
        return {"advantages": per_token, "prefix_mask": prefix_mask}

    def _log_rollouts(
        self, rewards: Sequence[float], is_hybrid: Sequence[bool], advantages: Sequence[float]
    ) -> None:
        for name, kind in (("hybrid", True), ("on_policy", False)):
            own = [r for r, h in zip(rewards, is_hybrid, strict=True) if h is kind and r == r]
            if own:
                self._metrics["train"][f"reward/{name}_mean"].append(sum(own) / len(own))
        size = self.num_generations
        groups = [any(is_hybrid[i : i + size]) for i in range(0, len(is_hybrid), size)]
        self._metrics["train"]["prefix/groups_frac"].append(sum(groups) / len(groups))
        shown = self._logs["advantages"]
        for _ in range(min(len(advantages), len(shown))):  # those that TRL has made
            shown.pop()
        shown.extend(advantages)

    # The optimizer step

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        inputs = super()._prepare_inputs(generation_batch)
        num_parts = self.args.gradient_accumulation_steps
        if self.model.training and "prefix_mask" in inputs and self._step % num_parts == 0:
            first = self._step % self.args.steps_per_generation
            self._select(self._buffered_inputs[first : first + num_parts])
        return inputs

    @torch.no_grad()
    def _select(self, parts: list[dict[str, Any]]) -> None:
        """Give the micro-batches of an optimizer step their "tool_mask", the tokens in its loss."""
        stacked = {
            name: torch.cat([part[name] for part in parts])
            for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        }
        is_token = stacked["completion_mask"].bool()
        prefix = torch.cat([part["prefix_mask"] for part in parts])
        has_advantage = torch.cat([part["advantages"] for part in parts]).ne(0).any(dim=1)
        candidates = prefix & is_token & has_advantage[:, None]
        options, is_parted = self._options, self.accelerator.num_processes > 1
        entropy = torch.zeros(candidates.shape, device=candidates.device)
        if options.selection_fraction:
            entropy = self._entropies(stacked, candidates)
        in_rows = options.selection_scope == "sequence"
        bounds = torch.arange(len(candidates) + 1, device=candidates.device) * candidates.shape[1]
        selected = select_top_entropy(
            entropy,
            candidates,
            fraction=Fraction(str(options.selection_fraction)),
            cu_seqlens=bounds.int() if in_rows else None,
            order=options.selection_order,
            seed=self.state.global_step,
            process_group=dist.group.WORLD if is_parted and not in_rows else None,
        )
        in_loss = (~prefix | selected).to(stacked["completion_mask"])
        counted = (in_loss * is_token, selected, candidates, entropy * candidates)
        sums = torch.stack([each.sum().float() for each in counted])
        num_tokens, num_selected, num_candidates, sum_entropy = self.accelerator.reduce(sums)
        # Of an optimizer step; TRL takes it to be that of a generation.
        share = self.args.steps_per_generation / self.args.gradient_accumulation_steps
        for part, mask in zip(parts, in_loss.chunk(len(parts)), strict=True):
            part["tool_mask"] = mask
            part["num_items_in_batch"] = num_tokens * share
        if num_candidates:
            metrics = self._metrics["train"]
            metrics["policy/kept_frac"].append((num_selected / num_candidates).item())
            if options.selection_fraction:
                mean = (sum_entropy / num_candidates).item()
                metrics["policy/prefix_entropy_mean"].append(mean)

    def _entropies(self, rows: dict[str, Tensor], candidates: Tensor) -> Tensor:
        """[B, C] nats, of the candidates; 0 in rows that have none. Collective."""
        entropy = torch.zeros(candidates.shape, device=candidates.device)
        index = candidates.any(dim=1).nonzero()[:, 0]
        # As many forwards in each process, should they wait for one another in them.
        num_rows = self.accelerator.gather(torch.tensor([len(index)], device=index.device)).max()
        if not num_rows:
            return entropy
        padded = torch.cat([index, index.new_zeros(num_rows - len(index))])
        width = max(1, int(candidates.any(dim=0).nonzero().amax()) + 1) if len(index) else 1
        found = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([rows["prompt_ids"], rows["completion_ids"][:, :width]], dim=1)[padded],
            torch.cat([rows["prompt_mask"], rows["completion_mask"][:, :width]], dim=1)[padded],
            width,
            batch_size=self.args.per_device_train_batch_size,
            compute_entropy=True,
        )[1]
        entropy[index, :width] = found[: len(index)].to(entropy)
        return entropy

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        if "prefix_mask" not in inputs or self.args.head == "trl":
            return super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        num_rows, num_parts = len(mask), self.current_gradient_accumulation_steps
        lengths, row_weights = mask.sum(dim=1).clamp(min=1), None
        match self.loss_type:
            case "dr_grpo":
                normalizer = num_rows * self.max_completion_length * num_parts
            case "bnpo":
                normalizer = mask.sum().float().clamp(min=1) * num_parts
            case "grpo":
                normalizer, row_weights = num_rows * num_parts, 1.0 / lengths
            case "dapo":
                num_tokens = inputs["num_items_in_batch"].clamp(min=1.0)
                share = num_parts / self.args.steps_per_generation
                normalizer = num_tokens / self.accelerator.num_processes * share
        loss, log_probs, entropy = fused_loss(
            model,
            inputs,
            accelerator=self.accelerator,
            config=self._policy_config,
            normalizer=normalizer,
            temperature=self.temperature,
            row_weights=row_weights,
        )
        figures = loss_metrics(
            log_probs,
            entropy,
            inputs,
            mask,
            accelerator=self.accelerator,
            clip=(self.epsilon_low, self.epsilon_high),
        )
        for name, value in figures.items():
            self._metrics["train"][name].append(value)
        return loss


def _check_arguments(arguments: Mapping[str, Any], config: PrefixGRPOConfig) -> None:
    """Refuse arguments of the trainer that do not go with hybrid rollouts."""
    for name, reason in _REFUSED.items():
        if arguments.get(name):
            raise ConfigError(f"{name}: expected none with num_hybrid > 0: {reason}")
    if isinstance(arguments.get("processing_class"), ProcessorMixin):
        raise ConfigError(
            "processing_class: expected a tokenizer with num_hybrid > 0: demonstrations are text"
        )
    dataset, column = arguments.get("train_dataset"), config.demonstration_column
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        expected = f"a column of train_dataset, which has {sorted(columns)}"
        require(column in columns, "demonstration_column", expected, column)
