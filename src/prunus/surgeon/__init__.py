"""The only code that changes a model: slice, attributes, mask."""

from prunus.surgeon.apply import apply
from prunus.surgeon.mask import mask

__all__ = ["apply", "mask"]
