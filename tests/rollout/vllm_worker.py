"""What tests/rollout/test_vllm.py runs in processes that may import vllm.

    vllm_worker.py SCENARIO OUT.json [CONFIG.toml]

Each scenario measures; the assertions are the test's.
"""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from unittest.mock import patch

import psutil
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from prefix_rft.checks import UserError
from prefix_rft.config import load_config
from prefix_rft.config.sections import ShardingConfig, VLLMConfig
from prefix_rft.data.base_model import resolve_base
from prefix_rft.data_types import Completion, RolloutRequest
from prefix_rft.model import weights
from prefix_rft.model.distributed import World
from prefix_rft.model.loading import load_policy, load_tokenizer
from prefix_rft.model.policy import Policy
from prefix_rft.rollout.make_engine import make_engine as make_rollout_engine
from prefix_rft.rollout.server_token import TOKEN_VARIABLE, read_token
from prefix_rft.rollout.stop_text import StopText
from prefix_rft.rollout.transformers_engine import TransformersEngine
from prefix_rft.rollout.vllm_engine import VLLMEngine
from prefix_rft.train.run import train
from tests.rollout.rollout_cases import VOCAB, generate, log_prob_gap, make_requests

CPU = torch.device("cpu")
NUM_COLUMNS = 112
LENGTH = 320  # tokens of a sequence
SHARED_PROMPT = tuple(3 + i % 90 for i in range(280))  # just over two blocks of the prefix cache
OTHER_TOKEN = "x" * 43
KNOWN = ("/health", "/metrics", "/docs", "/openapi.json", "/v1/models", "/get_world_size")
STOP_IDS = (7, 20, 45)  # what they decode to ends a completion as a text
EOS = tuple(range(0, VOCAB, 12))  # one token in twelve, so that completions end at different times


class Letters:
    """Stands for a tokenizer: each id is a letter."""

    def decode(self, token_ids: Sequence[int], **options: object) -> str:
        return "".join(chr(0x4E00 + token) for token in token_ids)


STOP_TEXT = StopText(Letters(), [Letters().decode([token]) for token in STOP_IDS])


