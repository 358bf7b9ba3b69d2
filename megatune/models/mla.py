"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): q from one latent, k and v of all heads from another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatune import ops
from megatune.models.cache import KVCache
from megatune.models.norm import Norm
from megatune.models.recompute import recomputed
from megatune.models.rope import Rotary
from megatune.models.spec import DecoderSpec
from megatune.ops import Segments
from megatune.parallel import context
from megatune.parallel.tensor import Linear, gather_tokens
from megatune.parallel.world import World


class MLA(nn.Module):
    """x [T, H] -> [T, H]. Shapes: T tokens, Q heads, N unrotated and R rotated dimensions of a head's q and k, D of its
    v.

    `q_a` and `kv_a` make the latents of the tokens that are here, whole on every tensor parallel process; `q_b` and
    `kv_b` expand them to this process's heads. The rotated key is one for all heads: of `kv_a`'s output the last R.
    The cache holds expanded keys and values.
    """

    def __init__(self, spec: DecoderSpec, index: int, world: World | None = None) -> None:
        super().__init__()
        world = world or World.alone()
        mla, hidden, bias = spec.mla, spec.hidden_size, spec.qkv_bias
        self.spec, self.index, self.scale = mla, index, spec.attention_scale
        self.tp, self.cp, self.method = world.tp, world.cp, world.config.context_method
        queries = spec.num_heads * mla.query_dim
        if mla.q_rank is None:
            self.q = Linear(hidden, queries, shard="column", world=world)
        else:
            self.q_a = Linear(hidden, mla.q_rank, bias, shard="replicated", world=world)
            self.q_a_norm = self._norm(spec, mla.q_rank)
            self.q_b = Linear(mla.q_rank, queries, shard="column", world=world)
        self.kv_a = Linear(hidden, mla.kv_rank + mla.rope_dim, bias, shard="replicated", world=world)
        self.kv_a_norm = self._norm(spec, mla.kv_rank)
        expanded = spec.num_heads * (mla.nope_dim + mla.value_dim)
        self.kv_b = Linear(mla.kv_rank, expanded, shard="column", world=world)
        values = spec.num_heads * mla.value_dim
        self.out = Linear(values, hidden, spec.attention_out_bias, shard="row", world=world)

    def forward(
        self, x: Tensor, segments: Segments, rotary: Rotary | None, cache: KVCache | None = None
    ) -> Tensor:
        mla = self.spec
        if mla.q_rank is None:
            q = self.q(x, segments)
        else:
            q = self.q_b(self.q_a_norm(self.q_a(x, segments)), segments)
        latent, k_TR = self.kv_a(x, segments).split((mla.kv_rank, mla.rope_dim), dim=1)
        # Every process's heads use the one rotated key: the gather's backward sums what they give back.
        k_TR = gather_tokens(k_TR, self.tp)
        kv = self.kv_b(self.kv_a_norm(latent), segments)

        def attend(q: Tensor, k_TR: Tensor, kv: Tensor) -> Tensor:
            return self._attend(q, k_TR, kv, segments, rotary, cache)

        def out(attended: Tensor) -> Tensor:
            return self.out(attended, segments)

        return out(attend(q, k_TR, kv)) if self.cp.size > 1 else recomputed(attend, out, q, k_TR, kv)

    def _attend(
        self,
        q: Tensor,
        k_TR: Tensor,
        kv: Tensor,
        segments: Segments,
        rotary: Rotary | None,
        cache: KVCache | None,
    ) -> Tensor:
        """q [T, Q * (N + R)], kv [T, Q * (N + D)], of all tokens and this process's heads -> [T, Q * D]."""
        mla = self.spec
        q_TQN, q_TQR = q.unflatten(1, (-1, mla.query_dim)).split((mla.nope_dim, mla.rope_dim), dim=2)
        q_TQR, k_T1R = self._turned(q_TQR, k_TR, rotary)
        q_TQC = torch.cat((q_TQN, q_TQR), 2)
        k_TQN, v_TQD = kv.unflatten(1, (-1, mla.nope_dim + mla.value_dim)).split(
            (mla.nope_dim, mla.value_dim), dim=2
        )
        k_TQC = torch.cat((k_TQN, k_T1R.expand(-1, k_TQN.shape[1], -1)), 2)
        key_segments = None
        if cache is not None:
            k_TQC, v_TQD, key_segments = cache.extend(self.index, k_TQC, v_TQD, None)
        attended_TQD = context.attention(
            q_TQC,
            k_TQC,
            v_TQD,
            segments,
            self.cp,
            method=self.method,
            scale=self.scale,
            key_segments=key_segments,
        )
        return attended_TQD.flatten(1)

    def _turned(self, q_TQR: Tensor, k_TR: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Queries [T, Q, R] and the key [T, 1, R], turned. Pairs that stand side by side come out in halves, as in
        transformers: the order is the same in q and k, so that their products do not see it."""
        k_T1R = k_TR.unsqueeze(1)
        if rotary is None:
            return q_TQR, k_T1R
        if self.spec.interleaved:
            q_TQR, k_T1R = (x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in (q_TQR, k_T1R))
        q_T1QR, k_T1R = ops.rope(q_TQR.unsqueeze(1), k_T1R, rotary.cos, rotary.sin)
        return q_T1QR.squeeze(1), k_T1R

    @staticmethod
    def _norm(spec: DecoderSpec, size: int) -> Norm:
        norm = Norm(spec, size)
        norm.eps = spec.mla.norm_eps
        return norm
