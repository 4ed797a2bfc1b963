"""Settings of every test, those of the notebooks included."""

import os

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # tests never touch the network; the notebooks' kernels inherit it
)
