"""Draw the pictures of the notebooks, beside this file: ``python assets/make_pictures.py``.

Each is drawn by Netron from a graph that is made here, of two layers, which are as those of the
full model; the fusion is that of the notebook's own cells. It takes a minute, and Chromium.
"""

import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import torch
from onnxruntime.transformers import optimizer

from helpers import explain, export, files, graph, models, view

ASSETS = Path(__file__).parent
NOTEBOOK = ASSETS.parent / "notebooks" / "01_wav2vec2.ipynb"
SIZES = {"num_heads": 12, "hidden_size": 768}


def fusion() -> dict[str, Any]:
    """What the cells of the notebook define that are tagged ``fusion``."""
    names: dict[str, Any] = {"math": math, "optimizer": optimizer}
    names["bart"] = optimizer.MODEL_TYPES["bart"][0]
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if "fusion" in cell.metadata.get("tags", []):
            exec(compile(cell.source, NOTEBOOK.name, "exec"), names)
    return names


def draw(folder: Path) -> dict[str, view.View]:
    """Draw all pictures into `folder`; returns what each shows, by file name."""
    model = models.load("wav2vec2", num_hidden_layers=2).model
    example = {"input_values": torch.from_numpy(models.speech(seconds=1, batch=2))}
    with tempfile.TemporaryDirectory() as work:
        unfused, fused = Path(work) / "unfused.onnx", Path(work) / "fused.onnx"
        exported = export.export(model, example, unfused, "torchscript")
        [reason] = explain.explain(unfused, "bart", **SIZES).reasons
        options = fusion()["OPTIONS"]
        with export.quiet(), files.writing(fused) as draft:
            made = optimizer.optimize_model(str(unfused), "wav2vec2", *SIZES.values(), options)
            made.save_model_to_file(str(draft))
        site = graph.sites(exported.model)[0]
        attention = graph.sites(graph.load(fused, weights=False))[0]
        marks = reason.marks()
        path = [*marks["along"], marks["break_at"], graph.name(site.context)]
        pictures = {
            "01_block.svg": (unfused, None, {}),
            "01_break.svg": (unfused, None, marks),
            "01_path.svg": (
                unfused,
                reason.anchor.output,
                {"along": path, "up": 1, "down": 0},
            ),
            "01_fused.svg": (fused, attention.name, {}),
        }
        shown = {}
        for name, (file, around, marks) in pictures.items():
            print(f"drawing {name} …", flush=True)
            shown[name] = view.save(file, folder / name, around, **marks)
    return shown


if __name__ == "__main__":
    try:
        draw(ASSETS)
    except files.BadInput as error:
        sys.exit(str(error))
