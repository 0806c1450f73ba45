"""Generation with the trainer's module: left padding, growing KV cache, finished rows dropped."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from prefix_rft.data_types import Completion, RolloutRequest
from prefix_rft.rollout.engine import OnDone, check_call
from prefix_rft.rollout.stop_text import StopText

_NOT_FORCED = -1  # in place of a token id
_COMPACT_BELOW = 0.75  # finished rows leave the cache when a smaller fraction is still live
_MIN_SPARE_COLUMNS = 64  # columns a cache buffer has beyond its content when it is allocated
_CHECK_EVERY = 8  # tokens between checks for finished rows, where a check waits for the device


class TransformersEngine:
    """A `RolloutEngine` that shares its module with the trainer, so weights are never copied.

    Args:
        model: a causal language model of transformers; its weights are version 0.
        eos_token_ids: each of them ends a completion.
        pad_token_id: only fed at masked positions; may be an end-of-sequence token.
        vocab_size: the largest id of the tokenizer + 1; columns past it are never sampled and take
            no part in the softmax.
        max_batch_sequences: sequences generated at once.
        stop_text: ends a completion too.
        autocast_dtype: of the forward, as in training; None: the dtype of the weights.
    Raises:
        ValueError: no end-of-sequence token, `max_batch_sequences` below 1, or `vocab_size`
            outside [1, columns of the lm_head].
    """

    shares_module = True
    is_collective = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        vocab_size: int,
        max_batch_sequences: int,
        stop_text: StopText | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        num_columns = model.get_output_embeddings().weight.shape[0]
        if not 1 <= vocab_size <= num_columns:
            raise ValueError(f"vocab_size: expected 1 to {num_columns}, got {vocab_size}")
        if not eos_token_ids:
            raise ValueError("eos_token_ids: expected at least one id, got none")
        if max_batch_sequences < 1:
            raise ValueError(f"max_batch_sequences: expected at least 1, got {max_batch_sequences}")
        self.weights_version = 0
        self._model = model
        self._eos_token_ids = tuple(eos_token_ids)
        self._pad_token_id = pad_token_id
        self._vocab_size = vocab_size
        self._max_batch_sequences = max_batch_sequences
        self._stop_text = stop_text
        self._autocast_dtype = autocast_dtype

    def update_weights(self, model: PreTrainedModel, version: int) -> None:
        """Generate with `model` from now on; nothing is copied."""
        self._model = model
        self.weights_version = version

    def sleep(self) -> None:
        """Nothing to free: the weights are the trainer's, and no cache outlives `generate`."""

    def ignore_ends(self) -> None:
        """See `RolloutEngine.ignore_ends`."""
        self._eos_token_ids, self._stop_text = (_NOT_FORCED,), None  # no token has that id

    def close(self) -> None:
        """Nothing to shut down."""

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        temperature: float,
        seed: int,
        weights_version: int,
        top_p: float = 1.0,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """See `RolloutEngine.generate`; bitwise repeatable on one machine.

        `on_done` is called for the completions of a batch when the whole batch is done.
        """
        text_config = self._model.config.get_text_config()
        check_call(
            requests,
            temperature=temperature,
            asked_version=weights_version,
            version=self.weights_version,
            max_length=getattr(text_config, "max_position_embeddings", None),
            max_length_source="the model's max_position_embeddings",
        )
        device = self._model.device
        generator = torch.Generator(device).manual_seed(seed)
        # Batches of similar prompt lengths need little padding. With the longest first, memory
        # runs out at once or never.
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].prompt_ids), i))
        completions: dict[int, Completion] = {}
        with (
            _eval_mode(self._model),
            torch.no_grad(),
            torch.autocast(
                device.type, dtype=self._autocast_dtype, enabled=self._autocast_dtype is not None
            ),
        ):
            for start in range(0, len(order), self._max_batch_sequences):
                indices = order[start : start + self._max_batch_sequences]
                batch = [requests[i] for i in indices]
                done = self._generate_batch(batch, temperature, top_p, generator)
                completions.update(zip(indices, done, strict=True))
                if on_done is not None:
                    for index, completion in zip(indices, done, strict=True):
                        on_done(index, completion)
        return [completions[i] for i in range(len(requests))]

    def _generate_batch(
        self,
        requests: Sequence[RolloutRequest],
        temperature: float,
        top_p: float,
        generator: torch.Generator,
    ) -> list[Completion]:
        model, device = self._model, self._model.device
        batch = _Batch(requests, self._pad_token_id, model)
        eos = torch.tensor(self._eos_token_ids, device=device)
        check_every = 1 if device.type == "cpu" else _CHECK_EVERY
        # [requests, steps]; a completion is a span of steps, the rest is never read.
        tokens = torch.zeros(len(requests), batch.num_steps, dtype=torch.int64, device=device)
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        log_probs = torch.zeros(tokens.shape, dtype=dtype, device=device)
        ends = torch.tensor(batch.ends, device=device)  # [requests] step after the last token
        has_stopped = torch.zeros_like(ends, dtype=torch.bool)

        for step in range(batch.num_steps):
            logits = batch.next_logits(model)[:, : self._vocab_size]
            sampled, sampled_log_probs = _sample(logits, temperature, top_p, generator)
            forced = batch.forced[:, step]
            sampled = torch.where(forced == _NOT_FORCED, sampled, forced)
            rows = batch.rows
            tokens[rows, step] = sampled
            log_probs[rows, step] = sampled_log_probs
            stops = torch.isin(sampled, eos) & (forced == _NOT_FORCED) & (ends[rows] > step)
            ends[rows] = torch.where(stops, step + 1, ends[rows])
            has_stopped[rows] |= stops
            batch.append(sampled)
            if (step + 1) % check_every == 0:
                if self._stop_text is not None:
                    ended = [
                        row
                        for row in rows.tolist()
                        if self._stop_text.is_in_last(
                            check_every, tokens[row, batch.starts[row] : step + 1].tolist()
                        )
                    ]
                    ends[ended] = ends[ended].clamp(max=step + 1)
                is_alive = ends[rows] > step + 1
                num_alive = int(is_alive.sum())
                if num_alive == 0:
                    break
                if num_alive < _COMPACT_BELOW * len(rows):
                    batch.select(is_alive.nonzero()[:, 0])
        completions = [
            Completion(
                token_ids=tuple(ids[start:end]),
                log_probs=tuple(values[start:end]),
                finish_reason="stop" if stopped else "length",
            )
            for ids, values, start, end, stopped in zip(
                tokens.tolist(),
                log_probs.tolist(),
                batch.starts,
                ends.tolist(),
                has_stopped.tolist(),
                strict=True,
            )
        ]
        if self._stop_text is None:
            return completions
        return [self._stop_text.cut(completion) for completion in completions]


