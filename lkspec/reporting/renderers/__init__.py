"""One file a format: ``render(table) -> str``."""
