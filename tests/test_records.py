"""Numbers and figures of the pages: each names its record or its command, and the record is of today's code."""

import inspect
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from eval import code
from eval.attention.config import RunConfig
from eval.attention.run import code_of as code_of_attention
from eval.cells import code_of, make_cells
from wildcat_kv.attention import registry as attention_registry
from wildcat_kv.compressors import SnapKV
from wildcat_kv.compressors.ours import OURS

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "eval/README.md", "benchmarks/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]

PATH = re.compile(r"(?<![\w-])(?<!eval/)(?<!benchmarks/)results/[\w.*/-]*[\w*]")
NAME = re.compile(r"`([a-z]\w*\*?)`")
COMMAND = re.compile(
    r"python -m (?:eval|benchmarks|docs|tests)\b|python docs/\w+\.py|wildcat-kv (?:size|export)\b"
    r"|(?:`|^ {4})make [a-z]+|configs/\w+/[\w*]+\.yaml",
    re.M,
)
FIGURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")
NUMBER = re.compile(r"[~±+-]*\d[\d,]*(?:\.\d|\s?%|$)")
# Tables of settings: their numbers are chosen, not measured.
SETTINGS = re.compile(r"\|.*\| (?:default|type) \|")
# A sentence that begins so tells the readers that the runs of its section are of earlier code.
EARLIER = re.compile(r"\bMeasured\s(?:before|while)\b")

# Pictures that show no measurement.
DRAWN = {
    "budget-short.svg": "arithmetic of the budget",
    "travel.svg": "a drawing",
    "chat.svg": "a recorded session, by docs/record.py",
    "demo.svg": "a recorded session, by docs/record.py",
}
# Tables that no command of today can measure.
NOT_KEPT = {
    ("docs/method-notes.md", "The search"): "variants whose code was not kept",
    ("docs/method-notes.md", "Variations of the present settings"): "variants whose code was not kept",
    ("docs/method-notes.md", "Shares after a second reading"): "variants whose code was not kept",
}


@dataclass(frozen=True)
class Section:
    """A heading of a page and the text up to the next heading.

    Args:
        page: path of the page.
        heading: text of the heading; empty before the first.
        text: lines below it.
    """

    page: str
    heading: str
    text: str

    def __str__(self):
        return f"{self.page}, section {self.heading!r}"

    @property
    def is_measured(self):
        """True if there is a table of numbers, not of default values, or a figure that is more than a drawing."""
        tables = re.findall(r"(?:^\|.*\n?)+", self.text, re.M)
        rows = [row for table in tables if not SETTINGS.match(table) for row in table.splitlines()]
        cells = [cell.strip(" *") for row in rows for cell in row.strip("|").split("|")[1:]]
        figures = [Path(path).name for path in FIGURE.findall(self.text)]
        return any(map(NUMBER.match, cells)) or any(name not in DRAWN for name in figures)

    def named(self, root):
        """List what it names of results, as paths that may be patterns."""
        paths = PATH.findall(self.text)
        for folder in ("eval", "attention"):
            if f"results/{folder}" in self.text:
                paths += [f"results/{folder}/{name}" for name in NAME.findall(self.text) if is_run(root, folder, name)]
        return list(dict.fromkeys(paths))


def is_run(root, folder, name):
    """True if a word alone names a run: there is one, or a file that describes one."""
    found = list((root / "results" / folder).glob(name))
    return bool(found) or ("_" in name and list((root / "configs" / folder).glob(f"{name}.yaml")) != [])


def sections(page, text):
    """Cut a page at its headings."""
    found, heading, lines, fenced = [], "", [], False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("#") and not fenced:
            found.append(Section(page, heading, "\n".join(lines)))
            heading, lines = re.sub(r"\s*\{.*\}$", "", line.lstrip("# ")), []
        lines.append(line)
    return [*found, Section(page, heading, "\n".join(lines))]


def problems(root, page, text):
    """List what is wrong with a page, a line each."""
    found = []
    for section in sections(page, text):
        named = section.named(root)
        if section.is_measured and not named and not COMMAND.search(section.text) and not_kept(section) is None:
            found.append(
                f"{section}: name the record in results/ that its numbers are from, or the command that measures them"
            )
        for path in named:
            matches = sorted(root.glob(path))
            if not matches:
                found.append(f"{section}: {path} is not there")
            for match in matches:
                found += [f"{section}: {line}" for line in wrong_record(root, match)]
                if not EARLIER.search(section.text):
                    found += [f"{section}: {line}" for line in outdated(root, match)]
    return list(dict.fromkeys(found))


def not_kept(section):
    return NOT_KEPT.get((section.page, section.heading))


def wrong_record(root, path):
    """Say what a run lacks; other records are JSON files."""
    name = path.relative_to(root)
    if is_folder_of_a_run(root, path):
        lacking = [file for file in ("run.json", "samples.jsonl.gz") if not (path / file).is_file()]
        return [f"{name} has no {file}" for file in lacking]
    if path.is_dir() and not any(path.rglob("*.json")) and not any(path.rglob("*.json.gz")):
        return [f"{name} has no record"]
    return []


def is_folder_of_a_run(root, path):
    return path.parent in (root / "results" / "eval", root / "results" / "attention") and path.is_dir()


