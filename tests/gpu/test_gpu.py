"""What only a GPU can show: sizes, no waiting, capture, inductor, memory, repetition."""

import pytest
import torch
from rft_kernels import (
    linear_prefix_rft_loss,
    linear_token_loss,
    prefix_rft_loss,
    select_top_entropy,
    token_stats,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WIDE = 151936


@pytest.fixture(autouse=True)
def freed():
    yield
    torch.cuda.empty_cache()


def batch(num_rows: int, vocab_size: int, dtype=torch.bfloat16) -> dict:
    """Arguments of `prefix_rft_loss`: a third of the rows of prefixes, a quarter inactive."""
    torch.manual_seed(0)
    logits = torch.empty(num_rows, vocab_size, dtype=dtype, device="cuda").normal_(std=3)
    targets = torch.randint(vocab_size, (num_rows,), device="cuda")
    places = torch.arange(num_rows, device="cuda")
    log_probs = token_stats(logits, targets).log_probs
    return {
        "logits": logits.requires_grad_(),
        "targets": targets,
        "old_log_probs": log_probs + 0.1 * torch.randn_like(log_probs),
        "advantages": torch.where(places % 4 == 0, 0.0, 1.0 - 2.0 * (places % 2)),
        "response_mask": places % 7 != 0,
        "prefix_mask": places % 3 == 0,
        "normalizer": num_rows,
    }


def truth(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = torch.log_softmax(logits.double(), -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def assert_as_exact(found: torch.Tensor, same: torch.Tensor, exact: torch.Tensor) -> None:
    """|found - exact| <= 2 |same - exact| + two units in the last place of the largest entry."""
    atol = 2 * torch.finfo(found.dtype).eps * exact.abs().max()
    assert ((found - exact).abs() <= 2 * (same - exact).abs() + atol).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_real_vocabulary(dtype):
    logits = batch(33, WIDE, dtype)["logits"]
    targets = torch.randint(WIDE, (33,), device="cuda")
    found = token_stats(logits, targets)
    log_p = torch.log_softmax(logits.float(), -1)
    same = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    leaf = logits.detach().double().requires_grad_()
    for x, y, exact in zip(found, same, truth(leaf, targets), strict=True):
        assert_as_exact(x, y, exact)
        (dlogits,) = torch.autograd.grad(x.sum(), logits, retain_graph=True)
        (dsame,) = torch.autograd.grad(y.sum(), logits, retain_graph=True)
        (dexact,) = torch.autograd.grad(exact.sum(), leaf, retain_graph=True)
        assert_as_exact(dlogits, dsame, dexact)


@pytest.mark.parametrize("num_rows", [16_400, 65_537])
def test_more_than_2_31_logits(num_rows):
    """Offsets past 32 bits: the last rows are right, forward and backward."""
    vocab_size = 2**31 // num_rows + 500
    arguments = batch(num_rows, vocab_size)
    logits, targets = arguments["logits"], arguments["targets"]
    assert logits.numel() > 2**31
    found = token_stats(logits, targets)
    (dlogits,) = torch.autograd.grad(found.log_probs.sum() + found.entropy.sum(), logits)
    for rows in (slice(0, 4), slice(-4, None)):
        leaf = logits[rows].detach().double().requires_grad_()
        exact = truth(leaf, targets[rows])
        torch.testing.assert_close(found.log_probs[rows].double(), exact[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.entropy[rows].double(), exact[1], rtol=1e-5, atol=1e-5)
        (expected,) = torch.autograd.grad(exact[0].sum() + exact[1].sum(), leaf)
        torch.testing.assert_close(dlogits[rows].double(), expected, rtol=8e-3, atol=1e-5)


def test_more_than_65_535_rows():
    arguments = batch(70_001, 257, torch.float32)
    found = token_stats(arguments["logits"], arguments["targets"])
    exact = truth(arguments["logits"].detach(), arguments["targets"])
    torch.testing.assert_close(found.log_probs.double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy.double(), exact[1], rtol=1e-5, atol=1e-5)


def selected(arguments: dict) -> dict:
    return arguments | {"selected_mask": arguments["prefix_mask"]}


def loss_and_gradient(arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    loss = prefix_rft_loss(**arguments).loss
    return loss, torch.autograd.grad(loss, arguments["logits"])[0]


def head(arguments: dict) -> dict:
    """Arguments of `linear_prefix_rft_loss` on rows of the same masks."""
    rest = dict(arguments)
    logits = rest.pop("logits")
    hidden = torch.randn(len(logits), 64, dtype=logits.dtype, device="cuda", requires_grad=True)
    weight = torch.randn(logits.shape[1], 64, dtype=logits.dtype, device="cuda") * 0.1
    return rest | {"hidden": hidden, "lm_head_weight": weight.requires_grad_()}


def function_loss(arguments: dict) -> torch.Tensor:
    """A loss of both statistics, of the rows with an advantage."""
    return linear_token_loss(
        arguments["hidden"],
        arguments["lm_head_weight"],
        arguments["targets"],
        lambda log_probs, entropy, advantages: -advantages * log_probs * entropy.tanh(),
        tokens=(arguments["advantages"],),
        mask=arguments["response_mask"],
        normalizer=arguments["normalizer"],
        active_rows=arguments["active_rows"],
    ).loss


CALLS = {
    "selecting": loss_and_gradient,
    "selected": lambda x: loss_and_gradient(selected(x)),
    "per sequence": lambda x: loss_and_gradient(
        x | {"cu_seqlens": torch.arange(0, 513, 64, device="cuda")}
    ),
    "hidden states": lambda x: linear_prefix_rft_loss(**x).loss.backward(),
    "a function": lambda x: function_loss(x).backward(),
    "selection": lambda x: select_top_entropy(x["old_log_probs"].abs(), x["prefix_mask"]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_waits_for_the_device(call):
    arguments = batch(512, 4097)
    if call in (CALLS["hidden states"], CALLS["a function"]):
        arguments = head(arguments)
        arguments["active_rows"] = torch.arange(100, device="cuda")
    call(arguments)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(arguments)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_a_function_equals_eager():
    arguments = head(batch(300, 4097, torch.float32))
    arguments["active_rows"] = arguments["advantages"].nonzero()[:, 0]
    hidden, weight = arguments["hidden"], arguments["lm_head_weight"]
    found = function_loss(arguments)
    log_p = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    log_probs = log_p.gather(-1, arguments["targets"][:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    losses = -arguments["advantages"] * log_probs * entropy.tanh()
    expected = losses[arguments["response_mask"]].sum() / arguments["normalizer"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    for x, y in zip(
        *(torch.autograd.grad(loss, (hidden, weight)) for loss in (found, expected)), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * y.abs().max().item())


@pytest.mark.parametrize("name", ["selecting", "selected", "selection"])
def test_graph_capture(name):
    arguments = batch(512, 4097)
    call = CALLS[name]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(arguments)
    with torch.no_grad():
        arguments["logits"].mul_(0.5)
        arguments["old_log_probs"].mul_(0.9)
    graph.replay()
    torch.cuda.synchronize()
    found, expected = (
        [x] if isinstance(x, torch.Tensor) else x for x in (captured, call(arguments))
    )
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("pick", [dict, selected], ids=["selecting", "selected"])
def test_inductor_makes_one_graph(pick):
    arguments = pick(batch(64, 4097, torch.float32))
    rest = {name: x for name, x in arguments.items() if name != "logits"}

    def loss(logits):
        return prefix_rft_loss(logits * 1.5, **rest).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    logits = arguments["logits"]
    found, expected = compiled(logits), loss(logits)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, logits)[0] for x in (found, expected)), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("pick", [dict, selected], ids=["selecting", "selected"])
def test_repetition_gives_the_same_bits(pick):
    arguments = pick(batch(300, 50257))
    first = loss_and_gradient(arguments)
    for _ in range(3):
        again = loss_and_gradient(arguments)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
def test_memory_beside_logits_and_gradient(inplace):
    """O(T) bytes, and the gradient itself unless it is written over the logits."""
    arguments = selected(batch(2048, WIDE)) | {"inplace_backward": inplace}
    logits = arguments["logits"].detach().clone().requires_grad_()
    arguments["logits"] = logits
    rows_bytes = 2048 * 8 * 64

    def peak(call):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        return kept, torch.cuda.max_memory_allocated() - before

    loss, forward_bytes = peak(lambda: prefix_rft_loss(**arguments).loss)
    assert forward_bytes <= rows_bytes
    _, backward_bytes = peak(lambda: torch.autograd.grad(loss, logits))
    assert backward_bytes <= rows_bytes + (0 if inplace else logits.nbytes)
