"""The tables of docs/speed.md, from the results of coverage, runtime and quantisation."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from benchmarks.markdown import table

__all__ = ["RUNTIME_TABLES"]

Result = dict[str, Any]


def _coverage(result: Result) -> str:
    rows, total = [], Counter()
    kinds: dict[str, list[Result]] = {}
    for row in result["rows"]:
        kinds.setdefault(row["source"], []).append(row)
    for source, own in kinds.items():
        passed = {
            "all": len(own),
            "equal": sum(row["equal"] and row["per_sample"] for row in own),
            "onnx": sum(row["onnx"] for row in own),
        }
        total.update(passed)
        rows.append([source, *(str(passed[key]) for key in ("all", "equal", "onnx"))])
    rows.append(["**all**", *(f"**{total[key]}**" for key in ("all", "equal", "onnx"))])
    text = table(["from", "architectures", "bit-equal, and per sample as alone", "one file"], rows)
    failed = [r for r in result["rows"] if not (r["equal"] and r["per_sample"] and r["onnx"])]
    notes = [f"- `{row['name']}`: {row['reason'].rstrip('.')}." for row in failed]
    return text + ("\n\nThose that do not pass all:\n\n" + "\n".join(notes) if notes else "")


def _ideal(result: Result) -> str:
    rows = []
    for row in result["parts"]["stages"]["ideal"]:
        rows.append(
            [
                row["network"],
                row["engine"],
                str(row["batch"]),
                row["mix"],
                " → ".join(map(str, row["entered"])),
                f"{row['runner_ms']:.2f}",
                f"{row['ratio']:.3f}",
            ]
        )
    return table(
        ["network", "engine", "batch", "leave", "rows that enter", "ms", "over the ideal"], rows
    )


def _overhead(result: Result) -> str:
    rows = [
        [
            row["network"],
            row["engine"],
            str(row["batch"]),
            f"{row['bare_ms']:.2f}",
            f"{row['runner_ms']:.2f}",
            f"{row['ratio']:.3f}",
            f"{100 * row['heads_share_of_macs']:.1f} %",
            f"{row['ratio_less_heads']:.3f}",
        ]
        for row in result["parts"]["stages"]["overhead"]
    ]
    head = ["network", "engine", "batch", "backbone, ms", "with exits, ms", "ratio",
            "heads' MACs", "less heads"]  # fmt: skip
    return table(head, rows)


def _compaction(result: Result) -> str:
    rows = [
        [
            row["network"],
            str(row["batch"]),
            " → ".join(map(str, row["entered"])),
            ", ".join("yes" if value else "no" for value in row["compacts"]),
            *(f"{1e3 * row[f'{name}_ms']:.0f}" for name in ("measured", "always", "never")),
            "in one call" if row["in_one_call"] else "stage by stage",
            f"{1e3 * row['runner_ms']:.0f}",
        ]
        for row in result["parts"]["compaction"]
    ]
    head = ["network", "batch", "rows that enter", "compacts, by measurement", "µs",
            "µs, always", "µs, never", "the runner answers", "µs, runner"]  # fmt: skip
    return table(head, rows)


def _file(result: Result) -> str:
    rows = [
        [
            row["network"],
            f"{row['export_and_proof_seconds']:.1f}",
            f"{row['first_stage_ms']:.3f}",
            f"{row['file_all_leave_ms']:.3f}",
            f"{row['file_over_first_stage']:.3f}",
            f"{row['runner_over_first_stage']:.3f}",
        ]
        for row in result["parts"]["file"]
    ]
    head = ["network", "export and proof, s", "first stage, ms", "file, all leave, ms",
            "file over first stage", "runner over first stage"]  # fmt: skip
    return table(head, rows)


def _memory(result: Result) -> str:
    rows = [
        [
            row["network"],
            str(row["batch"]),
            f"{row['bare_running_mb']:.0f}",
            f"{row['runner_running_mb']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_loading']:.2f}",
        ]
        for row in result["parts"]["memory"]
    ]
    head = ["network", "batch", "backbone, MB", "runner, MB", "ratio", "ratio while loading"]
    return table(head, rows)


def _earlyon(result: Result) -> str:
    rows = []
    for row in result["parts"]["earlyon"]["rows"]:
        rate = {k: v["images_per_second"] for k, v in row.items() if isinstance(v, dict)}
        rows.append(
            [
                str(row["batch"]),
                f"{100 * row['offramp_onnxruntime']['accuracy']:.1f} %",
                f"{100 * row['earlyon']['accuracy']:.1f} %",
                f"{rate['offramp_onnxruntime']:.0f}",
                f"{rate['offramp_torch']:.0f}",
                f"{rate['earlyon']:.0f}",
                f"**{row['over_earlyon']:.2f}×**",
                f"{row['over_earlyon_both_eager']:.2f}×",
            ]
        )
    head = ["batch", "accuracy", "accuracy, earlyon", "images/s, ONNX Runtime",
            "images/s, eager torch", "images/s, earlyon", "over earlyon",
            "both on eager torch"]  # fmt: skip
    return table(head, rows)


def _device(result: Result) -> str:
    part = result["parts"].get("device")
    if part is None:
        return "Not measured yet."
    rows = [
        [row["network"], str(row["batch"]), row["mix"], f"{row['runner_ms']:.2f}",
         f"ideal, {row['ideal_ms']:.2f}", f"{row['ratio']:.3f}"]
        for row in part["ideal"]
    ]  # fmt: skip
    rows += [
        [row["network"], str(row["batch"]), "none", f"{row['runner_ms']:.2f}",
         f"backbone, {row['bare_ms']:.2f}", f"{row['ratio']:.3f}"]
        for row in part["overhead"]
    ]  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    told = f"{part['device']}, {versions}."
    head = ["network", "batch", "leave", "ms", "beside, ms", "ratio"]
    return table(head, rows) + "\n\n" + told


def _conditions(result: Result) -> str:
    given = result["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in given["versions"].items())
    machines: dict[str, list[str]] = defaultdict(list)
    for part, name in given["processors"].items():
        if part != "device":  # which says so itself
            machines[name].append(part)
    where = "; ".join(f"{', '.join(parts)} on {name}" for name, parts in machines.items())
    return (
        f"One thread on a shared machine of {given['cores']} cores ({where}); candidates in turn "
        f"in one run, medians. Python {given['python']}, {versions}."
    )


def _quantisation(result: Result) -> str:
    rows = [
        [
            row["engine"],
            row["thresholds"],
            f"{100 * row['full_accuracy']:.2f} %",
            f"{100 * row['accuracy']:.2f} %",
            f"{100 * row['cost_share']:.1f} %",
            " / ".join(f"{100 * share:.1f}" for share in row["exit_shares"]),
        ]
        for row in result["rows"]
    ]
    head = ["weights", "thresholds", "full network", "early exits", "cost", "leave at, %"]
    times = [
        [str(row["batch"]), *(f"{row[f'{k}_ms']:.2f}" for k in
         ("float32_whole", "float32_early", "int8_whole", "int8_early"))]
        for row in result["times"]
    ]  # fmt: skip
    second = ["batch", "float32, none leave, ms", "float32, ms", "int8, none leave, ms", "int8, ms"]
    return table(head, rows) + "\n\n" + table(second, times)


RUNTIME_TABLES = {
    "coverage": _coverage,
    "runtime.ideal": _ideal,
    "runtime.overhead": _overhead,
    "runtime.compaction": _compaction,
    "runtime.file": _file,
    "runtime.memory": _memory,
    "runtime.earlyon": _earlyon,
    "runtime.conditions": _conditions,
    "runtime.device": _device,
    "quantisation": _quantisation,
}
