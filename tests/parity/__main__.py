"""Compare what our methods keep with what the reference library keeps of the same keys, values and queries.

    make parity

The reference, kvpress, needs an older Transformers, so it runs in an environment of its own and hands its tensors and
choices over in files. Both sides choose from the very same tensors of the default model, without sinks or a
window of the cache, so that a difference is one of the method.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from tests.parity.kept import kept_mask
from wildcat_kv.compressors import CUR, H2O, TOVA, AdaKV, KeyDiff, KNorm, LagKV, PyramidKV, SnapKV, StreamingLLM
from wildcat_kv.compressors.base import Compressor, KVBlock
from wildcat_kv.haystack import build_context
from wildcat_kv.models import default_model_path

# Tokens of a text and the share of them to keep; of the second the reference, too, makes a pyramid.
TEXTS = ((1500, 0.25), (3000, 0.5))
README = Path("eval/README.md")
START, END = "<!-- parity -->", "<!-- /parity -->"
# Scores that differ by less are the same but for the order of summation.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Case:
    """One of our methods beside the reference's.

    Attributes:
        name: of both, and of the reference's results.
        method: ours, with the parameters that make it the same.
        press: the reference's class, for the table.
        pooled: the heads of a layer share their slots.
        texts: which of TEXTS the definitions are the same for.
        slots: take the reference's number of slots in each layer.
        declared: the same sets are promised, but for ties.
        note: what differs.
    """

    name: str
    method: Compressor
    press: str
    pooled: bool = False
    texts: Sequence[int] = (0, 1)
    slots: bool = False
    declared: bool = True
    note: str = ""


CASES = (
    Case("streaming_llm", StreamingLLM(sink=4), "StreamingLLMPress(n_sink=4)"),
    Case("snapkv", SnapKV(), "SnapKVPress"),
    Case("pyramidkv", PyramidKV(), "PyramidKVPress", texts=(1,), declared=False),
    Case("pyramidkv", SnapKV(), "PyramidKVPress", texts=(1,), slots=True),
    Case("tova", TOVA(), "TOVAPress"),
    Case("h2o", H2O(recent=0.0, average=True), "ObservedAttentionPress"),
    Case("knorm", KNorm(), "KnormPress"),
    Case("keydiff", KeyDiff(), "KeyDiffPress"),
    Case("lagkv", LagKV(), "LagKVPress"),
    Case("cur", CUR(), "CURPress"),
    Case("adakv", AdaKV(SnapKV()), "AdaKVPress(SnapKVPress)", pooled=True),
)


@dataclass
class Agreement:
    """How far two methods agree, over layers and heads.

    Attributes:
        same: of each layer and head, whether the sets are identical.
        tied: the same but for tokens of equal scores.
        overlap: share of the reference's set that is in ours.
        gaps: of sets that differ, the largest relative difference of the scores of what was swapped.
    """

    same: list[bool] = field(default_factory=list)
    tied: list[bool] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def add(self, ours: Tensor, theirs: Tensor, scores: Tensor, pooled: bool) -> None:
        """Compare the sets of a layer, bool (heads, n), by the reference's scores (heads, n)."""
        self.same += (ours == theirs).all(-1).tolist()
        self.overlap += ((ours & theirs).sum(-1) / theirs.sum(-1)).tolist()
        heads = len(ours)
        if pooled:
            ours, theirs, scores = (tensor.reshape(1, -1) for tensor in (ours, theirs, scores))
        for mine, other, score in zip(ours, theirs, scores, strict=True):
            gained, lost = (score[chosen].sort().values for chosen in (mine & ~other, other & ~mine))
            tied = len(gained) == len(lost)
            if tied and len(gained):
                self.gaps.append(float(((gained - lost).abs() / lost.abs()).max()))
                tied = self.gaps[-1] <= ROUNDING
            self.tied += [tied] * (heads // len(ours))


def as_block(method: Compressor, found: dict[str, Tensor], layer: int) -> KVBlock:
    """A block of one layer all of whose entries are exact tokens to choose from."""
    queries, keys, values = (found[name][layer].unsqueeze(0) for name in ("queries", "keys", "values"))
    n, observation = keys.shape[2], method.observation
    if observation is not None and observation.latest is not None:
        queries = queries[:, :, -observation.latest :]
    block = KVBlock(
        keys=keys,
        values=values,
        valid=torch.ones(keys.shape[:3], dtype=torch.bool),
        held=[n],
        lengths=[n],
        window=[0],
        exact=[n],
        seen=[n],
        scale=keys.shape[-1] ** -0.5,
        layer_index=layer,
        layer_count=len(found["keys"]),
        queries=None if observation is None else queries,
        queried=None if observation is None else [queries.shape[2]],
        memory=torch.zeros(*keys.shape[:3], method.memory) if method.memory else None,
    )
    return replace(block, memory=method.remember(block)) if method.memory else block


def choose(case: Case, found: dict[str, Tensor], layer: int, budget: int) -> Tensor:
    """The tokens of a layer that our method keeps, bool (heads, n)."""
    if case.slots:
        budget = int(found[f"kept.{case.name}"][layer, 0].sum())
    block = as_block(case.method, found, layer)
    coreset = case.method.compress(block, [budget])
    kept = [keys[valid] for keys, valid in zip(coreset.keys[0], coreset.valid[0], strict=True)]
    return kept_mask(block.keys[0], kept)


def write_job(folder: Path) -> list[Path]:
    """Write `job.json` for the reference, with the texts as token ids; returns where its results will be."""
    model = default_model_path()
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    texts = []
    for seed, (length, ratio) in enumerate(TEXTS):
        ids = tokenizer(build_context(tokenizer, length + 20, (), seed=seed), add_special_tokens=False).input_ids
        texts.append({"ids": ids[:length], "ratio": ratio, "output": str(folder / f"{length}.safetensors")})
    (folder / "job.json").write_text(json.dumps({"model": str(model), "texts": texts}))
    return [Path(text["output"]) for text in texts]


@torch.no_grad()
def compare(results: Sequence[Path]) -> list[Agreement]:
    """How far each of CASES agrees with the reference's results, one file for each of TEXTS."""
    agreements = [Agreement() for _ in CASES]
    for text, (path, (length, ratio)) in enumerate(zip(results, TEXTS, strict=True)):
        found = load_file(path)
        for case, agreement in zip(CASES, agreements, strict=True):
            if text not in case.texts:
                continue
            for layer in range(len(found["keys"])):
                ours = choose(case, found, layer, int(length * ratio))
                theirs, scores = (found[f"{what}.{case.name}"][layer] for what in ("kept", "scores"))
                agreement.add(ours, theirs, scores, case.pooled)
    return agreements


def rows(agreements: Sequence[Agreement]) -> list[tuple[str, ...]]:
    """The table, its header first."""
    lines = [("method", "reference", "sets", "identical", "but for ties", "overlap", "what differs")]
    for case, found in zip(CASES, agreements, strict=True):
        counts = [str(len(found.same)), str(sum(found.same)), str(sum(found.tied))]
        overlap = f"{sum(found.overlap) / len(found.overlap):.4f}"
        name = f"`{case.name}`" + (", the reference's slots" if case.slots else "")
        lines.append((name, f"`{case.press}`", *counts, overlap, case.note))
    return lines


def write_readme(lines: Sequence[Sequence[str]]) -> None:
    """Put the table between the markers of the README."""
    text = README.read_text()
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    ruled = [lines[0], ["---"] * 2 + ["---:"] * 4 + ["---"], *lines[1:]]
    table = "\n".join(f"| {' | '.join(line)} |" for line in ruled)
    README.write_text(f"{before}\n\n{table}\n\n{after}")


def main() -> int:
    """Run both sides, print and write the table; 1 if a method that should agree does not."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="python of the environment with kvpress")
    parser.add_argument("--folder", type=Path, help="keep the files here, and use the reference's if they are there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        results = write_job(folder)
        if not all(path.is_file() for path in results):
            command = [arguments.reference, "-m", "tests.parity.reference", folder / "job.json"]
            subprocess.run(command, check=True)
        agreements = compare(results)
    lines = rows(agreements)
    table = Table(title="Kept by our methods and by kvpress")
    for name in lines[0]:
        table.add_column(name, justify="right" if name in lines[0][2:6] else "left")
    for line in lines[1:]:
        table.add_row(*(cell.replace("`", "") for cell in line))
    Console().print(table)
    write_readme(lines)
    wrong = [case.name for case, found in zip(CASES, agreements, strict=True) if case.declared and not all(found.tied)]
    for name in wrong:
        print(f"{name} keeps other tokens than the reference", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
