"""The rooms of the code: imports point one way, and nothing private leaves its room."""

from __future__ import annotations

import functools
from collections import defaultdict

from docs.make_rooms_picture import LEVELS, Import, imports, level_of, modules, room_of

MODULES = modules()
# The public package: its names are imported when they are used, and checkers of types see them.
LAZY = {"fastokd", "fastokd.cli"}


@functools.cache
def all_imports() -> list[Import]:
    """Read when a test asks for them: every worker collects every file."""
    return list(imports(MODULES))


def test_every_room_has_a_level() -> None:
    rooms = {room_of(module) for module in MODULES}
    assert rooms == {room for level in LEVELS for room in level}


def test_imports_point_down() -> None:
    wrong = [
        one
        for one in all_imports()
        if room_of(one.importer) != room_of(one.source)
        and level_of(room_of(one.importer)) >= level_of(room_of(one.source))
        and one.where != "typing"
    ]
    assert wrong == []


def test_no_circle_of_files() -> None:
    edges: dict[str, set[str]] = defaultdict(set)
    for one in all_imports():
        if one.where != "typing" and one.importer not in LAZY:
            edges[one.importer].add(one.source)
    seen: dict[str, int] = {}

    def visit(module: str, path: list[str]) -> None:
        seen[module] = 1
        for other in sorted(edges[module]):
            if seen.get(other) == 1:
                raise AssertionError(" -> ".join([*path, module, other]))
            if other not in seen:
                visit(other, [*path, module])
        seen[module] = 2

    for module in MODULES:
        if module not in seen:
            visit(module, [])


def test_functions_import_nothing_of_fastokd_but_to_keep_torch_out() -> None:
    lazy = [one for one in all_imports() if one.where == "function"]
    assert [one for one in lazy if one.importer not in LAZY and not _is_command(one)] == []


def test_only_the_package_itself_imports_for_types_alone() -> None:
    found = {(one.importer, one.source) for one in all_imports() if one.where == "typing"}
    assert {pair for pair in found if pair[0] != "fastokd"} == set()


def test_nothing_private_leaves_its_room() -> None:
    private = [
        one
        for one in all_imports()
        if room_of(one.importer) != room_of(one.source)
        and (one.name.startswith("_") or one.source.rpartition(".")[2].startswith("_"))
        and one.name != "__version__"
    ]
    assert private == []


def _is_command(one: Import) -> bool:
    return room_of(one.importer) in ("commands", "demo")
