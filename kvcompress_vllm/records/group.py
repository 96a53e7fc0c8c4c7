# SPDX-License-Identifier: Apache-2.0
"""The shape of a group of attention layers whose keys lie in the same blocks."""

from __future__ import annotations

from dataclasses import dataclass

from kvcompress_vllm.cache.page_format import PageFormat


@dataclass(frozen=True)
class CacheGroup:
    """Attention layers of one rank that are alike. Letters as in ``cache/layout.py``.

    A block of the group holds B tokens of all its layers and heads, one page for each::

        block   | page of layer 0, head 0 | layer 0, head 1 | ... | layer L-1, head H-1 |
        page    | B keys and their values: B * 2 * D numbers                           |

    All layers with full attention are one group, with blocks, rows and packed pages of its own;
    those of a draft model come last in it, and no policy judges them (``compression/drafts.py``).
    records of a step name the group that they are about by its :attr:`index`. Layers with a window
    are in other groups of vLLM's, which this does not describe. How packed pages hold keys is a
    matter of the group, too: T keys each, of m blocks, in the bytes of B.
    """

    layers: int
    """L."""
    heads: int
    """H, KV heads."""
    queries_per_head: int
    """G, query heads per KV head."""
    head_size: int
    """D."""
    block_size: int
    """B, of a page; in most models also of a block of vLLM's pool."""
    itemsize: int
    """Bytes of one number of a key or value in a page."""
    scale: float
    """Factor on the attention logits."""
    soft_cap: float = 0.0
    """Of the attention logits; 0: none."""
    page_format: PageFormat = PageFormat.AUTO
    """How packed pages hold keys."""
    draft_layers: int = 0
    """The last so many of its layers are those of a draft model."""
    index: int = 0
    """Which of the engine's groups it is."""
    kernel_blocks: int = 1
    """Kernel blocks of a block of vLLM's pool. Beside states (Mamba, linear attention) vLLM makes
    its blocks as long as a state is large, hundreds of tokens; pages stay short. Workers know
    kernel blocks only, and call them blocks."""

    @property
    def shape(self) -> tuple[int, int]:
        """L, H: of what is known per head."""
        return self.layers, self.heads

    @property
    def target_layers(self) -> int:
        """Layers of the model that is served; they come first."""
        return self.layers - self.draft_layers

    @property
    def target_heads(self) -> int:
        """KV heads of these."""
        return self.target_layers * self.heads

    @property
    def pages_per_block(self) -> int:
        """L * H: pages of a block, one for each head of the rank."""
        return self.layers * self.heads

    @property
    def page_shape(self) -> tuple[int, int]:
        """Keys of a page, and numbers of each: K, then V."""
        return self.block_size, 2 * self.head_size

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        keys, width = self.page_shape
        return keys * width * self.itemsize

    @property
    def blocks_per_page(self) -> int:
        """m, blocks whose keys a packed page holds."""
        return self.page_format.blocks_per_page

    @property
    def page_keys(self) -> int:
        """T, keys that a packed page holds."""
        return self.page_format.keys_per_page(self.block_size)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of vLLM's pool."""
        return self.kernel_blocks * self.pages_per_block * self.page_bytes

    def num_pages(self, num_blocks: int) -> int:
        """P, pages of so many kernel blocks."""
        return num_blocks * self.pages_per_block
