"""Residual blocks: what a model can lose as a whole, since a skip connection goes around it."""

from __future__ import annotations

from dataclasses import dataclass

from prunus.errors import checks_options


@checks_options
@dataclass(frozen=True, slots=True)
class Block:
    """A child of a list or sequence of modules that adds something to what it is given.

    Attributes
    ----------
    name
        Its module path, ``"model.layers.3"``.
    container
        The path of the list or sequence that it stands in: its *stack*.
    index
        Its place there.
    siblings
        How many children the stack has, itself and those that can't be dropped included.
    dim
        Of its output: the dim along which features lie.
    """

    name: str
    container: str
    index: int
    siblings: int
    dim: int = -1

    @property
    def at_end(self) -> bool:
        """Whether it is the first or the last of its stack."""
        return self.index in (0, self.siblings - 1)
