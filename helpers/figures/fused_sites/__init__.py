"""Which fuser fuses which attention: the table of fused sites."""
