"""Keys and values kept between the forwards of a block."""

import torch
from torch import Tensor, nn


class BlockCache(nn.Module):
    """Keys and values of a layer's attention, in the place of torchtune's KV cache.

    After a forward over whole rows, forwards over some of their positions attend to the rest as it
    was then. [B, heads, L, head size] each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.positions: Tensor | None = None
        self.k, self.v = torch.empty(0), torch.empty(0)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take new keys and values, of all positions or of ``positions`` [B, m]; give all."""
        if self.positions is None:
            self.k, self.v = k, v
        else:
            index = self.positions[:, None, :, None].expand_as(k)
            self.k, self.v = self.k.scatter(2, index, k), self.v.scatter(2, index, v)
        return self.k, self.v


class LayerCaches:
    """The caches of all layers, in place while this is open."""

    def __init__(self, model: nn.Module) -> None:
        self.attentions = [layer.attn for layer in model.layers]  # type: ignore[union-attr]

    def __enter__(self) -> "LayerCaches":
        for attention in self.attentions:
            attention.kv_cache, attention.cache_enabled = BlockCache(), True
        return self

    def __exit__(self, *_: object) -> None:
        for attention in self.attentions:
            attention.kv_cache, attention.cache_enabled = None, False

    def at(self, positions: Tensor | None) -> None:
        for attention in self.attentions:
            attention.kv_cache.positions = positions