def outdated(root, path):
    """Name the methods of a run whose code is not that of its record, with the way out."""
    folder = path if path.is_dir() else path.parent
    if not is_folder_of_a_run(root, folder) or not (folder / "run.json").is_file():
        return []
    manifest = json.loads((folder / "run.json").read_text())
    recorded, today = manifest.get("code", {}), todays(manifest)
    changed = {method: file for method, (print_, file) in today.items() if recorded.get(method) != print_}
    if not changed:
        return []
    name, files, methods = folder.relative_to(root), dict.fromkeys(changed.values()), list(changed)
    more = f" and {len(methods) - 3} more" if len(methods) > 3 else ""
    return [
        f"{name} is older than its methods ({', '.join(methods[:3])}{more}; {', '.join(files)}); see by "
        f"`python -m eval verify {name}` whether its numbers are those of today's code"
    ]


def todays(manifest):
    """Make the fingerprints of a run's methods by today's code, each with the method's file."""
    fields = manifest["config"]
    if "tasks" in manifest:
        chosen = RunConfig(**fields)
        kinds = {choice.name: attention_registry.OURS.get(choice.method) for choice in chosen.methods}
        prints = code_of_attention(chosen)
    else:
        settings = {"seed": fields["seed"], **fields["settings"]}
        cells = make_cells(fields["methods"], fields["ratios"], fields["max_tokens"], settings)
        kinds = {cell.method: OURS.get(cell.compressor) for cell in cells}
        prints = code_of(cells)
    files = {method: str(code.path_of(kind.__module__).relative_to(ROOT)) for method, kind in kinds.items() if kind}
    return {method: (prints[method], file) for method, file in files.items()}


@pytest.mark.filterwarnings("ignore:profile=")  # of runs that measure what the warning says
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_has_a_record_of_todays_code(page):
    found = problems(ROOT, page, (ROOT / page).read_text(encoding="utf-8"))
    assert not found, "\n" + "\n".join(found)


def test_what_is_excepted_is_still_there():
    headings = {
        (page, one.heading) for page in PAGES for one in sections(page, (ROOT / page).read_text(encoding="utf-8"))
    }
    assert NOT_KEPT.keys() <= headings


# Planted faults


PAGE = """# Planted

## Measured

| method | drift |
| --- | ---: |
| `snapkv` | 0.061 |

By `results/eval/planted`.
"""


@pytest.fixture
def planted(tmp_path):
    """A tree with a page and the run that it names, of today's code."""
    config = {"methods": ["snapkv", "knorm"], "ratios": [0.5], "max_tokens": [], "settings": {}, "seed": 0}
    cells = make_cells(config["methods"], config["ratios"], [], {"seed": 0})
    folder = tmp_path / "results" / "eval" / "planted"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": config, "code": code_of(cells)}))
    (folder / "samples.jsonl.gz").touch()
    return tmp_path


def test_a_page_with_a_record_of_todays_code_passes(planted):
    assert problems(planted, "docs/planted.md", PAGE) == []


def test_a_change_of_a_method_makes_its_figures_stale(planted, monkeypatch):
    original = code.read_source
    changed = inspect.getsource(inspect.getmodule(SnapKV)).replace("self.kernel // 2", "self.kernel // 3")
    monkeypatch.setattr(
        code, "read_source", lambda module: changed if module == SnapKV.__module__ else original(module)
    )
    (line,) = problems(planted, "docs/planted.md", PAGE)
    assert line == (
        "docs/planted.md, section 'Measured': results/eval/planted is older than its methods (snapkv; "
        "wildcat_kv/compressors/snapkv.py); see by `python -m eval verify results/eval/planted` whether its numbers "
        "are those of today's code"
    )
    told = PAGE.replace("By `", "Measured before it was made faster, by `")
    assert problems(planted, "docs/planted.md", told) == []


def test_a_record_that_is_not_there_is_named(planted):
    page = "docs/planted.md"
    assert problems(planted, page, PAGE.replace("planted`", "gone`")) == [
        f"{page}, section 'Measured': results/eval/gone is not there"
    ]
    assert problems(planted, page, PAGE.replace("planted`", "gone_*`")) == [
        f"{page}, section 'Measured': results/eval/gone_* is not there"
    ]
    (planted / "results" / "eval" / "planted" / "samples.jsonl.gz").unlink()
    assert problems(planted, page, PAGE) == [
        f"{page}, section 'Measured': results/eval/planted has no samples.jsonl.gz"
    ]


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (PAGE.replace("By `results/eval/planted`.", ""), False),
        (PAGE.replace("By `results/eval/planted`.", "`python -m eval run configs/eval/planted.yaml` prints it."), True),
        ("## Shown\n\n![Bars.](images/bars.svg)\n", False),
        ("## Shown\n\n![Boxes.](images/travel.svg)\n", True),
        ("## Named\n\n| method | takes |\n| --- | --- |\n| `snapkv` | 4-bit slots |\n", True),
        ("## One\n\nBy `results/eval/planted`.\n\n## Two\n\n| a | 0.5 |\n", False),
    ],
    ids=["table", "command", "figure", "drawing", "words", "another section"],
)
def test_numbers_without_a_source_are_named(planted, text, passes):
    found = problems(planted, "docs/planted.md", text)
    assert [line.rpartition(": ")[2].startswith("name the record") for line in found] == ([] if passes else [True])
