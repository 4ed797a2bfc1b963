"""What we rely on of others that they may change at any time: an upgrade should fail here first.

`helpers.explain.onnxscript_parts` has all of it that is onnxscript's, and
`helpers.explain.onnxruntime_parts` all that is of ONNX Runtime's optimizer.
"""

import importlib
import inspect
from pathlib import Path

import onnxruntime
import pytest
from onnx import numpy_helper
from onnx_ir.passes import common
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference
from onnxruntime.transformers import (
    fusion_attention,
    fusion_base,
    fusion_utils,
    onnx_model,
    optimizer,
    shape_infer_helper,
)
from onnxscript import rewriter
from onnxscript.rewriter import _basics, _matcher, _pattern_ir, _rewrite_rule, ort_fusions

from helpers.explain import onnxruntime_parts, onnxscript_parts, rules


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
    wanted = {"child_op_types", "edges", "matched_children", "children_nodes", "node"}
    assert wanted <= names(model.match_child_path)
    assert callable(model.output_name_to_node)


def test_the_methods_that_are_followed_and_wrapped():
    classes = onnxruntime_parts.classes([onnx_model.OnnxModel, fusion_base.Fusion])
    model = onnx_model.OnnxModel
    followed = onnxruntime_parts.matching(classes, print, repr, str)
    methods = (model.match_parent_path, model.match_parent, model.match_child_path)
    assert [followed[method.__code__] for method in methods] == [print, repr, str]
    wrapped = onnxruntime_parts.wrapped(classes, print, repr)
    assert (fusion_base.Fusion, "apply", print) in wrapped
    assert (model, "infer_runtime_shape", repr) in wrapped


def test_the_modules_of_the_optimizer_have_two_names():
    onnxruntime_parts.on_path()
    for module, name in (("onnx_model", "OnnxModel"), ("fusion_base", "Fusion")):
        bare = getattr(importlib.import_module(module), name)
        own = getattr(importlib.import_module(f"onnxruntime.transformers.{module}"), name)
        assert {bare, own} <= {*onnxruntime_parts.classes([])}


def test_the_attributes_of_a_fusion():
    fusion = fusion_base.Fusion(None, "Fused", "Softmax")
    assert (onnxruntime_parts.makes(fusion), onnxruntime_parts.anchors(fusion)) == (
        "Fused",
        ["Softmax"],
    )
    assert fusion.nodes_to_add == fusion.nodes_to_remove == []
    assert onnxruntime_parts.changes(fusion) == (0, 0)
    assert callable(fusion.apply)
    assert "self.model: OnnxModel = model" in inspect.getsource(fusion_base.Fusion)
    assert "self.model: ModelProto = model" in inspect.getsource(onnx_model.OnnxModel)


def test_the_files_that_fusions_are_in():
    assert Path(fusion_base.__file__).name == onnxruntime_parts.APPLYING
    assert "self.fuse(node, " in inspect.getsource(fusion_base.Fusion.apply)
    assert Path(fusion_utils.__file__).name == "fusion_utils.py"
    assert onnxruntime_parts.is_of_fusions(fusion_base.Fusion.apply.__code__)
    assert not onnxruntime_parts.is_of_fusions(fusion_utils.NumpyHelper.to_array.__code__)


def test_the_functions_that_tell_what_is_asked():
    asked = (
        onnxruntime_parts.ASK_SHAPES
        | onnxruntime_parts.ASK_CONSTANTS
        | onnxruntime_parts.ASK_READERS
    )
    sources = "".join(
        inspect.getsource(module)
        for module in (fusion_attention, fusion_utils, onnx_model, shape_infer_helper)
    )
    assert [name for name in asked if f"def {name}(" not in sources] == []


def test_the_optimizers_own_shape_inference():
    source = inspect.getsource(onnx_model.OnnxModel)
    assert "self.enable_shape_infer" in source
    assert "self.shape_infer_helper = " in source
    source = inspect.getsource(SymbolicShapeInference)
    assert all(f"self.{name} = " in source for name in ("known_vi_", "out_mp_", "sympy_data_"))


def test_what_is_put_in_place_of_the_optimizers_own():
    assert all(len(entry) == 3 for entry in optimizer.MODEL_TYPES.values())
    assert "bert" in optimizer.MODEL_TYPES
    bert = optimizer.MODEL_TYPES["bert"][0]
    assert "fuse_attention" in vars(bert)
    source = inspect.getsource(bert)
    assert all(f"self.{name}" in source for name in ("hidden_size", "num_heads", "attention_mask"))
    assert callable(optimizer.load_model)
    assert "load_external_data=" in inspect.getsource(optimizer)
    assert "numpy_helper.to_array(" in inspect.getsource(fusion_utils.NumpyHelper)
    assert callable(numpy_helper.to_array)
    assert callable(onnxruntime.set_default_logger_severity)
    assert callable(common.InlinePass)


@pytest.mark.parametrize("zeros", [False, True])
def test_the_optimizers_own_is_back_in_its_place(zeros):
    before = (optimizer.load_model, numpy_helper.to_array, dict(optimizer.MODEL_TYPES))
    with (
        onnxruntime_parts.loading_by(print, zeros=zeros),
        onnxruntime_parts.registered(onnx_model.OnnxModel) as model_type,
    ):
        assert optimizer.load_model is not before[0]
        assert (numpy_helper.to_array is not before[1]) is zeros
        assert onnxruntime_parts.optimizers()[model_type] is onnx_model.OnnxModel
    assert (optimizer.load_model, numpy_helper.to_array, optimizer.MODEL_TYPES) == before
