"""A model with a batch dimension, for those who use it from outside."""

from __future__ import annotations

from torch import Tensor, nn

from megatune.models.decoder import Decoder
from megatune.ops import Segments


class CausalLM(nn.Module):
    """Token ids [B, S] -> logits [B, S, V]; each row is a document of its own. `decoder`: the model itself."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens`: int64 [B, S]. Logits in the model's dtype."""
        batch, length = tokens.shape
        segments = Segments.from_lengths((length,) * batch, tokens.device)
        return self.decoder(tokens.flatten(), segments).unflatten(0, (batch, length))
