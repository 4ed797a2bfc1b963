"""What lies in assets/, what the README's tables show, and the pages, made by commands."""
