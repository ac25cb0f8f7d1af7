"""A `Target` tells the loader where a tensor of the checkpoint goes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...kernels.bundles import Weight

# Where a stored matrix goes: the view of a plain parameter, or the views of a quantised matrix's parameters.
Place = Tensor | Weight


def place(weight: Weight) -> Place:
    """The place of a model's matrix, or of some of its rows."""
    return weight if weight.scale is not None else weight.data


@dataclass(frozen=True, slots=True)
class Cut:
    """Part `index` of `of` equal parts of a stored tensor along `dim`: one rank's."""

    dim: int
    index: int
    of: int

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a stored tensor whose part has shape `shape`."""
        return (*shape[: self.dim], shape[self.dim] * self.of, *shape[self.dim + 1 :])

    def part(self, whole: Tensor) -> Tensor:
        """The part as a view of the stored tensor."""
        size = whole.shape[self.dim] // self.of
        return whole.narrow(self.dim, self.index * size, size)


@dataclass(frozen=True)
class Target:
    """The place that a stored tensor, or its `cut`, fills. A matrix that a file holds in several tensors counts as one
    tensor of the matrix's shape.

    `name` is canonical (`Names`). `covers` lists the canonical names of the targets in whose place a fused tensor may
    come; a target without `covers` must be filled, by its own tensor or by one that covers it. `plus` is added to the
    stored values in the view's dtype; no quantised matrix has one. `behind`, never with a cut, are more views: they
    take the stored rows after the rows of `view`, one view after another. So rows that a file interleaves reach places
    that lie apart.
    """

    name: str
    view: Place
    covers: tuple[str, ...] = ()
    cut: Cut | None = None  # None: the whole tensor
    plus: float = 0.0
    behind: tuple[Place, ...] = ()

    @property
    def views(self) -> tuple[Place, ...]:
        """All views that the stored tensor fills, in the order of its rows."""
        return (self.view, *self.behind)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape that the tensor has in a file."""
        shape = tuple(self.view.shape)
        if self.behind:
            return (sum(view.shape[0] for view in self.views), *shape[1:])
        return shape if self.cut is None else self.cut.whole(shape)
