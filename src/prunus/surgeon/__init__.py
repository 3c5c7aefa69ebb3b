"""The only code that changes a model: slice, attributes, mask, restore."""

from prunus.surgeon.applied import applied_plan, remember
from prunus.surgeon.apply import apply
from prunus.surgeon.depth import drop_blocks
from prunus.surgeon.mask import mask
from prunus.surgeon.restore import restore

__all__ = ["applied_plan", "apply", "drop_blocks", "mask", "remember", "restore"]
