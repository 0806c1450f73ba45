"""The loss of Prefix-RFT from hidden states, alone: a few steps on a toy head.

python kernels/examples/alone.py
"""

import torch
from rft_kernels import linear_prefix_rft_loss, linear_token_stats

num_rollouts, length, width, vocab_size = 4, 16, 32, 1000
num_tokens = num_rollouts * length
torch.manual_seed(0)
hidden = torch.randn(num_tokens, width)
head = torch.nn.Linear(width, vocab_size, bias=False)
targets = torch.randint(vocab_size, (num_tokens,))
response_mask = torch.ones(num_tokens, dtype=torch.bool)
prefix_mask = torch.arange(num_tokens) % length < 6  # these tokens came from a demonstration
cu_seqlens = torch.arange(0, num_tokens + 1, length)
advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])  # one a rollout
with torch.no_grad():
    old_log_probs = linear_token_stats(hidden, head.weight, targets).log_probs

optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
for step in range(3):
    out = linear_prefix_rft_loss(
        hidden,
        head.weight,
        targets,
        old_log_probs,
        advantages,
        response_mask,
        prefix_mask,
        normalizer=num_tokens,
        cu_seqlens=cu_seqlens,
    )
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    kept, prefix = int(out.metrics["num_selected"]), int(out.metrics["num_prefix"])
    print(f"step {step}: loss {out.loss.item():+.4f}, {kept} of {prefix} prefix tokens kept")
