"""What the op benchmark says of its rows: a line for each, verdicts, and the page docs/ops.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
DIRECTIONS = {"forward": 0, "backward": 1, "forward_backward": 0}  # -> index of the target
SLOWER = 1.03  # times the best rival's
SAME = 0.05  # a rival whose results differ more computes something else


def name_of(row: Row) -> str:
    return row.get("body") or row["by"]


def line_of(row: Row) -> str:
    parts = [f"{name_of(row):<18}" + ("<- chosen" if row.get("chosen") else "         ")]
    for what in DIRECTIONS:
        if f"{what}_ms" in row:
            parts.append(f"{what} {row[f'{what}_ms']:>8.4g} ms {row[f'{what}_share']:>6.1%}")
        if f"{what}_small_share" in row:
            parts.append(f"(of a copy of its size {row[f'{what}_small_share']:.1%})")
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


def best_of(others: list[Row], direction: str) -> Row | None:
    """The fastest that gets the same results."""
    key = f"{direction}_ms"
    there = [row for row in others if key in row and row["difference"] <= SAME]
    return min(there, key=lambda row: row[key], default=None)


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
            slower = best is not None and row[f"{direction}_ms"] > SLOWER * best[f"{direction}_ms"]
            if below:
                verdict["target"] = round(target, 3)
            if slower:
                verdict |= {"rival": name_of(best), "rival_ms": best[f"{direction}_ms"]}
            if below or slower:
                found.append(what | verdict)
    return found


def said(found: list[Row]) -> list[str]:
    """Verdicts as lines."""
    lines = [f"{len(found)} below target or slower than a rival:" if found else "Every target is reached."]
    for row in found:
        line = f"  {row['model']:<14} {row['op']:<22} "
        if "failed" in row:
            lines.append(line + row["failed"])
            continue
        line += f"{row['direction']:<17}{row['ms']:>8.4g} ms  {row['share']:>6.1%}"
        if "target" in row:
            line += f" (wanted {row['target']:.0%})"
        if "rival" in row:
            line += f"  {row['ms'] / row['rival_ms']:.2f} times {row['rival']}'s {row['rival_ms']:.4g} ms"
        lines.append(line)
    return lines


def page(content: Row) -> str:
    """docs/ops.md"""
    return "\n".join(said(content["verdicts"])) + "\n"
