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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from tests.parity.kept import kept_mask
from wildcat_kv.compressors import (
    CUR,
    H2O,
    TOVA,
    AdaKV,
    CriticalKV,
    ExpectedAttention,
    KeyDiff,
    KNorm,
    KVzip,
    KVzipPlus,
    LagKV,
    PyramidKV,
    Repetition,
    SnapKV,
    StreamingLLM,
)
from wildcat_kv.compressors.base import Compressor, KVBlock, SharingCompressor
from wildcat_kv.data.haystack import build_context
from wildcat_kv.models import default_model_path
from wildcat_kv.models.rope import rotation_of

# Tokens of a text and the share of them to keep; of the second the reference, too, makes a pyramid.
TEXTS = ((1500, 0.25), (3000, 0.5))
README = Path("eval/README.md")
START, END = "<!-- parity -->", "<!-- /parity -->"
# Scores that differ by less, relatively, are the same but for the order of summation.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Case:
    """One of our methods beside the reference's; the sets must be the same, but for ties.

    Attributes:
        name: of both, and of the reference's results.
        method: ours, with the parameters that make it the same.
        press: the reference's class, for the table.
        note: for the table, how the definitions are made the same or why sets are not identical.
        pooled: the heads of a layer share their slots.
        texts: which of TEXTS the definitions are the same for.
        slots: take the reference's number of slots in each layer.
        off: by how many slots a layer may differ.
        sink: first tokens that the reference always keeps, and ours because the cache says so.
    """

    name: str
    method: Compressor
    press: str
    note: str = ""
    pooled: bool = False
    texts: Sequence[int] = (0, 1)
    slots: bool = False
    off: int = 0
    sink: int = 0


_PYRAMID = "ours rounds so that all layers add up: in some one slot more or fewer"
_TIES = "equal scores: the reference leaves the choice to `topk`"
CASES = (
    Case("streaming_llm", StreamingLLM(sink=4), "StreamingLLMPress(n_sink=4)"),
    Case("snapkv", SnapKV(), "SnapKVPress"),
    Case("pyramidkv", PyramidKV(), "PyramidKVPress", _PYRAMID, texts=(1,), off=1),
    Case("pyramidkv", SnapKV(), "PyramidKVPress", texts=(1,), slots=True),
    Case("tova", TOVA(), "TOVAPress"),
    Case("h2o", H2O(recent=0.0, average=True), "ObservedAttentionPress", "with `recent=0, average=True`"),
    Case("knorm", KNorm(), "KnormPress", _TIES),
    Case("keydiff", KeyDiff(), "KeyDiffPress"),
    Case("expected_attention", ExpectedAttention(), "ExpectedAttentionPress"),
    Case("lagkv", LagKV(), "LagKVPress", f"{_TIES}; all partitions have the same ranks"),
    Case("cur", CUR(), "CURPress"),
    Case("adakv", AdaKV(SnapKV()), "AdaKVPress(SnapKVPress)", pooled=True),
    Case("adakv, safeguard 0.8", AdaKV(SnapKV(), safeguard=0.8), "AdaKVPress(SnapKVPress)", pooled=True),
    Case("criticalkv", CriticalKV(SnapKV()), "CriticalKVPress(SnapKVPress)"),
    Case(
        "criticalkv, heads compete",
        CriticalKV(SnapKV(), safeguard=0.2),
        "CriticalAdaKVPress(SnapKVPress)",
        "with `safeguard=0.2`",
        pooled=True,
    ),
    Case("kvzip", KVzip(), "KVzipPress", "no chat template around the text; 4 sinks", pooled=True, sink=4),
    Case(
        "kvzip_plus",
        KVzipPlus(),
        "KVzipPress(kvzip_plus_normalization=True)",
        "as `kvzip`",
        pooled=True,
        sink=4,
    ),
)


