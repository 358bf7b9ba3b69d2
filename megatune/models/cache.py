"""Keys and values of the tokens already seen, for generation."""

from __future__ import annotations

import torch
from torch import Tensor

from megatune.ops import Segments


class KVCache:
    """Room for `max_tokens` tokens of one document; `length` of them are filled.

    Each layer's keys and values are [max_tokens, K, D], allocated when the layer first gives some, in their dtype
    and on their device.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._segments: dict[int, Segments] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor, Segments]:
        """Add a layer's new keys and values [T, K, D]; return those that its new queries can see, and their borders.

        With a `window`, the tokens before the first new query's window are left out. `advance` afterwards, when all
        layers have added theirs. ValueError when there is no room.
        """
        end = self.length + k.shape[0]
        if end > self.max_tokens:
            raise ValueError(f"KVCache: {end} tokens do not fit into {self.max_tokens}")
        if layer not in self._layers:
            self._layers[layer] = tuple(x.new_empty(self.max_tokens, *x.shape[1:]) for x in (k, v))
        keys, values = self._layers[layer]
        keys[self.length : end], values[self.length : end] = k, v
        first = 0 if window is None else max(0, self.length - window + 1)
        return keys[first:end], values[first:end], self._borders(end - first, k.device)

    def _borders(self, tokens: int, device: torch.device) -> Segments:
        if tokens not in self._segments:
            self._segments[tokens] = Segments.from_lengths((tokens,), device)
        return self._segments[tokens]

    def advance(self, tokens: int) -> None:
        """`tokens` more are filled in all layers."""
        self.length += tokens
        self._segments.clear()

    def clear(self) -> None:
        """Forget all tokens; the room is kept."""
        self.length = 0
        self._segments.clear()
