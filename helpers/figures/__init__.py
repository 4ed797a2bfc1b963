"""What lies in assets/, made by commands; the notebooks, run; the pages."""
