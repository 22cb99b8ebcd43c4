"""ONNX, by torch.onnx, and run by ONNX Runtime before it is called done."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mealfast.downstream.agreement_check import compare, sample
from mealfast.downstream.plain import plain_model
from mealfast.downstream.trained import Trained, data_config
from mealfast.errors import UsageError
from mealfast.machine.files import brief, reason
from mealfast.machine.terminal import say

FILE = "model.onnx"
NEEDS = ("onnx", "onnxscript", "onnxruntime")
USAGE = """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("DIR/model.onnx")
(logits,) = session.run(None, {"images": images})  # IMAGES
session.get_modelmeta().custom_metadata_map["mealfast"]  # JSON: mean, std, size, crop and names of the classes
```"""
_LARGEST = 1 << 30  # bytes of weights inside the file, which protobuf ends at 2 GiB; above, they lie beside it


def check_installed() -> None:
    """Raises UsageError, with what to install, where one of the packages is missing."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        raise UsageError(f"--to onnx needs {', '.join(missing)}: pip install 'mealfast[export]'")


def write(trained: Trained, folder: Path, *, with_preprocessing: bool = False) -> str:
    """Writes model.onnx: input `images`, normalised float32 [N, 3, S, S], or uint8 [N, S, S, 3] with the preprocessing
    inside; output `logits` float32 [N, C]; any N. Returns what was found. Raises UsageError where torch cannot."""
    check_installed()
    plain_model(trained)
    model: nn.Module = trained.model if with_preprocessing else trained.model.model
    example = sample(trained.model, trained.views.size, 2)[0 if with_preprocessing else 1]
    say(
        "torch.onnx reads the model, then ONNX Runtime runs it: a quarter of a minute for a ResNet-50, minutes for more"
    )
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                model, (example,), input_names=["images"], output_names=["logits"], dynamo=True, verbose=False,
                dynamic_shapes=({0: torch.export.Dim("N", min=1)},),
            )  # fmt: skip
        except Exception as error:
            raise UsageError(f"{brief(trained.name)}: PyTorch cannot export it to ONNX: {_cause(error)}") from error
        program.model.metadata_props["mealfast"] = _metadata(trained, with_preprocessing)
        size = sum(tensor.nbytes for tensor in model.state_dict().values())
        program.save(str(folder / FILE), external_data=size > _LARGEST)
    found = compare(
        trained.model, trained.views.size, _runner(folder / FILE), with_preprocessing=with_preprocessing,
        what=f"{brief(trained.name)}: as ONNX it",
    )  # fmt: skip
    return f"ONNX Runtime: {found}"


def _runner(path: Path) -> Any:
    """The file as a function of tensors."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(None, {"images": np.ascontiguousarray(images.numpy())})
        return torch.from_numpy(logits)

    return run


def _metadata(trained: Trained, with_preprocessing: bool) -> str:
    facts: dict[str, Any] = {"architecture": trained.model.architecture, **data_config(trained)}
    facts["input"] = "uint8 NHWC" if with_preprocessing else "normalised float32 NCHW"
    if trained.model.classes is not None:
        facts["classes"] = list(trained.model.classes)
    return json.dumps(facts)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own remarks, of its optional parts and its next versions, are nothing that a user can mend."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # its many loggers have levels of their own
    try:
        # Of a failure torch prints the whole graph.
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _cause(error: BaseException) -> str:
    """What lies below the exporter's own error, which is a page about its stages."""
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)
