"""Generation by a server of vLLM (`prefix-rft serve`), to which the trainer sends its weights."""

import asyncio
import socket
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx
import torch
import torch.distributed as dist
from requests import RequestException
from torch import nn
from transformers import PreTrainedModel

from prefix_rft.checks import ConfigError
from prefix_rft.config import VLLMConfig
from prefix_rft.data_types import Completion, RolloutRequest
from prefix_rft.model import attempt, full_weights, weight_shapes
from prefix_rft.rollout.engine import EngineError, OnDone, check_call
from prefix_rft.rollout.vllm_options import (
    import_vllm,
    request_seed,
    sampling_options,
    sequence_limit,
    stop_token_ids,
    unties_weights,
    weight_dtype,
)

T = TypeVar("T")
_MIB = 2**20
_CONNECT_S, _COMPLETION_S = 30, 3600  # longest waits, for a connection and for one completion


class VLLMServerEngine:
    """A `RolloutEngine` that asks a server of vLLM, on devices of its own.

    Every process of the trainer sends its own requests. Weights go from the first process to all
    workers of the server by vLLM's weight transfer: NCCL on CUDA, gloo on a CPU. Each push is
    labelled, and every completion says by which label it was sampled.

    Args:
        model: a causal language model of transformers, possibly sharded.
        config: the section `[vllm]`, with `server_url`.
        device: of the trainer, and of the same kind as the server's.
        max_length, eos_token_ids, vocab_size, autocast_dtype: as of `VLLMEngine`.
        max_batch_sequences: requests in flight at once, of this process.
    Raises:
        ConfigError: vLLM is not installed, or the server was started for another configuration.
        EngineError: no such server answers.
        ValueError: no end-of-sequence token below `vocab_size`.
    """

    shares_module = False
    is_collective = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        config: VLLMConfig,
        device: torch.device,
        max_length: int,
        eos_token_ids: Sequence[int],
        vocab_size: int,
        max_batch_sequences: int,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        import_vllm()
        self.weights_version: int | None = None
        self._url = config.server_url.rstrip("/")
        self._max_connections = max_batch_sequences
        self._max_length = sequence_limit(model.config, max_length)
        self._stop_token_ids = stop_token_ids(eos_token_ids, vocab_size)
        self._weights = _Weights(
            device=device,
            dtype=weight_dtype(autocast_dtype or model.dtype),
            vocab_size=vocab_size,
            unties=unties_weights(device),
        )
        self._bucket_bytes = config.weight_bucket_mib * _MIB
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        limit = self._ask("v1/models")["data"][0]["max_model_len"]
        if limit != self._max_length:
            raise ConfigError(
                f"vllm.server_url: expected a server for sequences of {self._max_length} tokens, "
                f"got one for {limit}: start it by prefix-rft serve, with the same configuration"
            )
        # What another trainer sends, or a server that starts anew, is not ours.
        self._run = _from_all(uuid.uuid4().hex)[0]
        self._transfer = self._open_transfer(device)

    def _open_transfer(self, device: torch.device) -> Any:
        """vLLM's sender of weights, joined by the server's workers. Collective."""
        from vllm.distributed.weight_transfer import (
            HTTPVLLMWeightSyncClient,
            WeightTransferTrainerFactory,
        )

        if device.type == "cuda":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo as InitInfo
        else:
            from prefix_rft.rollout.vllm_gloo import GlooTrainerInitInfo as InitInfo
        host = urlsplit(self._url).hostname
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((host, 9))  # sends nothing: it tells our address as the server sees it
            address = route.getsockname()[0]
        with socket.socket() as free:
            free.bind((address, 0))
            port = free.getsockname()[1]
        info = InitInfo(
            master_address=address,
            master_port=port,
            world_size=1 + self._ask("get_world_size")["world_size"],
            packed_buffer_size_bytes=self._bucket_bytes,
            rank=self._rank,
        )
        return WeightTransferTrainerFactory.trainer_init(
            info, client=HTTPVLLMWeightSyncClient(self._url), source=self._weights
        )

    @torch.no_grad()
    def update_weights(self, model: nn.Module, version: int) -> None:
        """Send the weights of `model`, a bucket at a time. Collective.

        Raises:
            EngineError: the server does not take them.
        """
        self.weights_version = None
        self._weights.start(model)
        outcome = attempt(lambda: self._send(self._label(version)))
        self._weights.finish()
        for each in _from_all(outcome):  # nobody generates before all is there
            if isinstance(each, EngineError):
                raise each
        self.weights_version = version

    def _send(self, label: str) -> None:
        try:
            self._transfer.send_weights()
        except (RequestException, RuntimeError) as error:  # of HTTP, of NCCL and gloo
            raise EngineError(
                f"vLLM at {self._url} did not take the weights: {_first_line(error)}"
            ) from error
        if self._rank == 0:
            if not self._ask("reset_prefix_cache", {})["success"]:
                raise EngineError(f"{self._url} kept its prefix cache: others generate there")
            self._ask("update_weight_version", {"new_version": label})

    def sleep(self) -> None:
        """The server's devices are its own."""

    def close(self) -> None:
        """Leave the server's workers; it waits for the next trainer."""
        self._transfer.shutdown()
        if self._rank == 0:
            self._ask("shutdown_weight_transfer_engine", {})

    def generate(
        self,
        requests: Sequence[RolloutRequest],
        *,
        temperature: float,
        seed: int,
        weights_version: int,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """One completion per request, in order.

        Every request has a random stream of its own, by `seed` and its index. A log-prob that is
        not finite comes as -9999.

        Raises:
            EngineError: the server is gone, or holds other weights than were sent to it.
            RuntimeError: `weights_version` is not the engine's.
            ValueError: a request without tokens, with no budget, or too long.
        """
        check_call(
            requests,
            temperature=temperature,
            asked_version=weights_version,
            version=self.weights_version,
            max_length=self._max_length,
            max_length_source="data.max_prompt_tokens + max_response_length, or the model's own",
        )
        bodies = [
            {
                "token_ids": list(request.prompt_ids + request.prefix_ids),
                "sampling_params": sampling_options(
                    request,
                    temperature=temperature,
                    seed=request_seed(seed, i),
                    stop_token_ids=self._stop_token_ids,
                ),
            }
            for i, request in enumerate(requests)
        ]
        return asyncio.run(self._post_all(bodies, on_done))

    async def _post_all(
        self, bodies: Sequence[dict[str, Any]], on_done: OnDone | None
    ) -> list[Completion]:
        # A request waits for a connection as long as those before it take.
        timeout = httpx.Timeout(_COMPLETION_S, connect=_CONNECT_S, pool=None)
        limits = httpx.Limits(max_connections=self._max_connections)
        async with httpx.AsyncClient(base_url=self._url, timeout=timeout, limits=limits) as client:

            async def post(index: int, body: dict[str, Any]) -> Completion:
                try:
                    answer = await client.post("/inference/v1/generate", json=body)
                    answer.raise_for_status()
                except httpx.HTTPError as error:
                    raise EngineError(
                        f"vLLM at {self._url} does not generate: {_first_line(error)}"
                    ) from error
                completion = self._completion(answer.json()["choices"][0])
                if on_done is not None:
                    on_done(index, completion)
                return completion

            return await asyncio.gather(*(post(i, body) for i, body in enumerate(bodies)))

    def _completion(self, choice: dict[str, Any]) -> Completion:
        labels = {span["version"] for span in choice["weight_versions"]}
        expected = self._label(self.weights_version)
        if labels != {expected}:
            raise EngineError(
                f"stale weights: {self._url} sampled by {', '.join(sorted(labels))}, expected "
                f"{expected}: it was started anew, or another trainer sends weights to it"
            )
        if choice["finish_reason"] not in ("stop", "length"):
            raise EngineError(f"vLLM ended a completion by {choice['finish_reason']!r}")
        return Completion(
            token_ids=tuple(choice["token_ids"]),
            log_probs=tuple(token["logprob"] for token in choice["logprobs"]["content"]),
            finish_reason=choice["finish_reason"],
        )

    def _label(self, version: int | None) -> str:
        return f"{self._run}/{version}"

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers to a GET, or, with a body, to a POST."""
        try:
            answer = httpx.request(
                "GET" if body is None else "POST",
                f"{self._url}/{path}",
                json=body,
                timeout=httpx.Timeout(_COMPLETION_S, connect=_CONNECT_S),
            )
            answer.raise_for_status()
            return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise EngineError(
                f"vllm.server_url: expected a server started by prefix-rft serve at {self._url}, "
                f"got from {path}: {_first_line(error)}"
            ) from error


class _Shape(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Weights:
    """A `WeightSource` of vLLM: the weights of a model, announced, then gathered, once a push.

    Each is gathered when it is asked for: the sender fills its buffers on CUDA streams that take
    turns, and none of them waits for what was gathered on another.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype,
        vocab_size: int,
        unties: bool,
    ) -> None:
        self._device = device
        self._options = {"dtype": dtype, "vocab_size": vocab_size, "unties": unties}
        self._model: nn.Module | None = None
        self._weights: Iterator[tuple[str, torch.Tensor]] = iter(())

    def start(self, model: nn.Module) -> None:
        self._model = model
        self._weights = full_weights(model, bucket_bytes=0, **self._options)  # one by one
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the update may still be writing them

    def finish(self) -> None:
        """Gather what a failed push has left: the other ranks do."""
        for _ in self._weights:
            pass

    def metadata(self) -> list[_Shape]:
        return [_Shape(*each) for each in weight_shapes(self._model, **self._options)]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, weight.to(self._device)) for name, weight in self._weights)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _from_all(item: T) -> list[T]:
    """The `item` of every rank. Collective."""
    items = [item]
    if dist.is_initialized():
        items *= dist.get_world_size()
        dist.all_gather_object(items, item)
    return items
