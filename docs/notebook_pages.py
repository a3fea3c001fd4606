"""Show notebooks as pages, as they were run; a hook of mkdocs.yml."""

import json
from pathlib import PurePosixPath
from typing import Any

from mkdocs.structure.files import File


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each notebook, beside the notebook itself."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = PurePosixPath(notebook.src_uri)
        link = f"[This page as a notebook]({name.name}){{ download }}\n"
        content = f"{_markdown(json.loads(notebook.content_string))}\n{link}"
        files.append(File.generated(config, str(name.with_suffix(".md")), content=content))
    return files


def _markdown(notebook: dict[str, Any]) -> str:
    """Write the cells one under the other: texts, code, and what the code printed."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = "".join(line for output in cell.get("outputs", ()) for line in output["text"])
        if printed:
            parts.append(f"```text\n{printed}```")
    return "\n\n".join(parts) + "\n"
