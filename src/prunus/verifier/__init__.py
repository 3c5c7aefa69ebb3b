"""Checks of a pruned model against the masked original."""
