"""What we rely on of others that they may change at any time: an upgrade should fail here first.

Of onnxscript, `helpers.explain.onnxscript_parts` has all of it. Of ONNX Runtime's optimizer,
`helpers.explain.optimizer_watch` reads local variables and attributes by their names, and
`helpers.explain.chosen` puts a reader's fusion, and its own way to load a model, in their places.
"""

import inspect

import pytest
from onnx import numpy_helper
from onnx_ir.passes import common
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
from onnxruntime.transformers import fusion_base, fusion_utils, onnx_model, optimizer
from onnxscript import rewriter
from onnxscript.rewriter import _basics, _matcher, _pattern_ir, _rewrite_rule, ort_fusions

from helpers.explain import onnxscript_parts, rules


@pytest.mark.parametrize(
    "name",
    [
        *("AttrConstantPattern", "BacktrackingOr", "Constant", "NodePattern", "OpIdDispatchOr"),
        "ValuePattern",
    ],
)
def test_the_classes_of_patterns(name):
    assert inspect.isclass(getattr(_pattern_ir, name))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_match_node", ["self", "pattern_node", "node"]),
        ("_match_value", ["self", "pattern_value", "value"]),
        ("_get_output_values", ["self"]),
        ("_init_match", ["self", "verbose"]),
    ],
)
def test_the_methods_of_the_matcher(method, parameters):
    function = getattr(_matcher.SimplePatternMatcher, method)
    assert list(inspect.signature(function).parameters) == parameters


def test_what_a_match_and_a_pattern_hold():
    (rule, *_) = ort_fusions.sdpa.sdpa_rules.rules
    assert onnxscript_parts.instance(rule) is not None
    assert onnxscript_parts.code_of(rule).co_name == "pattern"
    assert rule._target_pattern.outputs
    match = _basics.MatchResult()
    assert onnxscript_parts.matched_nodes(match) == []
    assert callable(_rewrite_rule.RewriteRule.try_rewrite)


def test_the_functions_that_call_a_rule():
    source = inspect.getsource(_rewrite_rule)
    assert all(f"def {name}(" in source for name in onnxscript_parts.CALLERS)
    modules = [getattr(rewriter, name).__name__ for name in ("_basics", "_rewrite_rule")]
    assert all(name.startswith(f"{rewriter.__name__}._") for name in modules)


def test_the_modules_whose_rules_make_attention():
    for name in rules._ATTENTION:
        assert hasattr(ort_fusions, name.rpartition(".")[2]), name


def names(function) -> set[str]:
    return set(function.__code__.co_varnames)


def test_the_variables_of_the_optimizers_matching():
    model = onnx_model.OnnxModel
    assert {"parent_input_index", "parent_op_types", "node"} <= names(model.match_parent_path)
    wanted = {"parent_op_type", "input_index", "output_name_to_node", "node", "self"}
    assert wanted <= names(model.match_parent)
    wanted = {"child_op_types", "edges", "matched_children", "children_nodes"}
    assert wanted <= names(model.match_child_path)
    source = inspect.getsource(model)
    assert "self.enable_shape_infer" in source
    assert "self.shape_infer_helper = " in source
    assert callable(model.infer_runtime_shape)


def test_the_attributes_of_a_fusion():
    fusion = fusion_base.Fusion(None, "Fused", "Softmax")
    assert (fusion.fused_op_type, fusion.search_op_types) == ("Fused", ["Softmax"])
    assert fusion.nodes_to_add == fusion.nodes_to_remove == []
    assert callable(fusion.apply)


def test_what_symbolic_shape_inference_knows():
    source = inspect.getsource(SymbolicShapeInference)
    assert all(f"self.{name} = " in source for name in ("known_vi_", "out_mp_", "sympy_data_"))


def test_what_is_put_in_place_of_the_optimizers_own():
    assert all(len(entry) == 3 for entry in optimizer.MODEL_TYPES.values())
    assert "bert" in optimizer.MODEL_TYPES
    assert "fuse_attention" in vars(optimizer.MODEL_TYPES["bert"][0])
    assert callable(optimizer.load_model)
    assert "numpy_helper.to_array(" in inspect.getsource(fusion_utils.NumpyHelper)
    assert callable(numpy_helper.to_array)
    assert callable(common.InlinePass)
