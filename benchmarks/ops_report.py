"""What the op benchmark says of its rows: a line for each, verdicts, and a page of docs (ops.md, ops_h100.md)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
DIRECTIONS = {"forward": 0, "backward": 1, "forward_backward": 0}  # -> index of the target
SLOWER = 1.03  # times the best rival's
SAME = 0.05  # a rival whose results differ more computes something else

_HEAD = """# Ops: measured

What `python -m benchmarks.ops` found on one {device} (driver {driver}, torch {torch}, cuDNN {cudnn}), in {dtype}; this
page is `python -m benchmarks.ops --table {file}`. Sizes are those of Llama-3-8B and Qwen3-30B-A3B with 16k tokens, and
of one of eight processes of a 70B model under tensor parallelism.

- Milliseconds are those of the device, from CUDA graphs over inputs that are not in its cache; an empty kernel takes
  {launch} us of them.
- A share is that of a limit measured in the same run: the least bytes that must move at the rate of a large copy in
  device memory ({copies} TB/s, the better of the driver's and a kernel's), for products the bare bf16 products of the
  same shapes, at the clock that the GPU keeps under them. Reading is faster than writing: what reads more than it
  writes can pass 100 %. In brackets, for work below 30 us: of a copy of as many bytes.
- "Best other" is the fastest of PyTorch's eager mode, torch.compile, {rivals} and our other bodies, each where it has
  the op, with results that are the same within rounding; of products, by their share of the bare ones.
- Not measured: {absent}.
"""


def name_of(row: Row) -> str:
    return row.get("body") or row["by"]


def line_of(row: Row) -> str:
    parts = [f"{name_of(row):<18}" + ("<- chosen" if row.get("chosen") else "         ")]
    for what in DIRECTIONS:
        if f"{what}_ms" in row:
            parts.append(f"{what} {row[f'{what}_ms']:>8.4g} ms {row[f'{what}_share']:>6.1%}")
        if f"{what}_small_share" in row:
            parts.append(f"({row[f'{what}_small_share']:.1%})")
    if "host_us" in row:
        parts.append(f"host {row['host_us']:.0f} us")
    parts.append(row.get("failed") or f"differs {row['difference']:.1e}")
    return "    " + "  ".join(parts)


def groups(rows: list[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """(row of the chosen body, all others of its case)."""
    for row in rows:
        if row.get("chosen"):
            case = (row["model"], row["op"])
            yield row, [x for x in rows if (x["model"], x["op"]) == case and x is not row]


def cost(row: Row, direction: str) -> float:
    """What is compared: time. Of what consists of products, time over that of bare ones measured in turn with it: the
    clock falls with heat, and is not the same for one who is measured later."""
    return 1 / row[f"{direction}_share"] if f"{direction}_tflops" in row else row[f"{direction}_ms"]


def best_of(others: list[Row], direction: str) -> Row | None:
    """The fastest that gets the same results."""
    there = [row for row in others if f"{direction}_ms" in row and row["difference"] <= SAME]
    return min(there, key=lambda row: cost(row, direction), default=None)


def verdicts(rows: list[Row]) -> list[Row]:
    """Each op and direction that is below its target or more than 3 % slower than the fastest other, or failed."""
    found = []
    for row, others in groups(rows):
        what = {key: row[key] for key in ("model", "op", "shape", "body")}
        if "failed" in row:
            found.append(what | {"failed": row["failed"]})
        for direction, number in DIRECTIONS.items():
            if f"{direction}_ms" not in row:
                continue
            # Of a few microseconds, the rate of a large copy is out of reach: a copy of its own size is the measure.
            share = row.get(f"{direction}_small_share", row[f"{direction}_share"])
            verdict = {"direction": direction, "ms": row[f"{direction}_ms"], "share": share}
            target, best = row["targets"][number], best_of(others, direction)
            below = target is not None and share < target
            times = 0.0 if best is None else cost(row, direction) / cost(best, direction)
            if below:
                verdict["target"] = round(target, 3)
            if times > SLOWER:
                verdict |= {
                    "rival": name_of(best),
                    "rival_ms": best[f"{direction}_ms"],
                    "times": round(times, 3),
                }
            if below or times > SLOWER:
                found.append(what | verdict)
    return found


def said(found: list[Row]) -> list[str]:
    """Verdicts as lines."""
    lines = (
        [f"{len(found)} below target or slower than the best other:"]
        if found
        else ["All targets are reached."]
    )
    for row in found:
        line = f"{row['model']:<14} {row['op']:<24} "
        if "failed" in row:
            lines.append(line + row["failed"])
            continue
        line += f"{row['direction']:<17}{row['ms']:>8.4g} ms  {row['share']:>6.1%}"
        if "target" in row:
            line += f" (wanted {row['target']:.0%})"
        if "rival" in row:
            line += f"  {row['times']:.2f} times {row['rival']}'s {row['rival_ms']:.4g} ms"
        lines.append(line)
    return lines


def _measured(row: Row, direction: str) -> str:
    if f"{direction}_ms" not in row:
        return ""
    if f"{direction}_tflops" in row:
        rate = f"{row[f'{direction}_tflops']:.0f} TFLOP/s"
    else:
        rate = f"{row[f'{direction}_gbytes_per_s'] / 1e3:.2f} TB/s"
    text = f"{row[f'{direction}_ms']:.3g} ms, {rate}, {row[f'{direction}_share']:.0%}"
    if f"{direction}_small_share" in row:
        text += f" ({row[f'{direction}_small_share']:.0%})"
    return text


def _other(others: list[Row], direction: str) -> str:
    best = best_of(others, direction)
    return "" if best is None else f"{best[f'{direction}_ms']:.3g} ms, {name_of(best)}"


def _table(rows: list[Row]) -> list[str]:
    lines = ["| op | size | body | forward | best other | backward | best other |", "|" + " --- |" * 7]
    for row, others in groups(rows):
        first = "forward_backward" if "forward_backward_ms" in row else "forward"
        cells = [row["op"], row["shape"], row["body"], _measured(row, first), _other(others, first)]
        if first == "forward_backward":
            cells[3] += ", both passes"
        if "failed" in row:
            cells[3] = row["failed"].split(":")[0]
        cells += [_measured(row, "backward"), _other(others, "backward")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _span(rates: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{rate:.2f}" for rate in (min(rates), max(rates))))


def page(content: Row, file: str) -> str:
    """docs/ops.md and its like for other GPUs."""
    versions, rivals = content["versions"], content["rivals"]
    head = _HEAD.format(
        device=content["device"],
        driver=versions.get("NVIDIA driver", "?"),
        torch=content["torch"],
        cudnn=versions.get("cuDNN", "?"),
        dtype=content["dtype"],
        file=file,
        launch=content["empty_kernel_us"],
        copies=_span([run["copy_gbytes_per_s"] / 1e3 for run in content["runs"]]),
        rivals=", ".join(f"{name} {version}" for name, version in rivals.items() if name != "torch")
        or "no library",
        absent="; ".join(f"{name} ({reason})" for name, reason in content["rivals_absent"].items()),
    )
    parts = [head]
    for model in dict.fromkeys(row["model"] for row in content["rows"]):
        parts += [f"## {model}", "", *_table([row for row in content["rows"] if row["model"] == model]), ""]
    first, *lines = said(content["verdicts"])
    parts += ["## Not reached", "", first, ""]
    if lines:
        parts += ["```text", *lines, "```", ""]
    if content["left_out"]:
        parts += ["## Left out", ""]
        parts += [f"- {left['model']}, {left['op']}: {left['why']}" for left in content["left_out"]] + [""]
    return "\n".join(parts)
