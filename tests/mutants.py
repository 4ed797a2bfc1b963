"""Planted faults: graphs that a stock fusion fuses, with one thing of one attention changed.

What became of a mutant is told by the optimizer itself, whose result is `watched` while
`helpers.explain` runs it, and by running that result; `miss` then holds the explanation against it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
import transformers
from onnx import helper, numpy_helper
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxscript import rewriter
from test_five import PackedViT
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from helpers import explain, export, files, fuse, graph, models
from helpers.models.small import ARCHITECTURES, Small
from helpers.quiet import quiet

HEADS, WIDTH, LAYER = 4, 32, 1  # the layer that is changed, of two
PLANTED = "zq_planted"
SIZES = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 64}


@dataclass(frozen=True)
class Seed:
    """A graph that `model_type` fuses at each of `opt_levels`, or `rules`, "FILE.py:NAME", do."""

    name: str
    model_type: str
    opt_levels: tuple[int, ...]
    proto: onnx.ModelProto
    inputs: Path  # an .npz; padded on the right, which is all that BERT's fusions are right for
    rules: str | None = None

    def explained(self, path: Path, level: int, **more: Any) -> explain.Explanation:
        """What `explain` says of the graph at `path`, made from this one."""
        if self.rules:
            return explain.explain(path, rules=self.rules, **{"parity": False} | more)
        sizes = {"num_heads": HEADS, "hidden_size": WIDTH, "opt_level": level}
        return explain.explain(path, self.model_type, **sizes, **more)


@dataclass(frozen=True)
class Mutant:
    """A seed with one fault: any of the names in `planted` says where it is."""

    seed: Seed
    what: str
    planted: frozenset[str]
    proto: onnx.ModelProto
    shared: bool = False  # the fault is in what both layers read
    undoes: bool = False  # what is left is no attention: a Softmax over the queries

    def __str__(self) -> str:
        return f"{self.seed.name}: {self.what}"


class _Hidden(torch.nn.Module):
    """BERT with its hidden states as its one output, which TorchScript can export."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict:
        return {"hidden": self.model(input_ids, attention_mask)[0]}


def seeds(folder: Path) -> list[Seed]:
    """BERT, DistilBERT, the encoders of CLIP (vision) and Whisper: two layers, TorchScript, eager.

    Static where the field notes have it so, since the optimizer's result flips with that.
    """
    torch.manual_seed(0)
    eager = {"attn_implementation": "eager"}
    text = {"vocab_size": 99, "max_position_embeddings": 32, **eager}
    bert = transformers.BertConfig(hidden_size=WIDTH, **SIZES, **text)
    distil = transformers.DistilBertConfig(dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=64, **text)
    clip = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, image_size=16, patch_size=4, **SIZES, **eager
    )
    whisper = transformers.WhisperConfig(
        num_mel_bins=8, d_model=WIDTH, encoder_layers=2, encoder_attention_heads=HEADS,
        encoder_ffn_dim=64, max_source_positions=20, **eager,
    )  # fmt: skip
    words = {
        "input_ids": torch.randint(5, 90, (2, 9)),
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
    }
    made = [
        ("bert", "bert", (0, 1), _Hidden(transformers.BertModel(bert, False)), words, True),
        ("distilbert", "bert", (0,), transformers.DistilBertModel(distil), words, False),
        ("clip", "clip", (0,), transformers.CLIPVisionModel(clip),
         {"pixel_values": torch.randn(2, 3, 16, 16)}, False),
        ("whisper", "bart", (1, 2), WhisperEncoder(whisper),
         {"input_features": torch.randn(2, 8, 40)}, True),
    ]  # fmt: skip
    found = []
    for name, model_type, levels, model, inputs, dynamic in made:
        models.randomise(model)
        path = folder / f"{name}.onnx"
        export.export(model.eval(), inputs, path, "torchscript", dynamic=dynamic)
        np.savez(folder / f"{name}.npz", **{key: value.numpy() for key, value in inputs.items()})
        found.append(Seed(name, model_type, levels, onnx.load(path), folder / f"{name}.npz"))
    return found


