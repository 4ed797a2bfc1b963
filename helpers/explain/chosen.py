"""Whose fusion: one of ONNX Runtime's MODEL_TYPES, or a class that a reader wrote."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers import files
from helpers.explain import onnxruntime_parts as parts


@contextlib.contextmanager
def registered(
    model_type: str | None, fusion: str | type | None
) -> Iterator[tuple[str, type, tuple[type, ...]]]:
    """The model type to run, its optimizer's class, and what fusions to watch besides its own."""
    if fusion is None:
        optimizers = parts.optimizers()
        if model_type not in optimizers:
            listed = ", ".join(sorted(optimizers))
            raise files.BadInput(f"model type {model_type}: expected one of {listed}")
        yield model_type, optimizers[model_type], ()
        return
    class_ = loaded(fusion) if isinstance(fusion, str) else fusion
    if parts.is_optimizer(class_):
        optimizer, also = class_, ()
    elif parts.is_fusion(class_):
        optimizer, also = parts.in_bert(class_), (class_,)
    else:
        raise files.BadInput(
            f"{fusion}: expected a subclass of onnxruntime.transformers' Fusion or OnnxModel,"
            f" found {class_!r}; name another"
        )
    with parts.registered(optimizer) as own_type:
        yield own_type, optimizer, also


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
    parts.on_path()
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
