"""The trial of one launch against the specification: compiled on a GPU, interpreted without one."""

import pytest
import torch
from rft_kernels import PolicyConfig, reference
from rft_kernels.results import PolicyLoss

from tests.kernels.kernel_cases import CASES, assert_as_exact, logits_case, seeded
from tests.kernels.launches import compiled
from tests.kernels.test_objective import TERMS

pytest.importorskip("triton", reason="triton is not installed")
from rft_kernels.objective.policy_config import SUMS  # noqa: E402

from bench.one_launch import Launch, one_launch_fwd, one_launch_loss  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [  # numpy's, in the interpreter
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = Launch(num_programs=3, lanes=16, depth=2, num_warps=1, num_stages=2, l2_bytes=3 * 4 * 40)
TILE = SMALL.lanes * SMALL.depth


def batch(logits: torch.Tensor) -> dict:
    """Arguments of `one_launch_loss`, mildly off-policy, every branch of the loss hit."""
    rand = seeded(0)
    num_rows, vocab_size = logits.shape

    def normal() -> torch.Tensor:
        return torch.randn(num_rows, generator=rand)

    targets = torch.randint(vocab_size // 2, vocab_size, (num_rows,), generator=rand)
    log_probs = reference.token_stats(logits.double().cpu(), targets).log_probs.float()
    arguments = {
        "targets": targets,
        "old_log_probs": log_probs + 0.4 * normal(),
        "advantages": normal(),
        "loss_mask": torch.rand(num_rows, generator=rand) > 0.2,
        "prefix_mask": torch.rand(num_rows, generator=rand) > 0.6,
        "rollout_log_probs": log_probs + 0.4 * normal(),
        "ref_log_probs": log_probs + 0.4 * normal(),
    }
    arguments["rollout_log_probs"][::5] = torch.nan
    arguments["advantages"][1::4] = 0
    if num_rows > 7:
        arguments["targets"][7], arguments["loss_mask"][7] = -100, False
    return {name: x.to(DEVICE) for name, x in arguments.items()}


def found(logits: torch.Tensor, arguments: dict, config: PolicyConfig, **options):
    return one_launch_loss(logits, **arguments, config=config, **{"launch": SMALL, **options})


def specified(logits: torch.Tensor, arguments: dict, config: PolicyConfig) -> PolicyLoss:
    """The same from `reference`, in the dtype of the logits."""
    rest = dict(arguments)
    rest["response_mask"] = rest.pop("loss_mask")
    rest["selected_mask"] = rest["prefix_mask"]
    return reference.prefix_rft_loss(logits, **rest, normalizer=1, config=config)


def gradient(logits: torch.Tensor, arguments: dict, config: PolicyConfig) -> torch.Tensor:
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(specified(leaf, arguments, config).loss, leaf)[0]


def row_losses(logits: torch.Tensor, arguments: dict, config: PolicyConfig) -> torch.Tensor:
    """[T] float64; their sum is the loss, and may be far smaller than they are."""
    rows = [slice(i, i + 1) for i in range(len(logits))]
    parts = [{name: x if x is None else x[row] for name, x in arguments.items()} for row in rows]
    losses = [
        specified(logits[row], part, config).loss for row, part in zip(rows, parts, strict=True)
    ]
    return torch.stack(losses).double()


def compare(logits: torch.Tensor, arguments: dict, config: PolicyConfig, **options) -> None:
    loss, dlogits = found(logits, arguments, config, **options)
    truth = gradient(logits.double(), arguments, config)
    assert_as_exact(dlogits, gradient(logits, arguments, config), truth)
    assert torch.equal((dlogits == 0).all(-1), (truth == 0).all(-1))
    # The rule of `assert_as_exact` for each row, added up.
    same, exact = (row_losses(x, arguments, config) for x in (logits, logits.double()))
    unit = 2 * torch.finfo(loss.dtype).eps
    allowed = (2 * (same - exact).abs() + unit * exact.abs()).sum()
    assert (loss.double() - exact.sum()).abs() <= allowed


@pytest.mark.parametrize("on_policy", [False, True], ids=["old", "on-policy"])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_every_term(terms, on_policy):
    logits = logits_case("normal", 21).float().to(DEVICE)
    arguments = batch(logits)
    if on_policy:
        arguments["old_log_probs"] = None
    compare(logits, arguments, PolicyConfig(**terms))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_row(case, dtype):
    logits = logits_case(case).to(dtype).to(DEVICE)
    compare(logits, batch(logits), PolicyConfig(**TERMS["all"]))


@pytest.mark.parametrize("num_programs", [2, 13])
@pytest.mark.parametrize("num_classes", [1, 2, TILE - 1, TILE, TILE + 1, 2 * TILE, 5 * TILE - 1])
def test_shapes(num_classes, num_programs):
    logits = logits_case("normal", 5, num_classes).float().to(DEVICE)
    launch = SMALL._replace(num_programs=num_programs)
    compare(logits, batch(logits), PolicyConfig(entropy_coef=0.1), launch=launch)


@pytest.mark.parametrize("kept", [0, 1, TILE, 2 * TILE + 3, torch.inf])
def test_what_stays_in_cache_changes_nothing(kept):
    logits = logits_case("normal", 13, 3 * TILE + 5).float().to(DEVICE)
    arguments, config = batch(logits), PolicyConfig()
    expected = found(logits, arguments, config)
    launch = SMALL._replace(l2_bytes=kept * 4 * SMALL.num_programs)
    for x, y in zip(found(logits, arguments, config, launch=launch), expected, strict=True):
        assert torch.equal(x, y)


def test_rows_outside_the_loss():
    """Exactly zero, whatever stands in them, and what stands in them has no part in anything."""
    logits = logits_case("normal", 21).float().to(DEVICE)
    arguments, config = batch(logits), PolicyConfig(entropy_coef=0.1)
    outside = ~arguments["loss_mask"]
    loss, dlogits = found(logits, arguments, config)
    assert (dlogits[outside] == 0).all() and (dlogits[~outside] != 0).any(-1).all()
    logits[outside] = torch.nan
    arguments["advantages"][outside] = torch.nan
    again = found(logits, arguments, config)
    assert torch.equal(again[0], loss) and torch.equal(again[1], dlogits)


def test_metrics_and_statistics():
    logits = logits_case("normal", 21).float().to(DEVICE)
    arguments, config = batch(logits), PolicyConfig(**TERMS["all"])
    out = specified(logits.double(), arguments, config)
    sums, _, log_probs, entropy = one_launch_fwd(logits, **arguments, config=config, launch=SMALL)
    for name, value in zip(SUMS[1:], sums[1:].tolist(), strict=True):
        expected = out.metrics[name].item()
        if name == "num_prefix":
            expected = (arguments["prefix_mask"] & (arguments["targets"] >= 0)).sum().item()
        assert value == pytest.approx(expected, rel=2e-6), name
    torch.testing.assert_close(log_probs.double(), out.log_probs, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), out.entropy, rtol=2e-6, atol=1e-6)


def test_repetition_gives_the_same_bits_whoever_the_neighbours():
    logits = logits_case("normal", 21).bfloat16().to(DEVICE)
    arguments, config = batch(logits), PolicyConfig(**TERMS["all"])
    loss, dlogits = found(logits, arguments, config)
    again = found(logits, arguments, config)
    assert torch.equal(again[0], loss) and torch.equal(again[1], dlogits)
    few = {name: x[5:11] for name, x in arguments.items()}
    assert torch.equal(found(logits[5:11], few, config)[1], dlogits[5:11])


def test_strided_rows_and_no_rows():
    logits = logits_case("normal", 13).float().to(DEVICE)
    arguments, config = batch(logits), PolicyConfig()
    expected = found(logits, arguments, config)
    for x, y in zip(found(logits.repeat(1, 2)[:, :67], arguments, config), expected, strict=True):
        assert torch.equal(x, y)
    none = {name: x[:0] for name, x in arguments.items()}
    loss, dlogits = found(logits[:0], none, config)
    assert loss == 0 and dlogits.shape == (0, 67)


@pytest.mark.parametrize(
    "logits, config, message",
    [
        (torch.zeros(2, 3), {"importance_level": "sequence"}, "importance_level"),
        (torch.zeros(2, 3).double(), {}, "float32 or narrower"),
        (torch.zeros(3, 2).t(), {}, "column stride 1"),
    ],
)
def test_refusals(logits, config, message):
    arguments = batch(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=message):
        found(logits, arguments, PolicyConfig(**config))


LAUNCHES = """
import torch
from bench.one_launch import Launch, one_launch_fwd
from rft_kernels import PolicyConfig
x, y, mask = torch.zeros(9), torch.zeros(9).long(), torch.zeros(9) > 0
for dtype, lanes in ((torch.bfloat16, 1024), (torch.float32, 512)):
    for config in (
        PolicyConfig(),
        PolicyConfig(importance_cap=2, entropy_coef=0.1, dual_clip=3, kl="k3", kl_coef=1),
    ):
        one_launch_fwd(torch.zeros(9, 9, dtype=dtype), y, x, x, mask, mask, x, x, config,
            Launch(4, lanes, 8, 8, 2, 2**25))
"""


@pytest.mark.slow
def test_compiles_for_hopper():
    assert compiled(LAUNCHES) == ["_one_launch_kernel", "_sum_kernel"] * 4
