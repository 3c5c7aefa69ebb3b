"""Searches that measure the model: sensitivity of groups, and ratios by trials."""
