"""What a forward pass costs, from the model's own weights, and what that comes to on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from mechdiff.interventions.hooks import get_blocks
from mechdiff.pairs.loading import LoadedModel


class Cost:
    """Operations of the parts of a decoder: two for each weight and token, and attention to what came before.

    Args:
        loaded: The model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        block = get_blocks(loaded.model)[0]
        self.block = 2 * sum(p.numel() for p in block.parameters() if p.ndim == 2)
        table = loaded.model.get_output_embeddings()
        self.head = 2 * table.weight.numel()
        self.weights = 4 * sum(p.numel() for p in loaded.model.parameters())
        self.width = loaded.num_heads * loaded.head_dim
        self.depth = loaded.depth

    def forward(self, lengths: Sequence[int], blocks: float | None = None, heads: int | None = None) -> float:
        """Return the operations of texts of some lengths.

        Args:
            lengths: Tokens of each text, padding included.
            blocks: Blocks that are run; all by default.
            heads: Tokens for which there are logits; all by default.
        """
        tokens = sum(lengths)
        seen = sum(length * (length + 1) / 2 for length in lengths)
        depth = self.depth if blocks is None else blocks
        return depth * (tokens * self.block + 4 * self.width * seen) + self.head * (
            tokens if heads is None else heads
        )


def limit(theirs: float, ours: float, seconds: tuple[float, float], rate: float) -> str:
    """Say how much faster the operations alone allow one way to be.

    Args:
        theirs: Operations of the other way.
        ours: Operations of ours.
        seconds: What both took.
        rate: Operations a second of a matrix product on this machine.
    """
    a, b = (
        f"{ops / 1e9:,.4g} GFLOP, {ops / rate:.2f} s at the rate of a matrix product"
        for ops in (theirs, ours)
    )
    took = f"measured {seconds[0]:.2f} s and {seconds[1]:.2f} s"
    best = f"against what theirs took, ours could reach {seconds[0] * rate / ours:.2f} at that rate"
    return f"operations allow {theirs / ours:.2f}: theirs are {a}, ours {b}; {took}; {best}"