def make_model(*, tied: bool) -> Qwen2ForCausalLM:
    """Large random weights; the padded columns of the lm_head would nearly always win."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=NUM_COLUMNS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,  # vLLM on a CPU needs heads of 32
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
        eos_token_id=5,  # not in EOS, which the engine must use instead
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 20
    return model


def make_engine(model, **config: object) -> VLLMEngine:
    return VLLMEngine(
        model,
        config=VLLMConfig(enforce_eager=True, kv_cache_mib=64, **config),
        device=CPU,
        max_length=LENGTH,
        eos_token_ids=EOS,
        stop_text=STOP_TEXT,
        vocab_size=VOCAB,
        max_batch_sequences=32,
    )


def transformers_engine(model, vocab_size: int) -> TransformersEngine:
    return TransformersEngine(
        model,
        eos_token_ids=EOS,
        stop_text=STOP_TEXT,
        pad_token_id=0,
        vocab_size=vocab_size,
        max_batch_sequences=64,
    )


def refused(function, *arguments, **options) -> str:
    """The message of the error that the call raises."""
    try:
        function(*arguments, **options)
    except (RuntimeError, ValueError, UserError) as error:
        return str(error)
    return "not refused"


def step(policy: Policy) -> None:
    """One update that moves every weight."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.02)
    ids = torch.arange(3, 60)[None]
    policy.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def engine(found: dict) -> None:
    """One process: log-probs, versions, stopping, seeds, refusals."""
    model = make_model(tied=True)
    policy = Policy(model, temperature=0.7, vocab_size=VOCAB)
    vllm, requests = make_engine(model), make_requests(32)
    found["before_push"] = refused(generate, vllm, requests)

    vllm.update_weights(model, 0)
    told = found["told"] = []
    sampled = vllm.generate(
        requests,
        temperature=0.7,
        seed=0,
        weights_version=0,
        on_done=lambda index, completion: told.append((index, completion.token_ids)),
    )
    found["gap"] = log_prob_gap(policy, requests, sampled)
    found["completions"] = [(c.token_ids, c.log_probs, c.finish_reason) for c in sampled]
    found["repeated"] = generate(vllm, requests, temperature=0.7) == sampled
    alone = [generate(vllm, requests[:n], temperature=0.7)[-1].token_ids for n in (1, 6, 17)]
    found["alone"] = alone == [sampled[n - 1].token_ids for n in (1, 6, 17)]
    found["other_seed"] = generate(vllm, requests, temperature=0.7, seed=1) == sampled
    draws = [RolloutRequest(prompt_ids=(5, 6, 7), max_new_tokens=1)] * 1500
    found["draws"] = [c.token_ids[0] for c in generate(vllm, draws)]
    logits = model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits
    found["draw_probs"] = logits[0, -1, :VOCAB].softmax(-1).tolist()
    unmasked = generate(transformers_engine(model, NUM_COLUMNS), requests)
    found["unmasked_id_max"] = max(max(c.token_ids) for c in unmasked)

    greedy = generate(vllm, requests, temperature=0.0)
    expected = generate(transformers_engine(model, VOCAB), requests, temperature=0.0)
    found["greedy"] = [[list(c.token_ids), c.finish_reason] for c in greedy]
    found["greedy_expected"] = [[list(c.token_ids), c.finish_reason] for c in expected]
    at_one = Policy(model, temperature=1.0, vocab_size=VOCAB)
    found["greedy_gap"] = log_prob_gap(at_one, requests, greedy)

    cached = [RolloutRequest(prompt_ids=SHARED_PROMPT, max_new_tokens=8)] * 3
    requests += cached
    found["gap_cached"] = log_prob_gap(policy, requests, generate(vllm, requests, temperature=0.7))
    step(policy)
    found["stale"] = refused(generate, vllm, requests, weights_version=1)
    vllm.weights_version = 1
    faked = generate(vllm, requests, temperature=0.7, weights_version=1)
    found["gap_faked"] = log_prob_gap(policy, requests, faked)
    vllm.update_weights(model, 1)
    followed = generate(vllm, requests, temperature=0.7, weights_version=1)
    found["gap_followed"] = log_prob_gap(policy, requests, followed)

    too_long = RolloutRequest(prompt_ids=SHARED_PROMPT, prefix_ids=(9,) * 30, max_new_tokens=11)
    found["too_long"] = refused(generate, vllm, [requests[0], too_long], weights_version=1)
    longest = replace(too_long, max_new_tokens=10)
    found["longest"] = refused(generate, vllm, [longest], weights_version=1)
    found["no_requests"] = generate(vllm, [], weights_version=1)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    vllm.update_weights(model, 2)
    found["not_finite"] = generate(vllm, requests[:3], weights_version=2)[0].log_probs
    interrupt(vllm, requests)
    found["interrupted"] = refused(generate, vllm, requests, weights_version=2)
    vllm.close()

    model = make_model(tied=False)
    again = make_engine(model)
    again.update_weights(model, 0)
    untied = generate(again, requests, temperature=0.7)
    found["gap_untied"] = log_prob_gap(
        Policy(model, temperature=0.7, vocab_size=VOCAB), requests, untied
    )
    again.ignore_ends()
    endless = generate(again, requests, temperature=0.7)
    found["ended_early"] = sum(c.finish_reason == "stop" for c in untied)
    found["endless"] = [len(completion.token_ids) for completion in endless]
    found["budgets"] = [request.max_new_tokens for request in requests]
    again.close()