@dataclass
class Agreement:
    """How far two methods agree, over layers and heads.

    Attributes:
        same: of each layer and head, whether the sets are identical.
        tied: the same but for tokens of equal scores.
        overlap: share of the reference's set that is in ours.
        gaps: of sets that differ, the largest relative difference between the scores of what was swapped.
    """

    same: list[bool] = field(default_factory=list)
    tied: list[bool] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def add(self, case: Case, ours: Tensor, theirs: Tensor, scores: Tensor) -> None:
        """Compare the sets of a layer, bool (heads, n), by the reference's scores (heads, n)."""
        self.same += (ours == theirs).all(-1).tolist()
        self.overlap += ((ours & theirs).sum(-1) / theirs.sum(-1)).tolist()
        heads = len(ours)
        if case.pooled:
            ours, theirs, scores = (tensor.reshape(1, -1) for tensor in (ours, theirs, scores))
        for mine, other, score in zip(ours, theirs, scores, strict=True):
            gained, lost = (score[chosen].sort(descending=True).values for chosen in (mine & ~other, other & ~mine))
            swapped = min(len(gained), len(lost))
            if swapped:
                gap = (gained[:swapped] - lost[:swapped]).abs() / lost[:swapped].abs().clamp_min(1e-30)
                self.gaps.append(float(gap.max()))
            tied = abs(len(gained) - len(lost)) <= case.off and (not swapped or self.gaps[-1] <= ROUNDING)
            self.tied += [tied] * (heads // len(ours))


def as_block(case: Case, found: dict[str, Tensor], layer: int) -> KVBlock:
    """A block of one layer all of whose entries are exact tokens, and all but the case's sinks to choose from."""
    queries, keys, values = (found[name][layer].unsqueeze(0) for name in ("queries", "keys", "values"))
    n, method, observation = keys.shape[2], case.method, case.method.observation
    if observation is not None and observation.latest is not None:
        queries = queries[:, :, -observation.latest :]
    block = KVBlock(
        keys=keys,
        values=values,
        valid=torch.ones(keys.shape[:3], dtype=torch.bool),
        items=n - case.sink,
        window=0,
        exact=n,
        seen=n,
        scale=keys.shape[-1] ** -0.5,
        layer_index=layer,
        sharing=range(len(found["keys"])),
        queries=None if observation is None else queries,
        carried_state=repeated(case, found, layer)
        if method.reads_twice
        else torch.zeros(*keys.shape[:3], method.state_size),
        rotation=rotation_of(AutoConfig.from_pretrained(default_model_path()), layer)
        if method.needs_rotation
        else None,
        output_projection=found["projection"][layer] if method.needs_output_projection else None,
    )
    return replace(block, carried_state=method.remember(block))


def choose(case: Case, found: dict[str, Tensor], budget: int) -> Iterator[Tensor]:
    """The tokens of each layer that our method keeps, bool (heads, n)."""
    method, shares, layers = case.method, [], range(len(found["keys"]))
    if isinstance(method, SharingCompressor):
        shares = method.deal([method.survey(as_block(case, found, layer)) for layer in layers], budget - case.sink)
    for layer in layers:
        rank = (int(found[f"kept.{case.name}"][layer, 0].sum()) if case.slots else budget) - case.sink
        block = as_block(case, found, layer)
        if isinstance(method, SharingCompressor):
            coreset = method.compress_share(block, rank, shares[layer]).coreset
        else:
            coreset = method.compress(block, rank).coreset
        kept = [keys[valid] for keys, valid in zip(coreset.keys[0], coreset.valid[0], strict=True)]
        mask = kept_mask(block.keys[0], kept)
        mask[:, : case.sink] = True
        yield mask


def repeated(case: Case, found: dict[str, Tensor], layer: int, chunk: int = 2048) -> Tensor:
    """Our scores of a layer's repetition from the reference's queries and keys, float32 (1, heads, n, 1)."""
    n, scores = found["keys"].shape[2], []
    for start in range(0, n, chunk):
        queries, keys, norms = (
            found[f"again.{start}.{name}"][layer].unsqueeze(0) for name in ("queries", "keys", "norms")
        )
        repetition = Repetition(
            queries=queries,
            keys=torch.cat((found["keys"][layer].unsqueeze(0), keys), dim=2),
            values=found["values"][layer].unsqueeze(0),
            start=start,
            stop=min(start + chunk, n),
            scale=keys.shape[-1] ** -0.5,
            output_projection=found["projection"][layer],
            input_norms=norms,
        )
        scores.append(case.method.reread(repetition))
    return torch.cat(scores, dim=2)


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
            for layer, ours in enumerate(choose(case, found, int(length * ratio))):
                theirs, scores = (found[f"{what}.{case.name}"][layer] for what in ("kept", "scores"))
                agreement.add(case, ours, theirs, scores)
    return agreements


def rows(agreements: Sequence[Agreement]) -> list[tuple[str, ...]]:
    """The table, its header first."""
    lines = [("method", "reference", "sets", "identical", "but for ties", "overlap", "note")]
    for case, found in zip(CASES, agreements, strict=True):
        counts = [str(len(found.same)), str(sum(found.same)), str(sum(found.tied))]
        overlap = f"{sum(found.overlap) / len(found.overlap):.5f}"
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
    shown = [(line[0].replace("`", ""), *line[2:6]) for line in lines]  # the README has the rest
    for place, name in enumerate(shown[0]):
        table.add_column(name, justify="right" if place else "left", no_wrap=True)
    for line in shown[1:]:
        table.add_row(*line)
    Console().print(table)
    write_readme(lines)
    wrong = [case.name for case, found in zip(CASES, agreements, strict=True) if not all(found.tied)]
    for name in wrong:
        print(f"{name} keeps other tokens than the reference", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
