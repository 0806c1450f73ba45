#!/usr/bin/env bash
# All that wants a GPU, in two commands of under 10 minutes each.
#
#   [WHEELS=DIR] [OUT=DIR] [PARTS=logits|hidden|"..."] [PYTHON=python3] bash bench/gpu_check.sh [--smoke]
#
# WHEELS  rivals as wheels, and what they need; installed into a temporary folder, nothing is fetched
# PARTS   logits (default): rivals versions tests memcheck token_stats policy_loss one_launch selection pictures
#         hidden: rivals versions linear_rivals token_loss update_step memory_table pictures
#         or some of these by name; memory_table takes the time that is left, so it goes further alone
# OUT     where CSVs and logs go; default bench/results/<gpu>
# A smoke run on a CPU takes a few tests in Triton's interpreter beside those of a GPU, which skip there.
# Tests are green if some ran and none failed; how many ran and were skipped is printed.
# A part that fails makes the exit status non-zero; later parts run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SMOKE=""
[ "${1:-}" = "--smoke" ] && SMOKE="--smoke --threads 1"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
case ${PARTS:=logits} in
  logits) PARTS="rivals versions tests memcheck token_stats policy_loss one_launch selection pictures" ;;
  hidden) PARTS="rivals versions linear_rivals token_loss update_step memory_table pictures" ;;
esac
STATUS=0
LIMIT=590 # s, of everything
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

part() { # NAME SECONDS COMMAND...: runs it, prints how it ended
  local name=$1 limit=$2 start=$SECONDS rc
  shift 2
  [[ " $PARTS " == *" $name "* ]] || return 1
  echo "=== $name"
  ((limit <= LIMIT - SECONDS)) || limit=$((LIMIT - SECONDS))
  if ((limit <= 0)); then echo "--- $name: FAILED, out of time"; STATUS=1; return 1; fi
  timeout "$limit" "$@" 2>&1 | tee "$OUT/$name.log" | tail -n 40
  rc=${PIPESTATUS[0]}
  if [ "$rc" = 0 ]; then echo "--- $name: ok, $((SECONDS - start)) s"
  else echo "--- $name: FAILED ($rc), $((SECONDS - start)) s"; STATUS=1; fi
  return "$rc"
}

GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else "cpu")') || exit 1
OUT=${OUT:-bench/results/$GPU}
mkdir -p "$OUT"
if [ "$GPU" = cpu ] && [ -z "$SMOKE" ]; then echo "no CUDA device: only --smoke runs here"; exit 1; fi

if [ -n "${WHEELS:-}" ]; then
  part rivals 40 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$WORK/site" "$WHEELS"/*.whl \
    && export PYTHONPATH="$PYTHONPATH:$WORK/site"
fi

part versions 20 "$PYTHON" -c '
import platform, torch, triton
print("python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
from bench.device import versions
print(versions())'

QUICK=() # quick ones, of every kernel that is timed
for test in token_stats_triton::test_entropy_has_no_sign token_stats_triton::test_target_of_probability_zero \
  token_stats_triton::test_rows_without_gradient_are_not_read_again policy_loss::test_inplace_backward \
  objective_triton::test_log_ratio_is_bounded objective_triton::test_half_precision_log_probs \
  selection_triton::test_infinities_rank_before_nan_and_zeros_are_equal one_launch::test_rows_outside_the_loss; do
  QUICK+=("tests/kernels/test_${test/::/.py::}")
done
GREEN=""
if [ -n "$SMOKE" ]; then
  part tests 60 "$PYTHON" -m bench.green tests/gpu "${QUICK[@]}" && GREEN=--tests-green
else
  part tests 190 env -u TRITON_INTERPRET "$PYTHON" -m bench.green tests/gpu tests/kernels && GREEN=--tests-green
fi

SANITIZER=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [[ " $PARTS " != *" memcheck "* ]]; then :
elif [ -n "$SANITIZER" ] && [ "$GPU" != cpu ]; then
  part memcheck 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$SANITIZER" --tool memcheck --error-exitcode 9 "$PYTHON" -c '
import torch
from rft_kernels import prefix_rft_loss, select_top_entropy
torch.manual_seed(0)
logits = torch.randn(37, 1009, device="cuda", dtype=torch.bfloat16, requires_grad=True)
targets = torch.randint(1009, (37,), device="cuda")
mask = torch.ones(37, dtype=torch.bool, device="cuda")
prefix = torch.arange(37, device="cuda") < 20
advantages = torch.ones(37, device="cuda")
prefix_rft_loss(logits, targets, None, advantages, mask, prefix, normalizer=37).loss.backward()
bounds = torch.tensor([0, 13, 37], device="cuda")
select_top_entropy(torch.rand(37, device="cuda"), prefix, cu_seqlens=bounds)
torch.cuda.synchronize()'
else
  echo "=== memcheck"; echo "--- memcheck: left out, no compute-sanitizer or no GPU"
fi

# Seconds; 20 more of each are for its start and the shape it is at. The limits of a command add up to LIMIT.
for bench in "token_stats 80" "policy_loss 55" "one_launch 45" "selection 15"; do
  read -r op budget <<<"$bench"
  # Where the tests above were red, a benchmark runs its own and times nothing if those are.
  part "$op" $((budget + 20)) "$PYTHON" -m "bench.$op" $SMOKE $GREEN --budget-s "$budget" --out "$OUT/$op.csv"
done
# It runs tests of its own, and a shape of it is long: it has 130 s more than its budget.
part linear_rivals 280 "$PYTHON" -m bench.linear_rivals $SMOKE $GREEN --budget-s 150 --out "$OUT/linear_rivals.csv"
part token_loss 50 "$PYTHON" -m bench.token_loss $SMOKE $GREEN --budget-s 30 --out "$OUT/token_loss.csv"
part update_step 70 "$PYTHON" -m bench.update_step $SMOKE --out "$OUT/update_step.csv"
# 75 s of what is left are for the trials that have begun, and the pictures.
part memory_table "$LIMIT" "$PYTHON" -m bench.memory_table $SMOKE --budget-s $((LIMIT - SECONDS - 75)) --out "$OUT/memory_table.csv"
part pictures 25 "$PYTHON" -m bench.plot "$OUT"

[ "$STATUS" = 0 ] && echo "all parts ok" || echo "some parts FAILED"
exit "$STATUS"
