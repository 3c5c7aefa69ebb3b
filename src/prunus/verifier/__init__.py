"""Checks of a pruned model against the masked original."""

from prunus.verifier.judgement import Certificate
from prunus.verifier.randomize import randomize

__all__ = ["Certificate", "randomize"]
