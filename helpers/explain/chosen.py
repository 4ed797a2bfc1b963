"""Whose fusion: one of ONNX Runtime's MODEL_TYPES, or a class that a reader wrote."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnx.external_data_helper import (
    load_external_data_for_model,
    load_external_data_for_tensor,
)

from helpers import files, graph
from helpers.graph import external


@contextlib.contextmanager
def registered(
    model_type: str | None, fusion: str | type | None
) -> Iterator[tuple[str, type, tuple[type, ...]]]:
    """The key of MODEL_TYPES to run, its class, and the fusions to watch besides those known."""
    from onnxruntime.transformers import optimizer

    types = optimizer.MODEL_TYPES
    if fusion is None:
        if model_type not in types:
            listed = ", ".join(sorted(types))
            raise files.BadInput(f"model type {model_type}: expected one of {listed}")
        yield model_type, types[model_type][0], ()
        return
    class_ = loaded(fusion) if isinstance(fusion, str) else fusion
    bases = {base.__name__ for base in getattr(class_, "__mro__", ())[1:]}
    if "OnnxModel" in bases:
        optimizer_class, also = class_, ()
    elif "Fusion" in bases:
        optimizer_class, also = _in_bert(class_, types["bert"][0]), (class_,)
    else:
        raise files.BadInput(
            f"{fusion}: expected a subclass of onnxruntime.transformers' Fusion or OnnxModel,"
            f" found {class_!r}; name another"
        )
    key = f"{class_.__name__} {id(class_)}"
    types[key] = (optimizer_class, "pytorch", types["bert"][2])
    try:
        yield key, optimizer_class, also
    finally:
        del types[key]


def _in_bert(fusion: type, bert: type) -> type:
    """BERT's optimizer with `fusion` in the place of its attention fusion."""

    def fuse_attention(self: Any) -> None:
        given = {
            "model": self,
            "hidden_size": self.hidden_size,
            "num_heads": self.num_heads,
            "attention_mask": self.attention_mask,
        }
        wanted = inspect.signature(fusion).parameters
        fusion(**{name: value for name, value in given.items() if name in wanted}).apply()

    return type(fusion.__name__, (bert,), {"fuse_attention": fuse_attention})


@contextlib.contextmanager
def following_links() -> Iterator[None]:
    """Have the optimizer read models whose data files are links, as in a hub's cache.

    onnx follows no link; those of `external.read` have been followed.
    """
    from onnxruntime.transformers import optimizer

    load = optimizer.load_model

    def through(path: str, *args: Any, **kwargs: Any) -> onnx.ModelProto:
        model, beside = external.read(path)
        if kwargs.get("load_external_data", True):
            load_external_data_for_model(model, str(beside))
        return model

    optimizer.load_model = through
    try:
        yield
    finally:
        optimizer.load_model = load


@contextlib.contextmanager
def without_large_weights() -> Iterator[None]:
    """Have the optimizer leave large weights in the files that they are in.

    Its fusions need their shapes alone, and a model over 2 GB takes five times as much of memory.
    Where one is read all the same, zeros are given, as its own ``NumpyHelper`` does on request.
    """
    from onnxruntime.transformers import optimizer

    load, to_array = optimizer.load_model, numpy_helper.to_array

    def light(path: str, *args: Any, **kwargs: Any) -> onnx.ModelProto:
        model, beside = external.read(path)
        if kwargs.get("load_external_data", True):
            for tensor in external.tensors(model):
                if ir.from_proto(tensor).nbytes <= graph.LEFT_OUT_ABOVE:
                    load_external_data_for_tensor(tensor, str(beside))
                    tensor.data_location = onnx.TensorProto.DEFAULT
        return model

    def zeros(tensor: onnx.TensorProto, *args: Any, **kwargs: Any) -> np.ndarray:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return np.zeros(tensor.dims, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        return to_array(tensor, *args, **kwargs)

    optimizer.load_model, numpy_helper.to_array = light, zeros
    try:
        yield
    finally:
        optimizer.load_model, numpy_helper.to_array = load, to_array


def loaded(named: str) -> Any:
    """What "FILE.py:NAME" names. The code of the file is run."""
    file, _, name = named.rpartition(":")  # the last one: a path may begin with C:
    path = Path(file)
    if Path(named).is_file():
        raise files.BadInput(f"{named}: expected FILE.py:CLASS, found no class; add :CLASS")
    if not file or not path.is_file():
        raise files.BadInput(
            f"{named}: expected FILE.py:CLASS, found no file {file or named}; check the path"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise files.BadInput(f"{named}: expected FILE.py:CLASS, found no Python file; name one")
    module = importlib.util.module_from_spec(spec)
    import onnxruntime.transformers.optimizer  # noqa: F401  its folder is on sys.path from then on

    sys.path.insert(0, str(path.resolve().parent))  # for what it imports, as if it were run
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise files.BadInput(
            f"{path}: expected a module that can be imported, found that it imports {error.name},"
            " which is not installed; install the package that has it, or mend the import"
        ) from None
    except Exception as error:  # the reader's own code
        raise files.BadInput(
            f"{path}: expected a module that can be imported, found {type(error).__name__}:"
            f" {error}; mend it"
        ) from None
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not hasattr(module, name):
        own = [key for key, member in vars(module).items() if inspect.isclass(member)]
        raise files.BadInput(
            f"{path}: expected a class {name}, found {', '.join(own) or 'none'}; name one of them"
        )
    return getattr(module, name)