def interrupt(vllm: VLLMEngine, requests: list[RolloutRequest]) -> None:
    """A signal in the middle of `generate`."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    inner = vllm._llm.llm_engine
    step, inner.step = inner.step, interrupted
    with suppress(KeyboardInterrupt):
        generate(vllm, requests, weights_version=2)
    inner.step = step


def ranks(found: dict) -> None:
    """On every rank: push a sharded model, and generate requests that differ by rank."""
    with World(ShardingConfig(), CPU) as world:
        world.broadcast(forget_killed_runs)
        whole = make_model(tied=True)
        policy = Policy(make_model(tied=True), temperature=0.7, vocab_size=VOCAB)
        policy.shard(world.mesh, cpu_offload=False)
        size = int(os.environ["TENSOR_PARALLEL_SIZE"])
        vllm = make_engine(policy.model, tensor_parallel_size=size, weight_bucket_mib=1)
        vllm.update_weights(policy.model, 0)
        requests = make_requests(6 + 4 * world.rank, seed=world.rank)
        completions = generate(vllm, requests, temperature=0.7, seed=world.rank)
        plain = Policy(whole, temperature=0.7, vocab_size=VOCAB)
        gap = log_prob_gap(plain, requests, completions)
        idle = generate(vllm, requests[: world.rank], temperature=0.7, seed=world.rank)
        kept = [c.token_ids for c in idle] == [c.token_ids for c in completions[: world.rank]]
        found["gap"], found["kept"] = zip(*world.all_gather_object((gap, kept)), strict=True)
        found["num"] = world.all_gather_object(len(completions))
        vllm.close()


def server(found: dict, file: Path) -> None:
    """One trainer of a server, then another: log-probs, versions, budgets, seeds, refusals."""
    config = load_config(file)
    base = resolve_base(config)
    tokenizer = load_tokenizer(base)
    policy = load_policy(config, base, vocab_size=len(tokenizer), world=World())
    ours, requests = make_rollout_engine(config, policy, tokenizer), make_requests(32)
    found["before_push"] = refused(generate, ours, requests)
    sockets = psutil.Process().net_connections("tcp")
    found["listens"] = [each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN]
    found["in_advance"] = gathered_in_advance(ours._weights, policy)

    ours.update_weights(policy.model, 0)
    told = []
    sampled = ours.generate(
        requests,
        temperature=1.0,
        seed=0,
        weights_version=0,
        on_done=lambda index, completion: told.append((index, completion)),
    )
    found["told"] = sorted(told) == list(enumerate(sampled))
    found["gap"] = log_prob_gap(policy, requests, sampled)
    found["completions"] = [(c.token_ids, c.log_probs, c.finish_reason) for c in sampled]
    found["repeated"] = generate(ours, requests) == sampled
    found["other_seed"] = generate(ours, requests, seed=1) == sampled
    greedy = generate(ours, requests, temperature=0.0)
    plain = make_rollout_engine(
        replace(config, rollout=replace(config.rollout, engine="transformers")), policy, tokenizer
    )
    plain.update_weights(policy.model, 0)
    found["greedy"] = greedy_ids(greedy) == greedy_ids(generate(plain, requests, temperature=0.0))

    step(policy)
    found["stale"] = refused(generate, ours, requests, weights_version=1)
    ours.weights_version = 1
    found["faked"] = refused(generate, ours, requests, weights_version=1)
    ours.update_weights(policy.model, 1)
    followed = generate(ours, requests, weights_version=1)
    found["gap_followed"] = log_prob_gap(policy, requests, followed)

    # As after a kill: the first trainer has not disconnected.
    theirs = make_rollout_engine(config, policy, tokenizer)
    theirs.update_weights(policy.model, 1)
    found["others"] = refused(generate, ours, requests, weights_version=1)
    found["gap_theirs"] = log_prob_gap(
        policy, requests, generate(theirs, requests, weights_version=1)
    )
    shorter = replace(config, rollout=replace(config.rollout, max_response_length=39))
    found["other_limit"] = refused(make_rollout_engine, shorter, policy, tokenizer)
    with patch.dict(os.environ, {TOKEN_VARIABLE: OTHER_TOKEN}):
        found["other_token"] = refused(make_rollout_engine, config, policy, tokenizer)
    headers, theirs._headers = theirs._headers, {}
    found["no_token"] = refused(generate, theirs, requests, weights_version=1)
    found["no_token_at_push"] = refused(theirs.update_weights, policy.model, 2)
    theirs._headers, theirs.weights_version = headers, 1
    theirs.close()
    theirs._url = "http://127.0.0.1:9"  # nothing listens there
    found["gone"] = refused(generate, theirs, requests, weights_version=1)
    found["gone_at_push"] = refused(theirs.update_weights, policy.model, 2)


def routes(found: dict, file: Path) -> None:
    """What the server answers on each route that vLLM has, to requests without its token."""
    import httpx
    from starlette.routing import WebSocketRoute
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    config = load_config(file)
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out"])
    app = build_app(arguments, ("generate", "realtime"), None)
    found["paths"] = paths = sorted({route.path for route in app.routes} | {"/no/such/route"})
    sockets = [route.path for route in app.routes if isinstance(route, WebSocketRoute)]
    found["sockets"], found["statuses"] = sockets, []
    methods = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
    token, address = read_token(config), config.vllm.server_url.replace("http", "ws")
    strangers = (None, f"Bearer {OTHER_TOKEN}", f"Bearer {token[:-1]}", f"Basic {token}", token)
    with httpx.Client(base_url=config.vllm.server_url, timeout=60) as client:
        for given in strangers:
            headers = {} if given is None else {"Authorization": given}
            for path, method in product(paths, methods):
                answer = client.request(method, path, headers=headers)
                found["statuses"].append((method, path, answer.status_code, answer.text))
            for path in sockets:
                try:
                    connect(f"{address}{path}", additional_headers=headers)
                    found["statuses"].append(("websocket", path, 101, ""))
                except InvalidStatus as error:
                    found["statuses"].append(("websocket", path, error.response.status_code, ""))
        known = {"Authorization": f"bearer {token}"}
        found["known"] = [client.get(path, headers=known).status_code for path in KNOWN]


def gathered_in_advance(source, policy: Policy) -> int:
    """The most weights of a push that are gathered before they are requested."""
    source.start(policy.model)
    with patch.object(weights, "full_tensor", wraps=weights.full_tensor) as gather:
        return max(gather.call_count - number for number, _ in enumerate(source, 1))


def greedy_ids(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


def real(found: dict, folder: Path) -> None:
    """Log-probs of both engines and the trainer for a few tokens of the model in a folder."""
    config = load_config("smollm2-gsm8k")
    config = replace(
        config,
        model=replace(config.model, path=str(folder), device="cpu"),
        rollout=replace(config.rollout, engine="vllm"),
        vllm=VLLMConfig(enforce_eager=True, kv_cache_mib=128),
    )
    tokenizer = load_tokenizer(folder, None)
    policy = load_policy(config, folder, vocab_size=len(tokenizer), world=World())
    vllm = make_rollout_engine(config, policy, tokenizer)
    alike = replace(config, rollout=replace(config.rollout, engine="transformers"))
    transformers = make_rollout_engine(alike, policy, tokenizer)
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    requests = [RolloutRequest(prompt_ids=tuple(prompt), max_new_tokens=n) for n in (4, 8, 8)]
    for name, engine in (("vllm", vllm), ("transformers", transformers)):
        engine.update_weights(policy.model, 0)
        sampled = generate(engine, requests, temperature=config.rollout.temperature)
        found[f"{name}_gap"] = log_prob_gap(policy, requests, sampled)
        found[f"{name}_greedy"] = greedy_ids(generate(engine, requests, temperature=0.0))


def forget_killed_runs() -> None:
    """Remove the shared memory of vLLM's tensor-parallel ranks that killed runs left behind.

    Without CUDA its name would stay taken. Processes that have it open keep it.
    """
    for file in Path("/dev/shm").glob("*-cpushm_*"):
        file.unlink()


def run(found: dict, file: Path) -> None:
    """A run of a configuration: its summary and its records of training."""
    config = load_config(file)
    found["summary"] = train(config)
    records = map(json.loads, (config.run_dir / "metrics.jsonl").read_text().splitlines())
    found["records"] = [record for record in records if record["kind"] == "train"]


def many_digits(completions: list[str], **columns: object) -> list[float]:
    """A reward that a barely trained base can raise within a few steps."""
    return [float(4 * sum(map(str.isdigit, text)) > len(text)) for text in completions]


if __name__ == "__main__":
    scenario, out, *rest = sys.argv[1:]
    found: dict = {}
    scenarios = (engine, ranks, server, routes, real, run)
    {each.__name__: each for each in scenarios}[scenario](found, *map(Path, rest))
    if int(os.environ.get("RANK", 0)) == 0:
        Path(out).write_text(json.dumps(found))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        os._exit(0)  # interpreter shutdown can abort on a thread of the process group
