"""Which precision, on which provider? The table of speed and quality."""
