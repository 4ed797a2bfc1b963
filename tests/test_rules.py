"""`rules`: why a rewrite rule did not fuse a site. Mutants of graphs that onnxscript does fuse."""

import re
import secrets
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from helpers import graph
from helpers.export import export
from helpers.rules import explain

FOREIGN = ("Neg", "Sin", "Abs", "Tanh")


def bert():
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16,
    )  # fmt: skip
    ids = torch.arange(5, 15).reshape(2, 5)
    return transformers.BertModel(config), {"input_ids": ids, "attention_mask": ids.clamp(0, 1)}


def vit():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    return transformers.ViTModel(config), {"pixel_values": torch.zeros(2, 3, 16, 16)}


def whisper():
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        num_mel_bins=8, d_model=32, encoder_layers=2, encoder_attention_heads=2,
        encoder_ffn_dim=32, max_source_positions=10,
    )  # fmt: skip
    return WhisperEncoder(config), {"input_features": torch.zeros(2, 8, 20)}


def t5():
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
        relative_attention_num_buckets=8, use_cache=False,
    )  # fmt: skip
    ids = torch.arange(5, 15).reshape(2, 5)
    model = transformers.T5EncoderModel(config)
    return model, {"input_ids": ids, "attention_mask": ids.clamp(0, 1)}


MODELS = {build.__name__: build for build in (bert, vit, whisper, t5)}


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """The path of each model's graph, all of whose sites onnxscript fuses."""
    folder, paths = tmp_path_factory.mktemp("rules"), {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model, inputs = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        paths[name] = export(model, inputs, folder / f"{name}.onnx", "dynamo").path
    return paths


def planted(model: ir.Model, reader: ir.Node, index: int, operator: str) -> str:
    """Put a node on the edge that ends at input `index` of `reader`; returns its name."""
    name, value = f"n{secrets.token_hex(6)}", reader.inputs[index]
    node = ir.Node("", operator, [value], name=name)
    node.outputs[0].name = f"t{secrets.token_hex(6)}"
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    reader.graph.insert_before(reader, node)
    reader.replace_input_with(index, node.outputs[0])
    return name


def edges(model: ir.Model, site: graph.Site) -> list[tuple[ir.Node, int]]:
    """The edges of floating-point activations from the heads' Reshapes to the merging one."""
    known = graph.from_input(model)
    inner = [node for node in graph.block(model, site, side=0) if node.op_type != "Shape"]
    return [
        (node, index)
        for node in inner
        for index, value in enumerate(node.inputs)
        if value in known and value.dtype in (None, ir.DataType.FLOAT)
    ]


class Mutant:
    """One change of the attention of one site: a description, and the names that give it away."""

    def __init__(self, path, layer: int):
        self.model = ir.load(path)
        self.sites = graph.sites(self.model)
        self.layer, self.site = layer, self.sites[layer]
        self.where, self.names = "", set()

    def node(self, operator: str, above: ir.Node, index: int) -> ir.Node:
        made = above.inputs[index].producer()
        assert made.op_type == operator, made
        return made

    def plant(self, number: int) -> None:
        reader, index = edges(self.model, self.site)[number]
        operator = FOREIGN[number % len(FOREIGN)]
        self.where = f"{operator} on input {index} of {reader.op_type} {reader.name}"
        self.names = {planted(self.model, reader, index, operator)}

    def swap(self, node: ir.Node) -> None:
        first, second = node.inputs
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)
        self.where, self.names = f"operands of {node.op_type} {node.name} swapped", {node.name}

    def permute(self, node: ir.Node, perm: list[int]) -> None:
        node.attributes["perm"] = ir.AttrInt64s("perm", perm)
        self.where, self.names = f"perm of {node.name} is {perm}", {node.name}

    def constant(self, node: ir.Node, index: int, array: np.ndarray) -> None:
        name = f"c{secrets.token_hex(6)}"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(array.dtype)), array.shape
        self.model.graph.register_initializer(value)
        node.replace_input_with(index, value)
        self.where = f"input {index} of {node.op_type} {node.name} is {array.tolist()}"
        self.names = {name, node.name}

    def use(self, node: ir.Node) -> None:
        """Another node reads what `node` computes, and the graph gives that out."""
        output = ir.Node("", "Neg", node.outputs, name=f"n{secrets.token_hex(6)}")
        output.outputs[0].name = f"t{secrets.token_hex(6)}"
        output.outputs[0].type, output.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        self.model.graph.append(output)
        self.model.graph.outputs.append(output.outputs[0])
        self.where, self.names = f"{node.op_type} {node.name} used elsewhere", {output.name}


def mutants(path, layer: int):
    """All the mutants of the attention at one site."""
    count = len(edges(*(lambda m: (m.model, m.site))(Mutant(path, layer))))
    for number in range(count):
        mutant = Mutant(path, layer)
        mutant.plant(number)
        yield mutant


def named(reason, names: set[str]) -> bool:
    """Whether the reason says one of `names` as what it found, where, or as an operand."""
    attempt, check = reason.attempt, reason.check
    texts = [one.name for one in (*attempt.found, attempt.at)] if attempt else []
    texts += check.operands.values() if check else []
    return any(names & set(re.split(r"[\s(),\[\]]+", text)) for text in texts)
