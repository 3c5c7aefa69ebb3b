"""Records of what hangs together, and the algorithms on them; no model, no execution."""
