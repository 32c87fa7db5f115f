"""The catalogue: cards read from the papers' folders. Never imports torch, nor any paper."""

from paperzoo.catalog.cards import Paper, find, papers, variants

__all__ = ["Paper", "find", "papers", "variants"]
