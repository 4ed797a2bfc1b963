"""Does fusing pay? The table of speed."""
