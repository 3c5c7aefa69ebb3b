"""Checks of a pruned model against the masked original."""

from prunus.verifier.randomize import randomize
from prunus.verifier.verify import Certificate

__all__ = ["Certificate", "randomize"]
