"""Count what a prefill makes a device do: operations that launch a kernel, and reads that the host waits for.

Counted at torch's dispatcher, on the CPU, which is made to compute as a device does. Views, allocations and operations
without a result in memory do not count. An operation counts once, whatever number of kernels it takes on a device, and
so does a launch of Triton's. What the host does in tensors of its own counts too. Models of two depths tell apart what
every layer takes and what a pass takes once; what the exact cache takes is subtracted.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM

import wildcat_kv
from benchmarks.options import split_names
from wildcat_kv import CompressedCache
from wildcat_kv.coreset import launching
from wildcat_kv.hook.keyword import CACHE

DEPTHS = (2, 4)  # layers of the models to count in
_SOURCE = str(Path(wildcat_kv.__file__).parent)
# No kernel, though the schema says neither view nor allocation.
_FREE = {"_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "resize_", "promote_types"}
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


class Cost(NamedTuple):
    """Hold what a cache adds to a prefill, on average.

    Attributes:
        launches_per_layer: operations.
        launches_per_pass: operations that a pass takes once.
        reads_per_layer: times that the host waits for the device.
        reads_per_pass: times that it waits once a pass.
        places: where it does, "file:line".
    """

    launches_per_layer: float
    launches_per_pass: float
    reads_per_layer: float
    reads_per_pass: float
    places: tuple[str, ...]


def show(
    tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=256)] = 4096,
    methods: Annotated[str, typer.Option(help="Names with commas between.")] = "wildcat,query_wildcat",
) -> None:
    """Count what compressing makes a device launch and the host wait for, a layer of a prefill."""
    for method in split_names(methods):
        cost = prefill_cost(method, tokens)
        launches = f"{cost.launches_per_layer:g} launches a layer, {cost.launches_per_pass:g} a pass"
        reads = f"{cost.reads_per_layer:g} reads a layer, {cost.reads_per_pass:g} a pass"
        print(f"{method}, {tokens} tokens: {launches}; {reads}")
        print("    " + ", ".join(cost.places))


def prefill_cost(method: str, tokens: int, ratio: float = 0.25) -> Cost:
    """Count what a cache of some method adds to the prefill of a tiny model with 8 key heads."""
    extra, reads = [], []
    for depth in DEPTHS:
        model = _model(depth)
        ours = _count(model, CompressedCache(model.config, compressor=method, ratio=ratio), tokens)
        exact = _count(model, DynamicCache(config=model.config), tokens)
        extra.append(ours.operations.total() - exact.operations.total())
        reads.append(ours.reads)
    few, many = DEPTHS
    layer = (extra[1] - extra[0]) / (many - few)
    waits = (reads[1].total() - reads[0].total()) / (many - few)
    one = reads[0].total() - few * waits
    return Cost(layer, extra[0] - few * layer, waits, one, tuple(sorted(reads[1])))


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """Compute on the CPU in the way that devices do, see `wildcat_kv/coreset/launching.py`."""
    launching.HOSTS.remove("cpu")
    try:
        yield
    finally:
        launching.HOSTS.add("cpu")


@torch.no_grad()
def _count(model: Any, cache: Cache, tokens: int) -> Launches:
    ids = torch.randint(1, 50, (1, tokens), generator=torch.Generator().manual_seed(0))
    with as_on_a_device(), Launches() as launches:
        model(ids, **{CACHE: cache}, logits_to_keep=1)
    return launches


def _model(layers: int) -> Any:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=8,
        vocab_size=50,
        max_position_embeddings=2**16,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


class Launches(TorchDispatchMode):
    """Counts operations while it is entered.

    Attributes:
        operations: operations by name.
        reads: places in the package that made the host wait, "file:line".
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation, and run it."""
        name = func._schema.name.removeprefix("aten::")
        if name in _WAITING or (name.startswith(("index", "_index")) and _by_mask(args)):
            self.reads[_place()] += 1
        made = func(*args, **(kwargs or {}))
        if not _is_free(func, name) and any(isinstance(one, Tensor) and one.numel() for one in tree_leaves(made)):
            self.operations[name] += 1
        return made

    def __enter__(self) -> Launches:
        """Begin to count; `tolist` copies to the host without the dispatcher."""
        self._tolist = Tensor.tolist
        counter, tolist = self, Tensor.tolist

        def noted(tensor: Tensor) -> Any:
            counter.reads[_place()] += 1
            return tolist(tensor)

        Tensor.tolist = noted  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        super().__exit__(*error)
        Tensor.tolist = self._tolist  # type: ignore[method-assign]


def _by_mask(args: Any) -> bool:
    """Tell if a mask indexes, whose True places the host must count."""
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _is_free(func: Any, name: str) -> bool:
    if name in _FREE or name in _WAITING or "empty" in name:
        return True
    aliases = [one.alias_info for one in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _place() -> str:
    """Name the line of the package that is running."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(_SOURCE):
            return f"{Path(frame.filename).relative_to(_SOURCE)}:{frame.lineno}"
    return "elsewhere"
