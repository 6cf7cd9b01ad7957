"""First and second moments of paired rows (source x, target y), accumulated batch by batch.

1. Each batch is centred on its own mean and multiplied out in float64.
2. Batches and processes are merged pairwise, so any split and order of the rows gives the same sums.
3. A linear map, its errors and its R² on other rows need nothing else: the rows are read once and not kept.

The target may be several layers side by side: they share one source covariance, and `columns` takes a layer
out again. Memory is 8·(d_in² + d_in·d_out) bytes; of the target's own covariance only the diagonal is kept.

Source: Chan, Golub and LeVeque, The American Statistician 37 (1983), the pairwise update.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from mechdiff.errors import FitError

_ROUNDING = 1e-13  # a gap below this share of the sums it is the difference of is rounding


@dataclass(frozen=True)
class Moments:
    """Centred sums over paired rows; plain float64 tensors that are updated in place.

    >>> moments = Moments.zeros(1, 1)
    >>> moments.update(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]]))
    >>> moments.mean_y.tolist(), moments.xy.tolist()
    ([3.0], [[4.0]])

    Attributes:
        n: Number of rows, a scalar.
        mean_x: `(d_in,)`.
        mean_y: `(d_out,)`.
        xx: Sum of centred products of the source, `(d_in, d_in)`.
        xy: Sum of centred products of source and target, `(d_in, d_out)`.
        yy: Sum of centred squares of the target, `(d_out,)`.
    """

    n: Tensor
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, d_in: int, d_out: int, device: torch.device | str | None = None) -> Self:
        """Make the moments of no rows."""
        shapes = ((), (d_in,), (d_out,), (d_in, d_in), (d_in, d_out), (d_out,))
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Self:
        """Take the moments of paired rows `(rows, d_in)` and `(rows, d_out)`.

        >>> float(Moments.of(torch.ones(3, 2), torch.ones(3, 1)).n)
        3.0
        """
        assert x.ndim == y.ndim == 2, "expected (rows, width) twice"
        assert len(x) == len(y), f"{len(x)} rows against {len(y)}"
        if not len(x):
            return cls.zeros(x.shape[1], y.shape[1], x.device)
        x, y = x.detach().to(torch.float64), y.detach().to(torch.float64)
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        n = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
        return cls(n, mean_x, mean_y, x.T @ x, x.T @ y, y.square().sum(0))

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add paired rows `(rows, d_in)` and `(rows, d_out)` of any dtype."""
        self.merge(self.of(x, y))

    def merge(self, other: "Moments") -> None:
        """Add the rows behind other moments."""
        n = self.n + other.n
        if n == 0:
            return
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.n * other.n / n
        self.xx.add_(other.xx).add_(torch.outer(dx, dx).mul_(weight))
        self.xy.add_(other.xy).add_(torch.outer(dx, dy).mul_(weight))
        self.yy.add_(other.yy).add_(dy.square() * weight)
        self.mean_x.add_(dx * (other.n / n))
        self.mean_y.add_(dy * (other.n / n))
        self.n.copy_(n)

    def tensors(self) -> dict[str, Tensor]:
        """Name the tensors, for buffers and files; `Moments(**tensors)` is the way back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def columns(self, start: int, stop: int) -> "Moments":
        """Take out some target columns (views; the source is shared)."""
        cut = slice(start, stop)
        return Moments(self.n, self.mean_x, self.mean_y[cut], self.xx, self.xy[:, cut], self.yy[cut])

    def delta(self) -> "Moments":
        """Take the moments of (x, y − x).

        Raises:
            FitError: If source and target differ in width.
        """
        check_equal_widths(*self.xy.shape)
        centred = _above_rounding(
            self.yy + self.xx.diagonal() - 2 * self.xy.diagonal(), self.yy + self.xx.diagonal()
        )
        return Moments(self.n, self.mean_x, self.mean_y - self.mean_x, self.xx, self.xy - self.xx, centred)

    def gap(self) -> Tensor:
        """Sum (y − x)² per dimension, `(d_out,)`: the error of the identity map, 0 if below rounding.

        Raises:
            FitError: If source and target differ in width.
        """
        delta = self.delta()
        return delta.yy + self.n * delta.mean_y.square()


def check_equal_widths(d_in: int, d_out: int) -> None:
    """Refuse to subtract states of different width.

    Raises:
        FitError: If the widths differ.

    >>> check_equal_widths(16, 16)
    """
    if d_in != d_out:
        raise FitError(
            f"source width {d_in} and target width {d_out} differ; use model.shrink=zero or equal widths"
        )


def _above_rounding(values: Tensor, size: Tensor) -> Tensor:
    return torch.where(values > _ROUNDING * size, values, 0.0)
