from __future__ import annotations

import subprocess
import sys

import pytest

import offramp
from offramp import errors


def test_all_is_sorted_and_complete():
    assert offramp.__all__ == sorted(offramp.__all__)
    assert set(offramp._HOMES) == set(offramp.__all__) - {"__version__"}
    assert set(dir(offramp)) == set(offramp.__all__)


@pytest.mark.parametrize("name", offramp.__all__)
def test_every_name_is_there(name):
    value = getattr(offramp, name)
    if name != "__version__":
        assert value.__name__ == name


def test_the_verbs_and_nouns_of_the_design_are_public():
    verbs = {"attach", "fit", "record", "calibrate", "evaluate", "export", "load"}
    nouns = {"MultiExitModel", "Scheme", "Trace", "Criterion", "Policy", "Runner", "Report"}
    assert verbs | nouns <= set(offramp.__all__)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = offramp.atach


def test_the_errors_are_one_tree():
    assert errors.__all__ == sorted(errors.__all__)
    for name in errors.__all__:
        value = getattr(errors, name)
        if isinstance(value, type):
            assert issubclass(value, errors.OfframpError)


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


EXTRAS = {"openvino", "ray", "timm", "torch_geometric", "torchvision", "transformers"}


def test_importing_is_light():
    heavy = {"torch", "lightning", "onnx", "onnxruntime", "matplotlib", "scipy", "sklearn"}
    assert not imported_by("import offramp") & (heavy | EXTRAS)


def test_running_needs_no_training_loop_and_no_plots():
    names = imported_by("import offramp; offramp.Runner; offramp.load; offramp.Policy")
    assert not names & ({"lightning", "pytorch_lightning", "matplotlib", "sklearn"} | EXTRAS)


def test_all_public_names_import_no_extra_and_touch_no_accelerator():
    names = imported_by(
        "import offramp; [getattr(offramp, n) for n in offramp.__all__]; import torch; "
        "assert not torch.cuda.is_initialized()"
    )
    assert not names & EXTRAS
