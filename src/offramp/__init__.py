"""Early exits for any PyTorch network: a rule decides when to stop, and stopping saves the time.

The flow: :func:`attach` exits to a backbone, :func:`fit` them, :func:`record` what they say on
data, :func:`calibrate` when to stop, :func:`evaluate` what that does, run it with a
:class:`Runner`, and :func:`export` it to a file that :func:`load` reads.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.analyse.report import Report, evaluate
    from offramp.build.model import MultiExitModel, attach
    from offramp.build.outputs import ExitOutputs
    from offramp.decide.calibrate import calibrate
    from offramp.decide.criteria import Criterion
    from offramp.decide.policy import Policy
    from offramp.decide.record import record
    from offramp.decide.trace import Trace
    from offramp.errors import Infeasible, OfframpError
    from offramp.places.result import PlacePlan
    from offramp.places.search import plan
    from offramp.run.artifact import export, load
    from offramp.run.runner import Runner
    from offramp.train.loop import fit
    from offramp.train.schemes import Scheme

__all__ = [
    "Criterion",
    "ExitOutputs",
    "Infeasible",
    "MultiExitModel",
    "OfframpError",
    "PlacePlan",
    "Policy",
    "Report",
    "Runner",
    "Scheme",
    "Trace",
    "__version__",
    "attach",
    "calibrate",
    "evaluate",
    "export",
    "fit",
    "load",
    "plan",
    "record",
]

# Where each name lives. Names are imported when they are first used, so that `import offramp` is
# quick, and a server that only loads a file imports no training loop.
_HOMES = {
    "Criterion": "decide.criteria",
    "ExitOutputs": "build.outputs",
    "Infeasible": "errors",
    "MultiExitModel": "build.model",
    "OfframpError": "errors",
    "PlacePlan": "places.result",
    "Policy": "decide.policy",
    "Report": "analyse.report",
    "Runner": "run.runner",
    "Scheme": "train.schemes",
    "Trace": "decide.trace",
    "attach": "build.model",
    "calibrate": "decide.calibrate",
    "evaluate": "analyse.report",
    "export": "run.artifact",
    "fit": "train.loop",
    "load": "run.artifact",
    "plan": "places.search",
    "record": "decide.record",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("offramp")
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"offramp.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