class _Batch:
    """Sequences generated at once: the tokens the model reads next, and its cache.

    Contexts are prefilled up to a common width W; what is left of the longer ones is fed token by
    token while other rows already generate. W is the smallest width that needs no more steps than
    the largest budget, so a few rows with long prefixes do not pad all other rows and their cache.
    Rows that begin alike, such as those of a group, are prefilled once.
    """

    def __init__(
        self, requests: Sequence[RolloutRequest], pad_token_id: int, model: PreTrainedModel
    ) -> None:
        device = model.device
        contexts = [request.prompt_ids + request.prefix_ids for request in requests]
        budgets = [request.max_new_tokens for request in requests]
        totals = [len(c) + b for c, b in zip(contexts, budgets, strict=True)]
        shortest = min(map(len, contexts))
        self._width = max(shortest, max(totals) - max(budgets))  # columns after the next forward
        self.starts = [max(0, len(c) - self._width) for c in contexts]  # step of the first token
        self.ends = [s + b for s, b in zip(self.starts, budgets, strict=True)]
        self.num_steps = max(self.ends)
        padding = [max(0, self._width - len(c)) for c in contexts]
        starts = [
            (*[pad_token_id] * pad, *context[: self._width])
            for pad, context in zip(padding, contexts, strict=True)
        ]
        distinct = {
            key: i for i, key in enumerate(dict.fromkeys(zip(padding, starts, strict=True)))
        }
        # [B] the prefilled row of each request, until it is fed
        self._prefilled: torch.Tensor | None = torch.tensor(
            [distinct[key] for key in zip(padding, starts, strict=True)], device=device
        )
        self._input_ids = torch.tensor([start for _, start in distinct], device=device)
        self.forced = torch.tensor(  # [B, steps]
            [
                list(context[self._width :]) + [_NOT_FORCED] * (self.num_steps - start)
                for start, context in zip(self.starts, contexts, strict=True)
            ],
            device=device,
        )
        first = torch.tensor([pad for pad, _ in distinct], device=device)[:, None]
        columns = torch.arange(self._width + self.num_steps, device=device)
        self._attention_mask = columns >= first
        self._position_ids = (columns[: self._width] - first).clamp(min=0)
        self._cache = DynamicCache(config=model.config)
        self._cache.layers = [
            _GrowingLayer() if type(layer) is DynamicLayer else layer
            for layer in self._cache.layers
        ]
        self.rows = torch.arange(len(requests), device=device)  # [B] index of the request

    def next_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Feed the pending tokens; the logits after the last of them, [B, V]."""
        output = model(
            input_ids=self._input_ids,
            attention_mask=self._attention_mask[:, : self._width],
            position_ids=self._position_ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1]
        if self._prefilled is None:
            return logits
        picks, self._prefilled = self._prefilled, None
        self._cache.batch_select_indices(picks)
        self._attention_mask = self._attention_mask[picks]
        self._position_ids = self._position_ids[picks]
        return logits[picks]

    def append(self, tokens: torch.Tensor) -> None:
        """Make `tokens` [B] the pending ones."""
        self._input_ids = tokens[:, None]
        self._position_ids = self._position_ids[:, -1:] + 1
        self._width += 1

    def select(self, keep: torch.Tensor) -> None:
        """Continue with the rows `keep` [B'], ascending."""
        self._input_ids, self._position_ids = self._input_ids[keep], self._position_ids[keep]
        self._attention_mask, self.forced = self._attention_mask[keep], self.forced[keep]
        self.rows = self.rows[keep]
        self._cache.batch_select_indices(keep)


class _GrowingLayer(DynamicLayer):
    """Keys and values in buffers with spare room: appending a token does not copy the others."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = (key_states[:, :, :0], value_states[:, :, :0])
        if end > self._buffers[0].shape[-2]:
            self._buffers = (self._grown(0, end), self._grown(1, end))
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _grown(self, index: int, length: int) -> torch.Tensor:
        # Autocast leaves rotated keys in float32, and attention rounds them to the dtype of the
        # values: stored in that dtype they take half the memory and give the same result.
        old, dtype = self._buffers[index], self._buffers[1].dtype
        capacity = length + max(_MIN_SPARE_COLUMNS, length // 2)
        new = old.new_empty((*old.shape[:2], capacity, old.shape[3]), dtype=dtype)
        new[:, :, : old.shape[2]] = old
        return new

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """The rows `indices`: all, some of them repeated, or fewer, ascending."""
        length = self.get_seq_length()
        if len(indices) >= len(self._buffers[0]):
            self._buffers = tuple(buffer[indices] for buffer in self._buffers)
            self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)
            return
        for buffer in self._buffers:
            buffer[: len(indices), :, :length] = buffer[indices, :, :length]
        self._buffers = tuple(buffer[: len(indices)] for buffer in self._buffers)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _sample(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [B] drawn from softmax(logits [B, V] / temperature), and their log-probs [B]."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
    if top_p < 1:
        log_probs = _nucleus(log_probs, top_p)
    scores = log_probs
    if temperature > 0:
        # The argmax of log-prob + Gumbel noise is a draw, repeatable where a cumsum is not.
        noise = torch.empty_like(log_probs).exponential_(generator=generator)
        scores = log_probs - noise.log_()
    tokens = scores.argmax(dim=-1)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


def _nucleus(log_probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """The log-probs [B, V] of the likeliest tokens that reach `top_p` together; -inf elsewhere."""
    ordered, order = log_probs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # of the likelier ones: 0 for the first
    ordered = ordered.masked_fill(before >= top_p, -torch.inf)
    return torch.empty_like(log_probs).scatter_(-1, order, ordered).log_softmax(-1)


@contextmanager
def _eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """No dropout, and no gradient checkpointing (it disables the cache); the mode is restored."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
