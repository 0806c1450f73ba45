"""The small base of a run without `model.path`: a tokenizer and a Qwen2 trained from scratch."""

import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from prefix_rft.checks import ConfigError
from prefix_rft.config import BaseConfig, Config, model_at
from prefix_rft.data.columns import find_map
from prefix_rft.data.generated import GENERATED, generated_lessons, vocabulary_texts
from prefix_rft.data.problems import load_problems
from prefix_rft.data.sources import load_rows

PAD, EOS = "<|pad|>", "<|end|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_RECIPE = 1  # part of every fingerprint: raise it when the training below changes
_BUCKET_BATCHES = 16  # texts are sorted by length within this many batches
_WARMUP_FRACTION, _FINAL_LR_FRACTION = 0.05, 0.02
_PROGRESS_S = 15.0

Corpus = Sequence[tuple[str, str]]  # rendered prompt, completion


class _Text(NamedTuple):
    ids: list[int]  # prompt, completion, end
    num_prompt: int


def resolve_base(config: Config) -> Path | str:
    """The model a run starts from: `model.path`, or a base trained on the run's own data.

    The base learns from the lessons of a generated dataset or from the demonstrations of
    `data.path`; held-out problems are not among its training texts.

    Raises:
        UserError: the rows cannot be loaded, or none can be trained on.
    """
    if config.model.path is not None:
        return model_at(config.model.path)
    base, data = config.base, config.data
    if data.path in GENERATED:
        lessons = generated_lessons(config)
        texts = [text for pair in lessons for text in pair] + vocabulary_texts(config)
        tokenizer = train_tokenizer(texts, base.vocab_size)
        load_problems(config, tokenizer, trains=False)  # refuses now what a run would refuse later
        corpus = [(render_prompt(tokenizer, prompt), completion) for prompt, completion in lessons]
    else:
        tokenizer = train_tokenizer(_row_texts(config), base.vocab_size)
        # All demonstrations, so that runs which keep fewer of them share one base.
        whole = dataclasses.replace(
            config, data=dataclasses.replace(data, demonstration_fraction=1.0)
        )
        problems = load_problems(whole, tokenizer).train
        corpus = [(p.prompt, p.demonstration) for p in problems if p.demonstration is not None]
    return build_base(base, tokenizer, corpus, config.data_seed)


def untrained_base(config: BaseConfig, folder: Path) -> Path:
    """A model and tokenizer of the sizes of a base, with random weights, in `folder`."""
    tokenizer = train_tokenizer([], config.vocab_size)
    model = _make_model(config, tokenizer, seed=0, vocab_size=config.vocab_size)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _row_texts(config: Config) -> list[str]:
    rows = load_rows(config.data.path, config.data.split)
    layout = find_map(
        rows,
        config.data.columns,
        key="data.columns",
        source=f"data.path: {config.data.path}",
    )
    texts = []
    for row in rows:
        prompt, _, demonstration = layout.read(row)
        texts += [text for text in (prompt, demonstration) if isinstance(text, str)]
    return texts


def render_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """A chat with one user message, up to where the answer begins."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens.

    Every text in Unicode form NFC round-trips, and every digit is a token.
    """
    bpe = Tokenizer(models.BPE())
    # AutoTokenizer splits texts this way for any Qwen2 folder, whatever its tokenizer.json says.
    family = Qwen2Tokenizer().backend_tokenizer
    bpe.normalizer, bpe.pre_tokenizer = family.normalizer, family.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, *_ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_base(
    config: BaseConfig, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, seed: int
) -> Path:
    """Train a Qwen2 on the completions of `corpus`, or find the one trained on the same inputs.

    Minimises the negative log-likelihood of completion and end token, averaged over the tokens of a
    batch, with AdamW and a cosine schedule. On one machine the same inputs give the same weights.

    Args:
        corpus: (rendered prompt, completion); texts longer than `base.max_length` tokens are left
            out.

    Returns:
        a folder in Hugging Face format inside `base.cache_dir`; it only appears once complete.

    Raises:
        ConfigError: no text is short enough.
    """
    folder = Path(config.cache_dir) / _fingerprint(config, tokenizer, corpus, seed)
    if not folder.is_dir():
        texts = _encode(tokenizer, corpus, config.max_length)
        model = _make_model(config, tokenizer, seed)
        _train(model, texts, config, tokenizer.pad_token_id, seed)
        _save(model, tokenizer, folder)
    return folder


