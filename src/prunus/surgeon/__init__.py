"""The only code that changes a model: slice, attributes, mask, restore."""

from prunus.surgeon.apply import apply
from prunus.surgeon.depth import drop_blocks
from prunus.surgeon.mask import mask
from prunus.surgeon.restore import restore
from prunus.surgeon.snapshot import applied_plan, remember

__all__ = ["applied_plan", "apply", "drop_blocks", "mask", "remember", "restore"]
