"""One thing to deploy: a folder with an ONNX file, its policy, and a manifest that seals both.

::

    digits.offramp/
      model.onnx            all stages and the rule; plain onnxruntime runs it
      stages/0.onnx         (optional) each stage by itself, with the criterion at its end
      policy.json           the criterion, the thresholds, and where they come from
      training.safetensors  hashes of the samples that training saw, where the model knows them
      manifest.json         inputs, outputs, costs, sha256 of the other parts, the proof, and its
                            own seal

The folder appears at once and whole, or not at all: it is written beside its place and renamed
after the file has been compared with the model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from safetensors.torch import load as read
from safetensors.torch import save
from torch.utils import _pytree as pytree

from offramp.build.cost import ExitCosts
from offramp.build.model import MultiExitModel
from offramp.decide.policy import Policy
from offramp.errors import ArtifactError, OfframpError, StageError
from offramp.run.calls import Call
from offramp.run.chain import Link, Step, chain, check_network, check_state
from offramp.run.engines import Engine, OnnxEngine, StepCall, engine_of
from offramp.run.graph import cut
from offramp.run.onnx import convert, split
from offramp.run.onnx_rule import cannot_select, connect
from offramp.run.proof import compare_file
from offramp.run.rows import RowAxis
from offramp.run.runner import Runner
from offramp.run.stages import StagedModel
from offramp.run.times import fastest

__all__ = ["export", "load", "verify"]

SCHEMA = 1
MODEL, POLICY, MANIFEST = "model.onnx", "policy.json", "manifest.json"
TRAINING = "training.safetensors"
STAGE = "stages/{}.onnx"
ENGINES = ("onnxruntime", "openvino")
KIND = "offramp artifact"
MOST_FOLDED = 1 << 20  # windows, heads or nodes of one sample in the dimension of the batch
TRIES = 100  # to put a folder in its place while others do, too


def export(
    model: MultiExitModel,
    policy: Policy,
    example: object,
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    exits: Literal["active", "all"] = "active",
    stages: bool = False,
) -> Path:
    """Write the artifact, after comparing it with the model.

    Args:
        model: the multi-exit model.
        policy: the criterion and its thresholds, which become the file's default thresholds.
        example: an input batch of at least two samples.
        path: the folder to write; an artifact that stands there is replaced, unless the folder
            holds other files, too.
        classes: names of the classes, in order, for whoever reads the answers; as JSON.
        preprocessing: what was done to the inputs, as JSON, for whoever prepares them.
        exits: ``"active"`` leaves out exits that the policy switched off, head and all;
            ``"all"`` keeps every exit, so that the thresholds can be calibrated anew.
        stages: also write each stage as a file of its own, for a client that moves the survivors
            itself. Inputs and outputs are in the order that ``steps`` of the manifest names.

    Returns:
        The path.

    Raises:
        EqualityError: the file does not answer as the model does; nothing is written.
        StageError: the model cannot be cut or written as ONNX, or has a ``select`` function.
        ArtifactError: something else stands at ``path``, ``classes`` do not fit, or
            ``preprocessing``, ``classes`` or what the example has beside tensors are no JSON.
        PolicyError: the policy is for another number of exits, or cannot be had with all exits.
    """
    target = Path(path)
    _check_replaceable(target)
    check_network(policy, model)
    if classes is not None and len(classes) != model.num_classes:
        raise ArtifactError(
            f"{len(classes)} class names for a model of {model.num_classes} classes. Name each."
        )
    if classes is not None:
        classes = _as_json("classes", [_plain(name) for name in classes])
    preprocessing = _as_json("preprocessing", preprocessing)
    if exits == "all":
        check_state(policy)
    kept = [k for k, runs in enumerate(policy.active(model.num_exits)) if runs or exits == "all"]
    staged = cut(model, example, kept)
    if staged.selector is not None:
        raise cannot_select()
    _as_json("What the example has beside tensors", _constants(staged.call))
    steps = chain(staged, policy, model.num_exits)
    facts = _facts(model, staged, steps)
    file = connect(convert(steps), steps, staged.call.names)
    parts = {MODEL: file.SerializeToString()}
    proof = compare_file(parts[MODEL], model, policy, staged)
    if stages:
        singles = split(file, steps)
        parts |= {STAGE.format(k): one.SerializeToString() for k, one in enumerate(singles)}
    parts[POLICY] = json.dumps(policy.to_json(), indent=1).encode()
    trained_on = model.training_fingerprints
    if len(trained_on):
        parts[TRAINING] = save({"fingerprints": trained_on})
    manifest = {
        **facts,
        "classes": classes,
        "preprocessing": preprocessing,
        "stages": stages,
        "training_samples": len(trained_on),
        "proof": proof,
    }
    _write(target, parts, manifest)
    return target


def _check_replaceable(target: Path) -> None:
    """Refuse a path where something other than an artifact stands, or lies in one, to be lost."""
    if not target.exists():
        return
    try:
        manifest = json.loads((target / MANIFEST).read_bytes())
    except OSError:
        manifest = None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{target} exists, and its {MANIFEST} cannot be read ({error}), so it may be no "
            "artifact of offramp. Delete the folder if it is one, or choose another path."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise ArtifactError(f"{target} exists and is no artifact of offramp. Choose another path.")
    own = {MANIFEST, MODEL, POLICY, *manifest.get("sha256", ())}
    there = (Path(folder, name) for folder, _, names in os.walk(target) for name in names)
    foreign = sorted({path.relative_to(target).as_posix() for path in there} - own)
    if foreign:
        raise ArtifactError(
            f"{target} holds files beside its artifact, which would be lost: {', '.join(foreign)}. "
            "Move them away, or choose another path."
        )


def _as_json(what: str, value: Any) -> Any:  # noqa: ANN401
    """The value as it is read back: keys, say, become texts."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{what} cannot be written as JSON: {error}. Give numbers, texts, lists and "
            "mappings of these."
        ) from error