def _fingerprint(
    config: BaseConfig, tokenizer: PreTrainedTokenizerFast, corpus: Corpus, seed: int
) -> str:
    fields = dataclasses.asdict(config)
    del fields["cache_dir"]
    vocabulary = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    made_by = json.dumps([_RECIPE, fields, vocabulary, list(corpus), seed])
    return hashlib.sha256(made_by.encode()).hexdigest()[:16]


def _encode(tokenizer: PreTrainedTokenizerFast, corpus: Corpus, max_length: int) -> list[_Text]:
    def ids_of(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    prompts = ids_of([prompt for prompt, _ in corpus])
    completions = ids_of([completion for _, completion in corpus])
    texts = [
        _Text(prompt + completion + [tokenizer.eos_token_id], len(prompt))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    kept = [text for text in texts if len(text.ids) <= max_length]
    if not kept:
        raise ConfigError(
            f"base.max_length: expected room for some of the {len(texts)} training texts, "
            f"got {max_length} tokens"
        )
    return kept


def _make_model(
    config: BaseConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    vocab_size: int | None = None,
) -> Qwen2ForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=vocab_size or len(tokenizer),
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_heads,
                intermediate_size=config.intermediate_size,
                max_position_embeddings=config.max_position_embeddings,
                # The usual 0.02 suits wide models; at this width it learns to copy late.
                initializer_range=config.hidden_size**-0.5,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def _train(
    model: Qwen2ForCausalLM, texts: Sequence[_Text], config: BaseConfig, pad_id: int, seed: int
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    print(
        f"building the base model: {num_parameters / 1e6:.2f} M parameters, {len(texts)} texts, "
        f"{config.num_batches} batches",
        flush=True,
    )
    model.train()
    start = reported = time.perf_counter()
    losses: list[float] = []
    for step, batch in enumerate(_batches(texts, config, random.Random(seed))):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _lr_fraction(step, config.num_batches)
        loss = _mean_nll(model, batch, pad_id)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        now = time.perf_counter()
        if now - reported >= _PROGRESS_S or step + 1 == config.num_batches:
            print(
                f"base model: batch {step + 1}/{config.num_batches}, "
                f"loss {sum(losses) / len(losses):.3f}, {now - start:.0f} s",
                flush=True,
            )
            reported, losses = now, []
    model.eval()


def _batches(
    texts: Sequence[_Text], config: BaseConfig, rng: random.Random
) -> Iterator[list[_Text]]:
    """`num_batches` batches of texts of similar length, in random order."""
    bucket_size = _BUCKET_BATCHES * config.batch_size
    pool: list[_Text] = []
    batches: list[list[_Text]] = []
    for _ in range(config.num_batches):
        if not batches:
            while len(pool) < bucket_size:
                pool += rng.sample(texts, len(texts))
            bucket, pool = sorted(pool[:bucket_size], key=lambda t: len(t.ids)), pool[bucket_size:]
            batches = [
                bucket[i : i + config.batch_size] for i in range(0, bucket_size, config.batch_size)
            ]
            rng.shuffle(batches)
        yield batches.pop()


def _mean_nll(model: Qwen2ForCausalLM, batch: Sequence[_Text], pad_id: int) -> torch.Tensor:
    """Mean over completion tokens. Padding is on the right, so causal attention needs no mask."""
    shape = (len(batch), max(len(text.ids) for text in batch))
    input_ids = torch.full(shape, pad_id)
    is_target = torch.zeros(shape, dtype=torch.bool)
    for row, (ids, num_prompt) in enumerate(batch):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        is_target[row, num_prompt : len(ids)] = True
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[:, :-1][is_target[:, 1:]])
    return F.cross_entropy(logits, input_ids[:, 1:][is_target[:, 1:]])


def _lr_fraction(step: int, num_steps: int) -> float:
    warmup = max(1, round(_WARMUP_FRACTION * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return _FINAL_LR_FRACTION + (1 - _FINAL_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * done))


def _save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write next to `folder`, then rename, so that `folder` is always complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    partial = beside / folder.name
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, folder)
    except OSError:
        if not folder.is_dir():  # otherwise a concurrent build finished first: the same weights
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
