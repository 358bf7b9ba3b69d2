"""The tables of docs/parallelism.md: no cell is silent, each test that they name exists, the page is not stale."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.layouts import DROPOUT, FREEZE, runs_of
from tests.helpers.parity import FAMILIES, METHODS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/parallelism.md"
sys.path.insert(0, str(ROOT / "tools"))

import make_parallel_docs as tool  # noqa: E402


@cache
def found() -> tool.Matrix:
    return tool.matrix()


def test_every_cell_is_tested_or_refused() -> None:
    assert not found().wrong
    assert len(found().cells) == len(tool.METHODS) * len(tool.SCHEDULES) * len(tool.ROWS)


def test_the_page_is_that_of_the_code() -> None:
    """`make docs` writes it."""
    text = PAGE.read_text("utf-8")
    assert tool.page(text, tool.tables(found())) == text


def test_named_tests_exist() -> None:
    from tests.parallel.test_parity import CASES

    cases = {case.id for case in CASES}
    assert len(cases) == len(CASES)
    assert found().named <= cases
    assert len(found().named) > 100


def test_options_that_can_stand_together_do_in_some_run() -> None:
    assert not tool.unmet_pairs()


def test_a_cell_without_a_test_is_an_error() -> None:
    def all_but_one(method: str, schedule: str, row: tool.Row):
        is_it = (method, schedule, row.name) == ("lora", "zbv", "`tensor`")
        return None if is_it else tool.tested(method, schedule, row)

    matrix = tool.matrix(find=all_but_one)
    assert matrix.wrong == ("lora, schedule zbv, `tensor`: neither tested nor refused",)
    with pytest.raises(ValueError, match="neither tested nor refused"):
        tool.tables(matrix)


def test_a_refusal_of_what_is_tested_is_an_error() -> None:
    def one_more(method: str, schedule: str, row: tool.Row):
        is_it = (method, schedule, row.name) == ("full", "none", "`tensor`")
        return "no" if is_it else tool.refusal(method, schedule, row)

    assert tool.matrix(refuse=one_more).wrong == (
        "full, schedule none, `tensor`: refused, but dense-tp2-full is a test",
    )


def test_options_count_only_where_they_act() -> None:
    """One process with ZeRO 3, and Ulysses without context parallelism, would be no test of them."""
    for row in tool.ROWS:
        seen = [one for one in tool.all_seen() if row.acts(one)]
        assert seen, row.name
        if row.key in ("zero", "context", "expert"):
            assert all(one.layout.fsdp * one.layout.tp > 1 for one in seen)
    (zero3,) = [row for row in tool.ROWS if row.name == "`zero: 3`"]
    assert not any(zero3.acts(one) for one in tool.all_seen() if one.layout.fsdp == 1)


def test_lists_of_layouts_name_layouts() -> None:
    runs = {(run.layout, run.method.partition("-")[0]) for family in FAMILIES for run in runs_of(family)}
    assert {("freeze", layout) for layout in FREEZE} <= {(method, layout) for layout, method in runs}
    dropped = {run.layout for family in FAMILIES for run in runs_of(family) if run.method == "lora-dropout"}
    assert dropped == set(DROPOUT)
    assert {run.method for family in FAMILIES for run in runs_of(family)} == set(METHODS)


@pytest.mark.parametrize("text", ["", tool.BEGIN, tool.END + tool.BEGIN, (tool.BEGIN + tool.END) * 2])
def test_a_page_without_its_markers_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="must have"):
        tool.page(text, "")