def _plain(value: Any) -> Any:  # noqa: ANN401
    """A number or text of numpy as Python has it."""
    return value.item() if isinstance(value, np.generic) else value


def load(path: str | os.PathLike[str], engine: str | OnnxEngine = "onnxruntime") -> Runner:
    """A runner from an artifact: its stages, executed one by one.

    Args:
        path: the folder that :func:`export` wrote.
        engine: ``"onnxruntime"`` or ``"openvino"``, or an instance; or ``"auto"``: the faster of
            the two here, as ``runner.engine.name`` then says.

    Raises:
        ArtifactError: the artifact is damaged, foreign, or of a later schema; the part is named.
    """
    folder = Path(path)
    manifest = _manifest(folder)
    executes = None if engine == "auto" else engine_of(engine)
    if executes is not None and not isinstance(executes, OnnxEngine):
        raise ArtifactError(
            f"An artifact holds ONNX, which the engine {executes.name!r} does not execute. "
            "Use 'onnxruntime' or 'openvino'."
        )
    try:
        manifest, parts = _parts(folder, manifest)
        policy = Policy.from_json(json.loads(parts[POLICY]))
        thresholds = _thresholds(policy, manifest)
        steps = zip(manifest["steps"], thresholds, strict=True)
        links = [_link_from_json(step, threshold) for step, threshold in steps]
        if len(links) > 1:
            check_state(policy)
        file = onnx.load_from_string(parts[MODEL])
        _check_inputs(manifest, file)
        models, call = _stages(parts, file, links), _call(manifest)

        def calls_of(tried: Engine) -> Sequence[StepCall]:
            if not isinstance(tried, OnnxEngine):
                return []
            return tried.calls(file, links, models, call.finite)

        if executes is None:
            executes, calls = fastest(ENGINES, calls_of, links, call)
        else:
            calls = calls_of(executes)
        costs = manifest["costs"]
        runner = Runner.of_links(
            executes,
            links,
            calls,
            policy,
            ExitCosts(
                unit=costs["unit"],
                stages=tuple(costs["stages"]),
                heads=tuple(costs["heads"]),
                cascade=bool(costs.get("cascade", False)),
            ),
            tuple(manifest["places"]),
            call,
            manifest["row_bytes"],
        )
        if TRAINING in parts:
            runner.training_fingerprints = read(parts[TRAINING])["fingerprints"]
        return runner
    except OfframpError as error:
        if not isinstance(error, StageError):
            raise
        raise ArtifactError(f"{folder} has the right checksums, but: {error}") from error
    except Exception as error:
        raise ArtifactError(
            f"{folder} has the right checksums, but does not hang together: "
            f"{type(error).__name__}: {str(error)[:300]}. Export it again."
        ) from error


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check every part of an artifact against its manifest, and that it loads.

    Returns:
        The manifest.

    Raises:
        ArtifactError: what is wrong, and in which part.
    """
    load(path)
    return _manifest(Path(path))


# -- the manifest ----------------------------------------------------------------------------------


def _facts(model: MultiExitModel, staged: StagedModel, steps: Sequence[Step]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "inputs": _inputs(staged.call),
        "outputs": ["logits", "prediction", "exit", "score"],
        "structure": _structure(staged.call),
        "constants": _constants(staged.call),
        "num_classes": model.num_classes,
        "places": list(model.places),
        "costs": {
            "unit": model.costs.unit,
            "stages": list(model.costs.stages),
            "heads": list(model.costs.heads),
            "cascade": model.costs.cascade,
        },
        "row_bytes": staged.row_bytes,
        "steps": [_link_to_json(step) for step in steps],
        "versions": {"torch": torch.__version__, "onnx": onnx.__version__},
    }


def _structure(call: Call) -> str:
    try:
        return pytree.treespec_dumps(call.spec)
    except (NotImplementedError, TypeError) as error:
        raise ArtifactError(
            f"The structure of the example, {call.describe()}, cannot be written as JSON: {error}. "
            "Let the model take tuples, lists and mappings."
        ) from error


def _constants(call: Call) -> dict[str, Any]:
    """What stands in the example beside tensors, by position."""
    return {
        str(i): _plain(leaf)
        for i, leaf in enumerate(call.leaves)
        if not isinstance(leaf, torch.Tensor | np.ndarray)
    }


def _inputs(call: Call) -> list[dict[str, Any]]:
    given = zip(call.names, call.tensors, call.finite, strict=True)
    return [
        {
            "name": name,
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [None, *value.shape[1:]],
            "finite": finite,  # whether NaN and infinite values are refused
            "entries": call.entries.get(position),  # of the embedding that reads it
        }
        for position, (name, value, finite) in enumerate(given)
    ]


def _call(manifest: Mapping[str, Any]) -> Call:
    """The call that the example was, with zeros (or what is not finite, as it had) as its data."""
    tensors = iter(
        torch.full(
            (2, *entry["shape"][1:]),
            -math.inf if dtype.is_floating_point and not entry["finite"] else 0,
            dtype=dtype,
        )
        for entry in manifest["inputs"]
        for dtype in [getattr(torch, entry["dtype"])]
    )
    spec = pytree.treespec_loads(manifest["structure"])
    constants = {int(i): value for i, value in manifest["constants"].items()}
    positions = range(len(constants) + len(manifest["inputs"]))
    leaves = [constants[i] if i in constants else next(tensors) for i in positions]
    entries = {k: n for k, entry in enumerate(manifest["inputs"]) if (n := entry.get("entries"))}
    return Call(leaves, spec, entries)


def _link_to_json(step: Step) -> dict[str, Any]:
    rows = {
        name: None if axis is None else [axis.dim, axis.multiple, axis.inner]
        for name, axis in step.rows.items()
        if name in {*step.inputs, *step.outputs, *step.live}
    }
    return {
        "exit": step.exit,
        "inputs": list(step.inputs),
        "outputs": list(step.outputs),
        "rows": rows,
        "live": list(step.live),
    }


def _link_from_json(data: Mapping[str, Any], threshold: float) -> Link:
    rows = {name: None if axis is None else RowAxis(*axis) for name, axis in data["rows"].items()}
    if any(axis is not None and not 1 <= axis.multiple <= MOST_FOLDED for axis in rows.values()):
        raise ValueError("the rows of a value are not those of any batch")
    return Link(
        data["exit"],
        threshold,
        tuple(data["inputs"]),
        tuple(data["outputs"]),
        rows,
        tuple(data["live"]),
    )


def _names(manifest: Mapping[str, Any]) -> list[str]:
    """Every part of an artifact but the manifest."""
    stages = range(len(manifest["steps"])) if manifest["stages"] else ()
    training = [TRAINING] if manifest.get("training_samples") else []
    return [MODEL, POLICY, *training, *(STAGE.format(k) for k in stages)]


def _stages(
    parts: Mapping[str, bytes], file: onnx.ModelProto, links: Sequence[Link]
) -> list[bytes]:
    """The model of each stage: from its own file, or else cut out of the one for all."""
    own = [parts[name] for k in range(len(links)) if (name := STAGE.format(k)) in parts]
    return own or [model.SerializeToString() for model in split(file, links)]


def _check_inputs(manifest: Mapping[str, Any], file: onnx.ModelProto) -> None:
    """Refuse a manifest of other inputs than the file's, before memory is taken for them."""
    known = {value.name: value.type.tensor_type.shape.dim for value in file.graph.input}
    for entry in manifest["inputs"]:
        sizes = [dim.dim_value for dim in known[entry["name"]]]
        if sizes[1:] != entry["shape"][1:]:
            raise ArtifactError(
                f"The manifest gives the input {entry['name']!r} the shape {entry['shape']}, but "
                f"{MODEL} has {sizes}. Export it again."
            )


