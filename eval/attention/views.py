"""Pictures of what a model saw: written during a run, put side by side in its report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from eval.attention.tasks import Case, Measured

FOLDER = "views"


def save_view(output: Path, case: Case, measured: Measured) -> None:
    """Write a measurement's view, that of the first seed that has one."""
    if measured.view is None:
        return
    path = view_path(output, case.group, case.input, measured.method)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(measured.view).save(path)


def view_figures(
    output: Path, groups: Sequence[str], inputs: Sequence[str], methods: Sequence[str]
) -> Iterator[tuple[str, Figure]]:
    """Draw one figure for each group and input that has views: saliency and features, a panel for each method."""
    for group in groups:
        for name in inputs:
            paths = {method: view_path(output, group, name, method) for method in methods}
            found = {method: path for method, path in paths.items() if path.is_file()}
            if found:
                yield f"views-{_plain(group)}-{_plain(name)}", side_by_side(f"{name}, {group}", found)


def side_by_side(title: str, paths: Mapping[str, Path], columns: int = 3) -> Figure:
    """Draw views, a panel for each method.

    Args:
        title: input and group.
        paths: files of the views by the panels' titles.
        columns: most panels in a row.
    """
    columns = min(columns, len(paths))
    rows = math.ceil(len(paths) / columns)
    figure = Figure(figsize=(3.2 * columns, 1.9 * rows + 0.3), layout="constrained")
    figure.suptitle(f"{title}: saliency, and principal components of the patches' features")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for axes, (method, path) in zip(panels, paths.items(), strict=False):
        with Image.open(path) as image:
            axes.imshow(image.copy(), interpolation="nearest")
        axes.set_title(method, fontsize=7)
    return figure


def view_path(output: Path, group: str, name: str, method: str) -> Path:
    """Give the file of a method's view of an input."""
    return output / FOLDER / f"{_plain(group)}-{_plain(name)}-{_plain(method)}.png"


def _plain(text: str) -> str:
    """Write a name with letters that every file system takes.

    Example:
        >>> _plain("near_wildcat A+B, 1,024")
        'near_wildcat-a-b-1-024'
    """
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-")
