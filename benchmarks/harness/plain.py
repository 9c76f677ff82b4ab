"""The plainest training step: modules of PyTorch and a loop, on one process, without any option.

It is the least that a step of this model takes in eager PyTorch: one product for q, k and v, one
for gate and up, PyTorch's RMSNorm, fused attention and fused AdamW. Shapes: S = tokens, C = hidden
size, H = heads, G = key/value heads, D = head dim, F = width of the MLP, V = vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from harness.steps import Job, random_rows

BASE = 10000.0  # of RoPE


class PlainLayer(nn.Module):
    """A layer of Llama."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        model = job.model
        width, ffn = model.hidden_size, model.ffn_size
        self.heads, self.kv_heads = model.num_attention_heads, model.num_kv_heads
        self.head_dim = width // self.heads
        self.before, self.between = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
        columns = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.qkv = nn.Linear(width, columns, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[1, S, C] -> [1, S, C]; cos and sin are [S, D]."""
        heads = self.heads, self.kv_heads, self.kv_heads
        qkv = rearrange(self.qkv(self.before(x)), "b s (h d) -> b h s d", d=self.head_dim)
        q, k, v = qkv.split(heads, dim=1)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.proj(rearrange(out, "b h s d -> b s (h d)"))
        gate, up = self.gate_up(self.between(x)).chunk(2, dim=-1)
        result: Tensor = x + self.down(F.silu(gate) * up)
        return result


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [1, H, S, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class PlainStep:
    """A step of a hand-written loop."""

    def __init__(self, job: Job) -> None:
        model = job.model
        width = model.hidden_size
        self.embedding = nn.Embedding(job.vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(PlainLayer(job) for _ in range(model.num_layers))
        self.norm = nn.RMSNorm(width, 1e-5)
        parts = nn.ModuleList([self.embedding, self.layers, self.norm])
        self.parameters = list(parts.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        dim = width // model.num_attention_heads
        inverse = BASE ** (-torch.arange(0, dim, 2) / dim)
        angles = torch.outer(torch.arange(job.tokens), inverse).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.rows = random_rows(job)

    def run(self) -> float:
        """Makes one step and returns its loss."""
        total = 0.0
        for row in self.rows:
            x = self.embedding(row[None, :-1])
            for layer in self.layers:
                x = layer(x, self.cos, self.sin)
            logits = F.linear(self.norm(x), self.embedding.weight)
            loss = F.cross_entropy(logits[0], row[1:]) / len(self.rows)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total