def _thresholds(policy: Policy, manifest: Mapping[str, Any]) -> list[float]:
    every = (*policy.thresholds_for(len(manifest["costs"]["stages"])), -float("inf"))
    return [every[step["exit"]] for step in manifest["steps"]]


def _dump(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, sort_keys=True).encode()


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest with a checksum of itself; any other spelling of the same JSON is refused."""
    bare = {key: value for key, value in manifest.items() if key != "seal"}
    return _dump({**bare, "seal": hashlib.sha256(_dump(bare)).hexdigest()})


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise ArtifactError(f"{folder} is no artifact of offramp: it has no {MANIFEST}.")
    try:
        raw = file.read_bytes()
        manifest = json.loads(raw)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{file} cannot be read ({error}): it is damaged or foreign."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise ArtifactError(f"{file} is not the manifest of an offramp artifact.")
    schema = manifest.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise ArtifactError(
            f"{file} has schema {schema!r}; this offramp reads up to {SCHEMA}. Update offramp."
        )
    if _sealed(manifest) != raw:
        raise ArtifactError(f"{file} was changed after it was written: its seal does not fit.")
    return manifest


def _parts(folder: Path, manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The parts that a manifest seals; and the manifest, which may be a newer one."""
    try:
        return manifest, {name: _part(folder, name, manifest) for name in _names(manifest)}
    except ArtifactError:
        newer = _manifest(folder)
        if newer == manifest:
            raise
        # Another process has put a new artifact there since the manifest was read.
        return newer, {name: _part(folder, name, newer) for name in _names(newer)}


