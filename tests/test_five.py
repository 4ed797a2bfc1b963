"""From 0 fused to a file that is right, by the commands that a reader types."""

import json
from pathlib import Path

import pytest
import torch
from proof_models import export_cached

from helpers import export
from helpers.__main__ import main
from helpers.models.small import _AUDIO, ARCHITECTURES, Small, _audio, _image
from helpers.quiet import quiet

SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "image_size": 32, "patch_size": 2}
CONFORMER = {"position_embeddings_type": "relative", "conv_depthwise_kernel_size": 5}
GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 120}
WIDTH, HEADS = 32, 4


class PackedViT(torch.nn.Module):
    """A Vision Transformer's layers as timm writes them: one product makes all three."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(3))
        self.packed = torch.nn.ModuleList(torch.nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.output = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> dict:
        batch, length, _ = x.shape
        for norm, packed, output in zip(self.norms, self.packed, self.output, strict=False):
            heads = packed(norm(x)).reshape(batch, length, 3, HEADS, WIDTH // HEADS)
            q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
            weights = (q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1)
            x = x + output((weights @ v).transpose(1, 2).reshape(batch, length, WIDTH))
        return {"y": self.norms[-1](x)}


def wavlm(path: Path) -> None:
    small = ARCHITECTURES["WavLM"]
    export.export(small.make("eager"), small.inputs(), path, "torchscript")


def swin_v2(path: Path) -> None:
    small = Small("Swinv2Model", SWIN | {"window_size": 4}, _image, 4)
    export.export(small.make("eager"), small.inputs(), path, "torchscript")


def conformer(path: Path) -> None:
    small = Small("Wav2Vec2ConformerModel", _AUDIO | CONFORMER, _audio)
    export.export(small.make("eager"), small.inputs(), path, "torchscript")


def gpt2_decoder(path: Path) -> None:
    """With keys and values of earlier steps as inputs."""
    model = Small("GPT2LMHeadModel", GPT2, dict).make("eager")
    export_cached(model, path, "torchscript", past=True)


def packed_vit(path: Path) -> None:
    export.export(PackedViT().eval(), {"x": torch.randn(2, 9, WIDTH)}, path, "torchscript")


MODELS = {  # what is exported, its sites, and the model type that a reader tries first
    wavlm: (2, "bert"),
    swin_v2: (4, "swin"),
    conformer: (2, "conformer"),
    gpt2_decoder: (2, "gpt2"),
    packed_vit: (2, "vit"),
}


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_from_nothing_to_a_fused_file(build, tmp_path, capsys):
    path, rules, out = (str(tmp_path / name) for name in ("in.onnx", "rules.py", "out.onnx"))
    sites, model_type = MODELS[build]
    torch.manual_seed(0)
    with quiet():
        build(Path(path))

    def run(*arguments: str) -> str:
        assert main([*arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    inspected = json.loads(run("inspect", path, "--json"))
    assert [site["fused"] for site in inspected["sites"]] == [False] * sites
    told = json.loads(
        run("explain", path, "--model-type", model_type, "--opt-level", "0", "--json")
    )
    assert told["reasons"]
    assert not any(site["fused"] for site in told["sites"])
    text = run("explain", path, "--suggest")
    assert "left to write" not in text
    Path(rules).write_text(text)
    name = text.rsplit("FILE.py:", 1)[1].split()[0]
    run("explain", path, "--rules", f"{rules}:{name}", "--write", out)
    run("compare", path, out)
    fused = json.loads(run("inspect", out, "--json"))
    assert fused["operators"]["Attention"] == sites
