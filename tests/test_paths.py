"""The path that is there: `match_parent_path` follows it, and it leads to the site's product."""

import pytest
from paths import astray, matched

from helpers import export, graph
from helpers.explain import explain
from helpers.figures.fused_sites.coverage import MODEL_TYPES, ROUTES
from helpers.models.small import ARCHITECTURES
from helpers.quiet import quiet

SAMPLE = [
    ("ViT", "dynamo"),
    ("CLIP text", "TorchScript, eager"),
    ("GPT-2", "dynamo"),
]
ALL = [(name, route) for name in ARCHITECTURES for route in ROUTES]


def check(architecture: str, route: str, folder) -> int:
    """Assert it of each model type; the number of paths that there were."""
    small, (way, attention) = ARCHITECTURES[architecture], ROUTES[route]
    path, paths = folder / "in.onnx", 0
    with quiet():
        export.export(small.make(attention), small.inputs(), path, way)
    model = graph.load(path, weights=False)
    for model_type in (*MODEL_TYPES, "bert_tf"):
        with matched() as concluded:
            answer = explain(path, model_type, num_heads=4, hidden_size=64, opt_level=0)
        misses = astray(answer, model, concluded)
        assert not misses, f"{model_type}:\n" + "\n".join(misses)
        paths += sum(reason.actual is not None for reason in answer.reasons)
    return paths


@pytest.mark.parametrize(("architecture", "route"), SAMPLE)
def test_paths_lead_along_the_break(architecture, route, tmp_path):
    assert check(architecture, route, tmp_path) >= 3


@pytest.mark.every
@pytest.mark.parametrize(("architecture", "route"), ALL)
def test_all_paths_lead_along_the_break(architecture, route, tmp_path):
    check(architecture, route, tmp_path)