def _part(folder: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    file = folder / name
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{file} cannot be read: {error}. The artifact is incomplete."
        ) from error
    if hashlib.sha256(raw).hexdigest() != manifest["sha256"][name]:
        raise ArtifactError(
            f"{file} is damaged: it has {len(raw)} bytes, and its sha256 is not the manifest's. "
            "Copy or export it again."
        )
    return raw


def _write(target: Path, parts: Mapping[str, bytes], manifest: Mapping[str, Any]) -> None:
    target = Path(os.path.realpath(target))  # a link goes on leading to what is written
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        for name, raw in parts.items():
            (fresh / name).parent.mkdir(exist_ok=True)
            (fresh / name).write_bytes(raw)
        sums = {name: hashlib.sha256(raw).hexdigest() for name, raw in parts.items()}
        (fresh / MANIFEST).write_bytes(_sealed({**manifest, "sha256": sums}))
        fresh.chmod(0o755)
        for left in reversed(range(TRIES)):
            try:
                _put(fresh, target)
                break
            except OSError as error:
                # Others write there, too: what stood there is gone, or something new stands there.
                if not left or error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                    raise
    finally:
        if fresh.exists():
            shutil.rmtree(fresh)


def _put(fresh: Path, target: Path) -> None:
    """Rename a folder to its place, and remove what stood there."""
    if not target.exists():
        fresh.rename(target)
        return
    old = fresh.with_suffix(".old")
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        try:
            old.rename(target)
        except OSError:
            if target.exists():  # another writer's, and newer
                shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
