"""What lies in assets/, and what the README's tables show, made by commands."""
