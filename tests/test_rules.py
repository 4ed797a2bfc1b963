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


class Mutant:
    """A graph with one edge of the attention of one site broken: where, and by which names it shows."""

    def __init__(self, path, layer: int):
        self.model = ir.load(path)
        self.site = graph.sites(self.model)[layer]
        self.known = graph.from_input(self.model)
        self.where, self.names = "", set()
        self.context, self.softmax, self.scores = (
            self.site.context, self.site.node, self.site.scores,
        )  # fmt: skip

    def above(self, node: ir.Node, index: int, operator: str) -> ir.Node | None:
        made = node.inputs[index].producer()
        return made if made is not None and made.op_type == operator else None

    @property
    def keys(self) -> list[ir.Node]:
        """From the product of the scores up to the Transpose of the keys' heads."""
        found, node = [], self.scores.inputs[1].producer()
        while node.op_type in ("Mul", "Reshape", "Transpose") and len(found) < 5:
            found.append(node)
            node = node.inputs[0].producer()
        return found

    @property
    def core(self) -> list[ir.Node]:
        between, node = [], self.softmax.inputs[0].producer()
        while node is not self.scores:
            between.append(node)
            node = node.inputs[0].producer()
        return [self.context, self.softmax, *between, self.scores, *self.keys]

    def plant(self, node: ir.Node, index: int, operator: str) -> None:
        name, value = secret(), node.inputs[index]
        added = ir.Node("", operator, [value], name=name)
        added.outputs[0].name = secret()
        added.outputs[0].type, added.outputs[0].shape = value.type, value.shape
        node.graph.insert_before(node, added)
        node.replace_input_with(index, added.outputs[0])
        self.where, self.names = f"{operator} on input {index} of {shown(node)}", {name}

    def swap(self, node: ir.Node) -> None:
        first, second = node.inputs
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)
        self.where, self.names = f"operands of {shown(node)} swapped", {node.name}

    def permute(self, node: ir.Node, perm: list[int]) -> None:
        node.attributes["perm"] = ir.AttrInt64s("perm", perm)
        self.where, self.names = f"perm of {shown(node)} is {perm}", {node.name}

    def constant(self, node: ir.Node, index: int, array: np.ndarray) -> None:
        name = secret()
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self.model.graph.register_initializer(value)
        node.replace_input_with(index, value)
        self.where = f"input {index} of {shown(node)} is {array.tolist()}"
        self.names = {name, node.name}

    def use(self, node: ir.Node) -> None:
        """The graph also gives out what another node makes of what `node` computes."""
        reader = ir.Node("", "Neg", node.outputs, name=secret())
        output = reader.outputs[0]
        output.name, output.type, output.shape = secret(), *(
            (node.outputs[0].type, node.outputs[0].shape)
        )
        self.model.graph.append(reader)
        self.model.graph.outputs.append(output)
        self.where, self.names = f"{shown(node)} used elsewhere", {reader.name}


def secret() -> str:
    return f"x{secrets.token_hex(6)}"


def shown(node: ir.Node) -> str:
    return f"{node.op_type} {node.name}"


def changes(example: Mutant) -> list:
    """What to do to a graph like `example`: functions of a `Mutant`."""
    made = []
    for i, node in enumerate(example.core):
        operator = "Tanh" if node in (example.context, example.softmax) else FOREIGN[i % 4]
        operator = operator if node not in example.core[2:-1] or i % 2 else "Tanh"
        sides = [0, 1] if node is example.scores else [0]
        made += [lambda m, i=i, k=k, o=operator: m.plant(m.core[i], k, o) for k in sides]
        if i:
            made.append(lambda m, i=i: m.use(m.core[i]))
        if node.op_type in ("Add", "Mul") or node is example.scores:
            made.append(lambda m, i=i: m.swap(m.core[i]))
        if node.op_type == "Transpose":
            rank = len(node.attributes["perm"].value)
            for perm in ([1, 0, 2] if rank == 3 else [1, 0, 2, 3],):
                made.append(lambda m, i=i, perm=perm: m.permute(m.core[i], perm))
        if node.op_type == "Mul":
            vector = np.full(16, 0.5, np.float32)
            made.append(lambda m, i=i, vector=vector: m.constant(m.core[i], 1, vector))
    values = example.context.inputs[1].producer()
    if values.op_type == "Transpose":
        made.append(lambda m: m.permute(m.context.inputs[1].producer(), [2, 0, 1, 3]))
    made.append(lambda m: m.plant(m.context, 1, "Neg"))  # fuses all the same, as it should
    return made


def named(reason, names: set[str]) -> bool:
    """Whether the reason says one of `names` as what it found, where, or as an operand."""
    attempt, check = reason.attempt, reason.check
    texts = [one.name for one in (*attempt.found, attempt.at)] if attempt else []
    texts += check.operands.values() if check else []
    return any(names & set(re.split(r"[\s(),\[\]]+", text)) for text in texts)


def verdict(found, site: graph.Site):
    return next((one for one in found.sites if one.name == site.name), None)