def seeds_of_rules(folder: Path) -> list[Seed]:
    """Graphs that no stock fusion fuses, with the rules that `explain.suggest` writes for them:
    WavLM, Swin, GPT-2's decoder, a packed Vision Transformer, and BERT in float16."""
    torch.manual_seed(0)
    windows = {"depths": [2], "num_heads": [2], "patch_size": 4, "window_size": 4}
    windows |= {"embed_dim": 16, "image_size": 32}
    swin = Small("SwinModel", windows, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)})
    half = ARCHITECTURES["BERT"]
    made = [
        ("wavlm", ARCHITECTURES["WavLM"].make("eager"), ARCHITECTURES["WavLM"].inputs(), True),
        ("swin", swin.make("eager"), swin.inputs(), False),
        ("gpt2", ARCHITECTURES["GPT-2"].make("eager"), ARCHITECTURES["GPT-2"].inputs(), True),
        ("packed", PackedViT(), {"x": torch.randn(2, 9, WIDTH)}, True),
        ("half", _Hidden(half.make("eager")), half.inputs(), True),
    ]
    found = []
    for name, model, inputs, dynamic in made:
        path = folder / f"{name}.onnx"
        export.export(model.eval(), inputs, path, "torchscript", dynamic=dynamic)
        if name == "half":
            onnx.save(convert_float_to_float16(onnx.load(path)), path)
        whole = graph.load(path)
        with quiet():
            fuse.convert(whole)
        files.save(whole, path)
        np.savez(folder / f"{name}.npz", **{key: value.numpy() for key, value in inputs.items()})
        suggestion = explain.suggest(path)
        assert not suggestion.left
        (folder / f"{name}.py").write_text(suggestion.text)
        (rules,) = re.findall(r"--rules FILE.py:(\w+)", suggestion.text)
        found.append(
            Seed(
                name,
                "",
                (0,),
                onnx.load(path),
                folder / f"{name}.npz",
                f"{folder / name}.py:{rules}",
            )
        )
    return found


# ── Faults ──────────────────────────────────────────────────────────────────────────────────────


def _layer(proto: onnx.ModelProto) -> tuple[list[onnx.NodeProto], str]:
    """The nodes of the attention to change, from the projections to the normalisation after them,
    and the name of its input."""
    model = ir.from_proto(proto)
    block = graph.block(model, graph.sites(model)[LAYER])
    last = [user for node in block[-1:] for v in node.outputs for user in v.consumers()]
    norms = [user for node in last for v in node.outputs for user in v.consumers()]
    names = {node.name for node in (*block, *last, *norms)}
    return [node for node in proto.graph.node if node.name in names], block[0].inputs[0].name


def _copy(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, onnx.NodeProto]]:
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    return changed, {node.name: node for node in changed.graph.node}


