"""Self-attention: fused q, k, v projection, norms and rotary embedding of q and k, output projection."""

from __future__ import annotations

from torch import Tensor, nn

from megatune import ops
from megatune.models.cache import KVCache
from megatune.models.norm import Norm
from megatune.models.rope import Rotary
from megatune.models.spec import DecoderSpec
from megatune.ops import Segments
from megatune.parallel.tensor import Linear


class Attention(nn.Module):
    """x [T, H] -> [T, H]. Shapes: T tokens, K kv heads, G query heads a kv head, Q = K * G query heads, D head_dim.

    The rows of `qkv` are grouped by kv head (`DecoderSpec.qkv`): its output is [T, K, G + 2, D] with the group's
    queries first, then its key, then its value.
    """

    def __init__(self, spec: DecoderSpec, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim, self.group = spec.head_dim, spec.num_heads // spec.num_kv_heads
        self.scale, self.softcap = spec.attention_scale, spec.attention_softcap
        self.window = spec.layers[index].window
        self.norm_heads = spec.qk_norm == "head"
        queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.qkv = Linear(spec.hidden_size, spec.qkv.rows, spec.qkv_bias, shard="column", fused=spec.qkv)
        if spec.qk_norm == "none":
            self.q_norm = self.k_norm = None
        else:
            self.q_norm = Norm(spec, self.head_dim if self.norm_heads else queries)
            self.k_norm = Norm(spec, self.head_dim if self.norm_heads else keys)
        self.out = Linear(queries, spec.hidden_size, spec.attention_out_bias, shard="row")

    def forward(
        self, x: Tensor, segments: Segments, rotary: Rotary | None, cache: KVCache | None = None
    ) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (-1, self.group + 2, self.head_dim))
        # One split: its backward is one concatenation, that of slices fills the whole with zeros three times.
        q_TKGD, k_TK1D, v_TK1D = qkv.split((self.group, 1, 1), dim=2)
        k_TKD, v_TKD = k_TK1D.squeeze(2), v_TK1D.squeeze(2)
        if self.q_norm is not None:
            q_TKGD, k_TKD = self._norm(self.q_norm, q_TKGD), self._norm(self.k_norm, k_TKD)
        if rotary is not None:
            q_TKGD = ops.rope(q_TKGD, rotary.cos, rotary.sin)
            k_TKD = ops.rope(k_TKD, rotary.cos, rotary.sin)
        key_segments = None
        if cache is not None:
            k_TKD, v_TKD, key_segments = cache.extend(self.index, k_TKD, v_TKD, self.window)
        attended_TQD = ops.attention(
            q_TKGD.flatten(1, 2),
            k_TKD,
            v_TKD,
            segments,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            key_segments=key_segments,
        )
        return self.out(attended_TQD.flatten(1))

    def _norm(self, norm: Norm, x: Tensor) -> Tensor:
        """Each head by itself, or all heads of a token at once."""
        return norm(x) if self.norm_heads else norm(x.flatten(1)).view(x.shape)
