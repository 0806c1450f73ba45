"""TRL's trainers on these kernels: one line before the trainer is used, one to take it back.

python kernels/examples/trl_patch.py
"""

import sys

import torch
from rft_kernels.adapters import trl as adapter

try:
    from trl.trainer import utils
except ImportError as error:
    sys.exit(f"trl cannot be imported: {error}\n    pip install trl==1.16.0")

torch.manual_seed(0)
logits = torch.randn(2, 8, 1000, dtype=torch.bfloat16, requires_grad=True)
index = torch.randint(1000, (2, 8))

with adapter.patch():  # or handle = adapter.patch(); trainer.train(); handle.undo()
    log_probs, entropy = utils.selective_log_softmax_and_entropy(logits, index)
own_log_probs, own_entropy = utils.selective_log_softmax_and_entropy(logits, index)

loss = -log_probs.mean() - 0.01 * entropy.mean()
loss.backward()
truth = logits.detach().double().log_softmax(-1).gather(-1, index[..., None])[..., 0]
print(f"loss {loss.item():.4f}")
for name, found in (("ours", log_probs), ("TRL's own", own_log_probs)):
    print(f"largest error of a log-prob, {name}: {(found - truth).abs().max().item():.1e}")