def _types(proto: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    values = onnx.shape_inference.infer_shapes(proto).graph
    return {one.name: one for one in (*values.value_info, *values.input, *values.output)}


def _type(value: onnx.ValueInfoProto | None) -> int | None:
    return value.type.tensor_type.elem_type if value else None


FOREIGN = {
    onnx.TensorProto.FLOAT: ("Sin", "Identity", "Abs"),
    onnx.TensorProto.INT64: ("Identity", "Abs"),
    onnx.TensorProto.BOOL: ("Not", "Identity"),
}


def mutants(seed: Seed) -> Iterator[Mutant]:
    """Every fault on every edge of one attention."""
    model = ir.from_proto(seed.proto)
    other = {node.name for node in graph.block(model, graph.sites(model)[1 - LAYER])}
    for mutant in _mutants(seed):
        yield dataclasses.replace(mutant, shared=not other.isdisjoint(mutant.what.split()))


def _mutants(seed: Seed) -> Iterator[Mutant]:
    nodes, _ = _layer(seed.proto)
    types = _types(seed.proto)
    constants = {one.name for one in seed.proto.graph.initializer}
    constants |= {n.output[0] for n in seed.proto.graph.node if n.op_type == "Constant"}
    for node in nodes:
        for index, name in enumerate(node.input):
            yield from _on_edge(seed, node, index, _type(types.get(name)), name in constants)
        yield from _changed(seed, node)
        made = types.get(node.output[0])
        if _type(made) == onnx.TensorProto.FLOAT:
            yield from _used_elsewhere(seed, node, made)


def _on_edge(
    seed: Seed, node: onnx.NodeProto, index: int, type_: int | None, constant: bool
) -> Iterator[Mutant]:
    name = node.input[index]
    for operator in ("Identity",) if constant else FOREIGN.get(type_, ()):
        proto, by_name = _copy(seed.proto)
        foreign = helper.make_node(operator, [name], [f"{PLANTED}_out"], PLANTED)
        by_name[node.name].input[index] = foreign.output[0]
        proto.graph.node.insert(list(proto.graph.node).index(by_name[node.name]), foreign)
        what = f"{operator} on input {index} of {node.op_type} {node.name}"
        yield Mutant(seed, what, frozenset({PLANTED, foreign.output[0]}), proto)


def _changed(seed: Seed, node: onnx.NodeProto) -> Iterator[Mutant]:
    names = frozenset({node.name, node.output[0]})
    if node.op_type in ("Add", "Mul"):
        proto, by_name = _copy(seed.proto)
        by_name[node.name].input[:] = list(node.input)[::-1]
        yield Mutant(seed, f"operands of {node.op_type} {node.name} swapped", names, proto)
    if node.op_type == "Transpose":
        perm = list(helper.get_node_attr_value(node, "perm"))
        for a, b in itertools.pairwise(range(len(perm))):
            other = [*perm]
            other[a], other[b] = other[b], other[a]
            proto, by_name = _copy(seed.proto)
            by_name[node.name].ClearField("attribute")
            by_name[node.name].attribute.append(helper.make_attribute("perm", other))
            yield Mutant(seed, f"perm {other} of {node.name}", names, proto)
    if node.op_type == "Softmax":
        proto, by_name = _copy(seed.proto)
        by_name[node.name].attribute[0].i = 2
        yield Mutant(seed, f"axis 2 of {node.name}", names, proto, undoes=True)
    if node.op_type in ("Add", "Mul", "Div", "Where"):
        for index, name in enumerate(node.input):
            proto, by_name = _copy(seed.proto)
            value = _value(proto, name)
            if value is None or value.dtype != np.float32 or value.size > 1:
                continue
            new = f"{PLANTED}_constant"
            proto.graph.initializer.append(numpy_helper.from_array(value * np.float32(0.5), new))
            by_name[node.name].input[index] = new
            yield Mutant(
                seed,
                f"half the constant {index} of {node.op_type} {node.name}",
                names | {new},
                proto,
            )


def _value(proto: onnx.ModelProto, name: str) -> np.ndarray | None:
    for one in proto.graph.initializer:
        if one.name == name:
            return numpy_helper.to_array(one)
    for one in proto.graph.node:
        if one.op_type == "Constant" and one.output[0] == name:
            return numpy_helper.to_array(one.attribute[0].t)
    return None


def _used_elsewhere(
    seed: Seed, node: onnx.NodeProto, made: onnx.ValueInfoProto
) -> Iterator[Mutant]:
    tensor = node.output[0]
    for operator in (None, "Neg"):
        proto, _ = _copy(seed.proto)
        if operator:
            proto.graph.node.append(
                helper.make_node(operator, [tensor], [f"{PLANTED}_out"], PLANTED)
            )
        result = f"{PLANTED}_out" if operator else tensor
        proto.graph.output.append(made)
        proto.graph.output[-1].name = result
        planted = frozenset({node.name, tensor, PLANTED, f"{PLANTED}_out"})
        how = f"by {operator}" if operator else "as an output"
        yield Mutant(seed, f"{node.op_type} {node.name} used elsewhere, {how}", planted, proto)


# ── What became of it ───────────────────────────────────────────────────────────────────────────


def attentions(proto: onnx.ModelProto) -> int:
    return sum(node.op_type == "Attention" for node in proto.graph.node)


def optimised(path: Path, seed: Seed, opt_level: int) -> onnx.ModelProto:
    with quiet():
        made = optimizer.optimize_model(
            str(path), seed.model_type, HEADS, WIDTH, opt_level=opt_level
        )
    return made.model


def outputs(path: Path, inputs: Path) -> list[np.ndarray]:
    return files.session(path, optimise=False).run(None, dict(np.load(inputs)))


@contextlib.contextmanager
def watched() -> Iterator[list[onnx.ModelProto | None]]:
    """What each run of the optimizer in this context makes; None where it raises."""
    plain, rewrite, results = optimizer.optimize_model, rewriter.rewrite, []

    def rewritten(model: ir.Model, *args: Any) -> Any:
        results.append(None)
        made = rewrite(model, *args)
        results[-1] = ir.to_proto(made)
        return made

    def optimize_model(*args: Any, **options: Any) -> Any:
        results.append(None)
        made = plain(*args, **options)
        results[-1] = onnx.ModelProto()
        results[-1].CopyFrom(made.model)  # whoever asked may change it
        return made

    optimizer.optimize_model, rewriter.rewrite = optimize_model, rewritten
    try:
        yield results
    finally:
        optimizer.optimize_model, rewriter.rewrite = plain, rewrite


def expected(path: Path, mutant: Mutant) -> list[np.ndarray] | None:
    """What the mutant gives, which is written to `path`; None of a graph that does not run, or
    gives no numbers."""
    onnx.save(mutant.proto, path)
    try:
        onnx.checker.check_model(mutant.proto, full_check=True)
        right = outputs(path, mutant.seed.inputs)
    except Exception:  # ONNX Runtime's own types: such a fault is none that a fusion meets
        return None
    return right if all(np.isfinite(array).all() for array in right) else None


def outcome(
    made: onnx.ModelProto | None, right: list[np.ndarray], mutant: Mutant, path: Path
) -> str:
    """ "stops", "wrong", "raises" or "holds": what the optimizer has `made`, put at `path`."""
    if made is None:
        return "raises"
    if attentions(made) < 2:
        return "stops"
    onnx.save(made, path)
    try:
        given = outputs(path, mutant.seed.inputs)
    except Exception:  # it fused into what does not run
        return "wrong"
    if len(given) != len(right):
        return "wrong"
    tolerance = 2e-2 if right[0].dtype == np.float16 else 1e-4
    same = all(
        mine.shape == its.shape and np.allclose(mine, its, 0, tolerance, equal_nan=True)
        for mine, its in zip(right, given, strict=True)
    )
    return "holds" if same else "wrong"


def _words(answer: Any) -> set[str]:
    return set(re.findall(r"[\w./:-]+", json.dumps(answer)))


def miss(mutant: Mutant, came: str, answer: dict[str, Any]) -> str | None:
    """What `answer`, of ``explain --parity --json``, does not tell of a mutant; None if it does."""
    reasons, sites = answer["reasons"], answer["sites"]
    if came == "raises":
        told = any(one["kind"] == "raised" for one in reasons)
        return None if told else "not told that it raised"
    if came == "stops" and mutant.undoes and len(sites) == 1:
        return None if sites[0]["fused"] else "the other layer is told not to be fused"
    if came == "stops":
        mine = sites[LAYER] if len(sites) > 1 else sites[0]
        if mine["fused"]:
            return "the changed layer is told to be fused"
        reason = reasons[mine["reason"]]
        said = [reason[key] for key in ("at", "found", "check")]
        if reason["check"] and len(_words(reason["check"]["operands"])) > 150:
            return "too much is named"
        return None if mutant.planted & _words(said) else f"not named in {said}"
    wrong = [site["wrong"] for site in sites]
    if came == "wrong":
        told = any(wrong[LAYER:]) and wrong[1 - LAYER] <= mutant.shared
        return None if told else f"wrong sites: {wrong}"
    return f"told to be wrong: {wrong}" if any(wrong) else None
