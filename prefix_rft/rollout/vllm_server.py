"""Generation with a vLLM server (`prefix-rft serve`) that gets its weights from the trainer."""

import asyncio
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import httpx
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefix_rft.checks import ConfigError
from prefix_rft.config import VLLMConfig
from prefix_rft.data_types import Completion, RolloutRequest
from prefix_rft.model import attempt, full_weights, weight_shapes
from prefix_rft.rollout.engine import EngineError, OnDone
from prefix_rft.rollout.server_token import TOKEN_SOURCES
from prefix_rft.rollout.vllm_base import VLLMBase
from prefix_rft.rollout.vllm_options import import_vllm, request_seed, sampling_options

T = TypeVar("T")
# timeouts in seconds: of a connection, one completion, any other request
_CONNECT_S, _COMPLETION_S, _CONTROL_S = 30, 3600, 300


class VLLMServerEngine(VLLMBase):
    """A vLLM server at `vllm.server_url`, on devices of its own.

    Every process of the trainer sends its own requests. Rank 0 sends the weights to all workers of
    the server through vLLM's weight transfer: NCCL on CUDA, gloo on a CPU. Each push has a label,
    and every completion carries the label of the weights it was sampled with.

    Args:
        token: the server's; the others as in `VLLMBase`.
    Raises:
        ConfigError: also if the server was started with another configuration.
        EngineError: no server answers there, or it has another token.
    """

    is_collective = False

    def __init__(self, model: PreTrainedModel, *, token: str, **options: Any) -> None:
        self._headers = {"Authorization": f"Bearer {token}"}
        super().__init__(model, **options)

    def _start(
        self, config: VLLMConfig, device: torch.device, model_config: PreTrainedConfig
    ) -> None:
        import_vllm()
        self._url = config.server_url.rstrip("/")
        self._weights = _Weights(device, self._weight_options)
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        limit = self._ask("v1/models")["data"][0]["max_model_len"]
        if limit != self._max_length:
            raise ConfigError(
                f"vllm.server_url: expected a server for sequences of {self._max_length} tokens, "
                f"got one for {limit}: start it with prefix-rft serve and the same configuration"
            )
        # Part of every label, so that the weights of another trainer are not taken for ours.
        self._run = _from_all(uuid.uuid4().hex)[0]
        self._transfer = self._open_transfer(device)

    def _open_transfer(self, device: torch.device) -> Any:
        """vLLM's sender of weights, joined by the server's workers. Collective."""
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        if device.type == "cuda":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo as InitInfo
        else:
            from prefix_rft.rollout.vllm_gloo import GlooTrainerInitInfo as InitInfo
        host = urlsplit(self._url).hostname
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
            route.connect((host, 9))  # sends nothing, but gives our address as the server sees it
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
            info, client=_WeightRoutes(self._request), source=self._weights
        )

    @torch.no_grad()
    def update_weights(self, model: nn.Module, version: int) -> None:
        """Send the weights of `model`, one bucket at a time. Collective.

        Raises:
            EngineError: the server did not accept them.
        """
        self.weights_version = None
        self._weights.start(model)
        outcome = attempt(lambda: self._send(self._label(version)))
        self._weights.finish()
        for each in _from_all(outcome):  # no rank generates before the push is complete
            if isinstance(each, EngineError):
                raise each
        self.weights_version = version

    def _send(self, label: str) -> None:
        try:
            self._transfer.send_weights()
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: NCCL, gloo
            raise EngineError(
                f"vLLM at {self._url} did not accept the weights: {_reason(error)}"
            ) from error
        if self._rank == 0:
            if not self._ask("reset_prefix_cache", {})["success"]:
                raise EngineError(
                    f"{self._url} did not reset its prefix cache: it is serving other requests"
                )
            self._ask("update_weight_version", {"new_version": label})

    def sleep(self) -> None:
        """Nothing to free: the server has devices of its own."""

    def close(self) -> None:
        """Disconnect from the server, which then waits for the next trainer."""
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
        top_p: float = 1.0,
        on_done: OnDone | None = None,
    ) -> list[Completion]:
        """See `RolloutEngine.generate`.

        Every request has its own random stream, seeded by `seed` and its index. A log-prob that is
        not finite is returned as -9999.

        Raises:
            EngineError: the server is gone, or does not hold the weights that were sent to it.
        """
        self._check(requests, temperature, weights_version)
        bodies = [
            {
                "token_ids": list(request.prompt_ids + request.prefix_ids),
                "sampling_params": sampling_options(
                    request,
                    temperature=temperature,
                    top_p=top_p,
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
        # pool=None: a request may wait for a connection as long as the ones before it take.
        timeout = httpx.Timeout(_COMPLETION_S, connect=_CONNECT_S, pool=None)
        limits = httpx.Limits(max_connections=self._max_batch_sequences)
        async with httpx.AsyncClient(
            base_url=self._url, headers=self._headers, timeout=timeout, limits=limits
        ) as client:

            async def post(index: int, body: dict[str, Any]) -> Completion:
                try:
                    answer = await client.post("/inference/v1/generate", json=body)
                    answer.raise_for_status()
                except httpx.HTTPError as error:
                    raise EngineError(
                        f"vLLM at {self._url} did not generate: {_reason(error)}"
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
                f"stale weights: {self._url} sampled with {', '.join(sorted(labels))}, expected "
                f"{expected}: it was restarted, or another trainer sends weights to it"
            )
        if choice["finish_reason"] not in ("stop", "length"):
            raise EngineError(f"vLLM ended a completion with {choice['finish_reason']!r}")
        completion = Completion(
            token_ids=tuple(choice["token_ids"]),
            log_probs=tuple(token["logprob"] for token in choice["logprobs"]["content"]),
            finish_reason=choice["finish_reason"],
        )
        return self._cut(completion)

    def _label(self, version: int | None) -> str:
        return f"{self._run}/{version}"

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The server's answer to a GET or, with a body, to a POST."""
        try:
            return self._request(path, body).json()
        except (httpx.HTTPError, ValueError) as error:
            raise EngineError(
                f"vllm.server_url: expected a server started by prefix-rft serve at {self._url}, "
                f"got from {path}: {_reason(error)}"
            ) from error

    def _request(self, path: str, body: dict[str, Any] | None) -> httpx.Response:
        answer = httpx.request(
            "GET" if body is None else "POST",
            f"{self._url}/{path}",
            json=body,
            headers=self._headers,
            timeout=httpx.Timeout(_CONTROL_S, connect=_CONNECT_S),
        )
        return answer.raise_for_status()


class _WeightRoutes:
    """A `VLLMWeightSyncClient` of vLLM; its own sends no token."""

    def __init__(self, post: Callable[[str, dict[str, Any]], httpx.Response]) -> None:
        self._post = post

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("finish_weight_update", {"weight_version": weight_version})


class _Shape(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Weights:
    """A `WeightSource` of vLLM: announces the weights of a model, then gathers them, once a push.

    Each weight is gathered when it is requested: the sender fills its buffers on alternating CUDA
    streams, none of which waits for what was gathered on another.
    """

    def __init__(self, device: torch.device, options: dict[str, Any]) -> None:
        self._device = device
        self._options = options
        self._model: nn.Module | None = None
        self._weights: Iterator[tuple[str, torch.Tensor]] = iter(())

    def start(self, model: nn.Module) -> None:
        self._model = model
        self._weights = full_weights(model, bucket_bytes=0, **self._options)  # one by one
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the update may still be writing them

    def finish(self) -> None:
        """Gather what a failed push left over, since the other ranks do."""
        for _ in self._weights:
            pass

    def metadata(self) -> list[_Shape]:
        return [_Shape(*each) for each in weight_shapes(self._model, **self._options)]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, weight.to(self._device)) for name, weight in self._weights)


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 401:
        return f"401, expected its token in {TOKEN_SOURCES}"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _from_all(item: T) -> list[T]:
    """Every rank's `item`. Collective."""
    items = [item]
    if dist.is_initialized():
        items *= dist.get_world_size()
        dist.all_gather_object(items, item)
    return items
