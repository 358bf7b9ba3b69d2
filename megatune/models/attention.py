"""Self-attention: fused q, k, v projection, norms and rotary embedding of q and k, output projection."""

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
from megatune.parallel.collectives import all_to_all
from megatune.parallel.tensor import Linear
from megatune.parallel.world import World


class Attention(nn.Module):
    """x [T, H] -> [T, H]. Shapes: T tokens, K kv heads, G query heads a kv head, Q = K * G query heads, D head_dim.

    The rows of `qkv` are grouped by kv head (`DecoderSpec.qkv`): its output is [T, K, G + 2, D] with the group's
    queries first, then its key, then its value. Tensor parallelism deals out the groups; with more processes than
    groups each has some of one group's queries and an equal share of the columns of its key and value, and gets the
    rest of these from the processes of the same group.
    """

    def __init__(self, spec: DecoderSpec, index: int, world: World | None = None) -> None:
        super().__init__()
        world = world or World.alone()
        self.index = index
        self.tp, self.cp, self.method = world.tp, world.cp, world.config.context_method
        self.head_dim = spec.head_dim
        self.share = max(1, self.tp.size // spec.num_kv_heads)  # processes that have one group together
        self.group = spec.num_heads // spec.num_kv_heads // self.share
        self.scale, self.softcap = spec.attention_scale, spec.attention_softcap
        self.window = spec.layers[index].window
        self.norm_heads = spec.qk_norm == "head"
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        if spec.sinks:
            self.sinks = nn.Parameter(torch.empty(spec.num_heads // self.tp.size))
        else:
            self.register_parameter("sinks", None)
        self.qkv = Linear(
            spec.hidden_size, spec.qkv.rows, spec.qkv_bias, shard="column", fused=spec.qkv, world=world
        )
        self.q_norm = self.k_norm = None
        if spec.qk_norm == "head":
            self.q_norm, self.k_norm = Norm(spec, self.head_dim), Norm(spec, self.head_dim)
        elif spec.qk_norm == "full":
            self.q_norm, self.k_norm = Norm(spec, queries, cut=world), Norm(spec, keys, cut=world)
        # Whether norm and rotation of queries and keys can be one op.
        self.turns_at_once = spec.qk_norm == "none" or (spec.qk_norm == "head" and spec.norm == "rms")
        # Whether making the heads from the projection's output takes other processes.
        self.communicates = self.tp.size > 1 and (self.share > 1 or spec.qk_norm == "full")
        self.out = Linear(queries, spec.hidden_size, spec.attention_out_bias, shard="row", world=world)

    def forward(
        self, x: Tensor, segments: Segments, rotary: Rotary | None, cache: KVCache | None = None
    ) -> Tensor:
        return self.from_qkv(self.qkv(x, segments), segments, rotary, cache)

    def from_qkv(
        self, qkv: Tensor, segments: Segments, rotary: Rotary | None, cache: KVCache | None = None
    ) -> Tensor:
        """What follows the fused projection."""

        def attend(*heads: Tensor) -> Tensor:
            return self._attend(
                *(heads if self.communicates else self._heads(*heads, rotary)), segments, cache
            )

        def out(attended: Tensor) -> Tensor:
            return self.out(attended, segments)

        heads = self._heads(qkv, rotary) if self.communicates else (qkv,)
        if self.cp.size > 1:
            return out(attend(*heads))
        return recomputed(attend, out, *heads)

    def _attend(
        self,
        q_TKGD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        segments: Segments,
        cache: KVCache | None,
    ) -> Tensor:
        """Heads as of `_heads` -> the output projection's input [T, Q * D]."""
        key_segments = None
        if cache is not None:
            k_TKD, v_TKD, key_segments = cache.extend(self.index, k_TKD, v_TKD, self.window)
        attended_TQD = context.attention(
            q_TKGD.flatten(1, 2),
            k_TKD,
            v_TKD,
            segments,
            self.cp,
            method=self.method,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            key_segments=key_segments,
        )
        return attended_TQD.flatten(1)

    def _heads(self, qkv: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output of the projection -> q [T, K, G, D] and k [T, K, D], normed and turned, and v [T, K, D], of the heads
        here."""
        if self.share > 1:
            q_TKGD, k_TKD, v_TKD = self._shared_heads(qkv)
        else:
            packed = qkv.unflatten(1, (-1, self.group + 2, self.head_dim))
            if rotary is not None and self.turns_at_once:
                q, k = self.q_norm, self.k_norm
                norm = () if q is None else (q.weight, k.weight, q.eps, q.offset)
                return ops.rope_qk(packed, rotary.cos, rotary.sin, *norm)
            # One split: its backward is one concatenation, that of slices fills the whole with zeros three times.
            q_TKGD, k_TK1D, v_TK1D = packed.split((self.group, 1, 1), dim=2)
            q_TKGD, k_TKD = self._norm(self.q_norm, q_TKGD), self._norm(self.k_norm, k_TK1D.squeeze(2))
            v_TKD = v_TK1D.squeeze(2)
        if rotary is None:
            return q_TKGD, k_TKD, v_TKD
        return (*ops.rope(q_TKGD, k_TKD, rotary.cos, rotary.sin), v_TKD)

    def _shared_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_heads` but not yet turned, for a group that several processes have together: K is 1, G the queries that
        are here."""
        width = self.head_dim // self.share
        q, k, v = qkv.split((self.group * self.head_dim, width, width), dim=1)
        if not self.norm_heads:  # norms of all heads at once need no whole head
            k = self._norm(self.k_norm, k)
        tokens, first = qkv.shape[0], self.tp.rank // self.share * self.share
        counts = [tokens if first <= rank < first + self.share else 0 for rank in range(self.tp.size)]
        # The same columns to each process of the group; backward sums what they send back.
        mine = torch.stack((k, v), 1).repeat(self.share, 1, 1)
        parts_PTND = all_to_all(mine, self.tp, counts, counts).view(self.share, tokens, 2, width)
        k_T1D, v_T1D = parts_PTND.permute(1, 2, 0, 3).reshape(tokens, 2, self.head_dim).split(1, dim=1)
        if self.norm_heads:
            k_T1D = self._norm(self.k_norm, k_T1D)
        q_T1GD = self._norm(self.q_norm, q.view(tokens, 1, self.group, self.head_dim))
        return q_T1GD, k_T1D, v_T1D

    def _norm(self, norm: Norm | None, x: Tensor) -> Tensor:
        """Each head by itself, or all heads of a token at once."""
        if norm is None:
            return x
        return norm(x) if self.norm_heads else norm(x.flatten(1)).view(x.shape)
