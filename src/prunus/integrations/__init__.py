"""Bridges to other packages: thin, and imported only when asked for."""
