"""BERT encoder: summed embeddings, post-norm layers, eager softmax attention, a pooler."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embeddings(nn.Module):
    """Word, position and segment embeddings, normalised: [B, N] ids -> [B, N, dim]."""

    def __init__(self, vocab_size: int, max_positions: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.word = nn.Embedding(vocab_size, dim, padding_idx=0)
        self.position = nn.Embedding(max_positions, dim)
        self.token_type = nn.Embedding(2, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.word(input_ids) + self.position(positions) + self.token_type(token_type_ids)
        out: Tensor = self.dropout(self.norm(x))
        return out


class SelfAttention(nn.Module):
    """Multi-head attention with separate projections: [B, N, dim] -> [B, N, dim].

    ``mask`` is added to the scores and broadcasts to [B, heads, N, N].
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B, N, _ = x.shape
        q = self.query(x).view(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.key(x).view(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.value(x).view(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.head_dim)
        weights = self.dropout(torch.softmax(scores + mask, dim=-1))
        context = torch.matmul(weights, v).transpose(1, 2).contiguous()
        out: Tensor = self.out(context.view(B, N, self.num_heads * self.head_dim))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each added to its input and then normalised."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, num_heads, dropout)
        self.attention_norm = nn.LayerNorm(dim, eps=1e-12)
        self.intermediate = nn.Linear(dim, hidden)
        self.output = nn.Linear(hidden, dim)
        self.output_norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        hidden = F.gelu(self.intermediate(x))
        out: Tensor = self.output_norm(x + self.dropout(self.output(hidden)))
        return out


class BERT(nn.Module):
    """ids [B, N] -> hidden states [B, N, dim] and the pooled first token [B, dim].

    ``attention_mask`` [B, N] is 1 for tokens and 0 for padding; without it every token counts.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        hidden: int,
        max_positions: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(vocab_size, max_positions, dim, dropout)
        self.layers = nn.ModuleList(Layer(dim, num_heads, hidden, dropout) for _ in range(depth))
        self.pooler = nn.Linear(dim, dim)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.embeddings(input_ids, token_type_ids)
        padding = 1.0 - attention_mask[:, None, None, :].to(x.dtype)
        mask = padding * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, mask)
        return x, torch.tanh(self.pooler(x[:, 0]))


def bert_tiny(vocab_size: int = 1000, num_heads: int = 2, depth: int = 2) -> BERT:
    """Two layers of 128 channels, with a small vocabulary."""
    return BERT(vocab_size, 128, depth, num_heads, 512, max_positions=128)


def bert_base(vocab_size: int = 30522, num_heads: int = 12, depth: int = 12) -> BERT:
    """BERT-base: twelve layers of 768 channels and twelve heads."""
    return BERT(vocab_size, 768, depth, num_heads, 3072)
