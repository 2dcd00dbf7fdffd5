"""Reads the imports of fastokd and draws docs/rooms.svg: its rooms, their sizes, who imports whom.

    python docs/make_rooms_picture.py

``tests/test_house.py`` holds the code to ``LEVELS``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "fastokd": ROOT / "fastokd",
    "fastokd.kernels": ROOT / "kernels",
    "fastokd.csrc": ROOT / "csrc",
}
# From the top down: a room imports rooms of lower levels only. A room is a folder or a file of fastokd/.
LEVELS = (
    ("__main__",),
    ("cli",),
    ("commands",),
    ("demo", "authors", "compare", "overview", "reproduce"),
    ("train", "plan"),
    ("result",),
    ("benchmark", "report", "export", "doctor"),
    ("measured",),
    ("evaluate",),
    ("run",),
    ("student",),
    ("learner",),
    ("recipe", "data", "metrics", "reference"),
    ("distributed", "methods"),
    ("cohort",),
    ("models",),
    ("ops",),
    ("kernels", "csrc"),
    ("checkpoint", "device"),
    ("fastokd",),  # the package itself: its public names are imported when they are used
    ("errors",),
    ("host",),
    ("known", "seeds", "facts"),
)


class Import(NamedTuple):
    """``name`` of the module ``source`` is imported by ``importer``.

    ``where``: ``"top"``, ``"function"``, ``"later"`` (:class:`fastokd.known.Later`) or ``"typing"`` (under
    ``if TYPE_CHECKING``).
    """

    importer: str
    source: str
    name: str
    where: str


def modules() -> dict[str, Path]:
    """Every module of fastokd and its file."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            if path.is_relative_to(folder / "kernels") or path.is_relative_to(folder / "csrc"):
                continue  # links of a source tree
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = path
    return found


def imports(found: dict[str, Path]) -> Iterator[Import]:
    """Every import of one module of fastokd by another."""
    for importer, path in found.items():
        tree = ast.parse(path.read_text())
        for node, where in _with_place(tree, "top"):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "fastokd":
                        yield Import(importer, alias.name, "", where)
            elif (
                isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastokd"
            ):
                assert node.module is not None
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    if whole in found:
                        yield Import(importer, whole, "", where)
                    else:
                        yield Import(importer, node.module, alias.name, where)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Later":
                later = ast.literal_eval(node.args[0])  # a module that is imported when it is used
                if later in found:
                    yield Import(importer, later, "", "later")


def _with_place(node: ast.AST, where: str) -> Iterator[tuple[ast.AST, str]]:
    for child in ast.iter_child_nodes(node):
        place = where
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            place = "function"
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            place = "typing"
        yield child, place
        yield from _with_place(child, place)


def room_of(module: str) -> str:
    """The room that a module stands in."""
    return module.split(".")[1] if "." in module else module


def level_of(room: str) -> int:
    """The room's level, from the top."""
    return next(index for index, rooms in enumerate(LEVELS) if room in rooms)


def draw() -> str:
    """The picture: a box for each room, a line for each import that no other path implies."""
    found = modules()
    sizes: dict[str, tuple[int, int]] = {}
    for module, path in found.items():
        files, lines = sizes.get(room_of(module), (0, 0))
        sizes[room_of(module)] = files + 1, lines + path.read_text().count("\n")
    for path in FOLDERS["fastokd.csrc"].glob("*.[ch]*"):
        files, lines = sizes["csrc"]
        sizes["csrc"] = files + 1, lines + path.read_text().count("\n")
    arrows = {
        (room_of(one.importer), room_of(one.source))
        for one in imports(found)
        if room_of(one.importer) != room_of(one.source) and one.where != "typing"
    }
    width, height, gap = 170, 44, 30
    boxes: dict[str, tuple[int, int]] = {}
    for index, level in enumerate(LEVELS):
        rooms = [room for room in level if room in sizes]
        left = 490 - (len(rooms) * (width + gap) - gap) // 2
        for place, room in enumerate(rooms):
            boxes[room] = left + place * (width + gap), 20 + index * (height + gap)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 {20 + len(LEVELS) * (height + gap)}" '
        'font-family="system-ui, sans-serif" font-size="14" role="img">'
        "<title>The rooms of fastokd, from the imports of its code</title>",
        "<style>text{fill:#222}.s{font-size:11.5px;fill:#555}.b{fill:#fff;stroke:#889}"
        ".l{fill:none;stroke:#4c78a8;stroke-opacity:.45}</style>",
        # The site's dark theme inverts pictures, so all are drawn on white.
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for above, below in sorted(_reduced(arrows)):
        (x1, y1), (x2, y2) = boxes[above], boxes[below]
        x1, x2 = x1 + width // 2, x2 + width // 2
        bend = (y1 + height + y2) // 2
        out.append(f'<path class="l" d="M{x1} {y1 + height}C{x1} {bend} {x2} {bend} {x2} {y2}"/>')
    for room, (x, y) in boxes.items():
        files, lines = sizes[room]
        middle = x + width // 2
        out.append(
            f'<rect class="b" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
            f'<text x="{middle}" y="{y + 19}" text-anchor="middle">{room}</text>'
            f'<text class="s" x="{middle}" y="{y + 36}" text-anchor="middle">{lines:,} lines in '
            f"{files}</text>"
        )
    return "\n".join([*out, "</svg>"]) + "\n"


def _reduced(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows without those that a longer path implies."""
    below: dict[str, set[str]] = {}
    for above, under in arrows:
        below.setdefault(above, set()).add(under)

    def reach(room: str) -> set[str]:
        return {room}.union(*(reach(next_one) for next_one in below.get(room, ())))

    return {
        (above, under)
        for above, under in arrows
        if not any(under in reach(other) for other in below[above] if other != under)
    }


if __name__ == "__main__":
    (Path(__file__).parent / "rooms.svg").write_text(draw())
