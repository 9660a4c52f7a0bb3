"""Hugging Face models as katds uses them: attention, slot cache, tiled head, loading."""
