"""The cells of an evaluation: every method at every budget, and the exact cache once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from transformers import Cache, DynamicCache

from eval.baselines import METHODS, QuantizedBaseline, find_baseline
from eval.code import compressor_code, fingerprint
from wildcat_kv import CompressedCache, Context
from wildcat_kv.compressors import Compressor, available
from wildcat_kv.compressors.registry import find, resolve
from wildcat_kv.config import WildCatConfig
from wildcat_kv.lm_eval.options import EXACT, reads_twice
from wildcat_kv.validation import did_you_mean

BASELINE = "wildcat"  # compared with every other method, unless a run names another

# Tokens of the sink where a configuration says nothing: the published protocol's.
PUBLISHED_SINK = 32


@dataclass(frozen=True)
class Cell:
    """One method at one budget.

    Attributes:
        method: name of the row in tables: the compressor's, or a variant's own.
        compressor: name of the compressor, None for the exact cache.
        ratio: share of the tokens to keep, or None.
        max_tokens: most tokens to store, or None.
        settings: other fields of `WildCatConfig`.
        parameters: parameters of the compressor that differ from its own.
        family: name that variants with other bits share, and one line of the frontier; the method's by default.
    """

    method: str
    compressor: str | None
    ratio: float | None = None
    max_tokens: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""

    @property
    def bits(self) -> int | None:
        """Bits of a stored number; None for the model's dtype."""
        return self.settings.get("bits")

    @property
    def exact(self) -> bool:
        """True if nothing is compressed."""
        return self.compressor is None

    def __str__(self) -> str:
        budget = [f"{self.ratio:g}"] if self.ratio is not None else []
        budget += [f"{self.max_tokens} tokens"] if self.max_tokens is not None else []
        return " ".join([self.method, *budget])

    @property
    def key(self) -> tuple[str, float | None, int | None]:
        """The cell's name, unique in a run."""
        return self.method, self.ratio, self.max_tokens

    def code(self) -> str | None:
        """Make the fingerprint of the method's code and parameters; None for the exact cache and foreign packages."""
        if self.compressor is None:
            return None
        if self._baseline() is not None:
            return fingerprint([QuantizedBaseline], {**self.parameters, "method": self.compressor, "bits": self.bits})
        return compressor_code(self._made({"name": self.compressor, **self.parameters}, self._config()))

    def compress(self, context: Context, tokenizer: Any) -> Any:
        """Compress a context into a cache; the context stays as it is."""
        if self.compressor is None:
            return context.exact.clone()
        if (baseline := self._baseline()) is not None:
            return baseline.compress(context)
        return context.compress(self._config(), compressor=self._compressor(), tokenizer=tokenizer)

    def empty(self, model_config: Any) -> Cache:
        """Make a cache that compresses what it is yet to read."""
        if self.compressor is None:
            return DynamicCache(config=model_config)
        return CompressedCache(model_config, self._config(), compressor=self._compressor())

    def check_tasks(self, *, streams: bool) -> None:
        """Refuse a method that cannot be measured on the tasks of a run.

        Args:
            streams: True if one of the tasks compresses while it reads on.

        Raises:
            ValueError: the method reads a text twice, or compresses nothing after a prompt.
        """
        if self.compressor is None:
            return
        if self.compressor in METHODS:
            if streams:
                raise ValueError(
                    f"methods={self.method!r} is measured on contexts that were read; leave it out, or leave out the "
                    "tasks that compress while they read (perplexity, decoding, wikitext)"
                )
            return
        method = next(known for known in available() if known.name == self.compressor)
        later = method.decodes and not (streams and method.reads_twice)
        if later or not (streams or self.max_tokens is not None):
            return
        reasons = ["reads a text twice"] * method.reads_twice + ["compresses nothing later"] * (not method.decodes)
        reason = " and ".join(reasons)
        raise ValueError(
            f"methods={self.method!r} {reason}; leave it out, or leave out max_tokens and the tasks that compress "
            "while they read (perplexity, decoding, wikitext)"
        )

    def check_model(self, model_config: Any) -> None:
        """Refuse a model that cannot be compressed, or a budget that the method cannot reach.

        Raises:
            ValueError: the cache refuses it.
        """
        if (baseline := self._baseline()) is not None:
            baseline.empty(model_config)
        elif self.compressor is not None and not reads_twice(self.compressor):
            CompressedCache(model_config, self._config(), compressor=self._compressor())

    def check(self) -> None:
        """Refuse wrong settings or parameters, before a model is loaded.

        Raises:
            ValueError: names the wrong one.
        """
        if self._baseline() is None:
            self._compressor()

    def _baseline(self) -> QuantizedBaseline | None:
        """Make the cache of Transformers that is measured beside the methods, if it is one."""
        return find_baseline(self.compressor, self.ratio, self.settings, self.parameters)

    def _compressor(self) -> str | Compressor:
        """Make the method, with its changed parameters."""
        assert self.compressor is not None
        settings = self._config()  # wrong ones are refused without parameters, too
        if not self.parameters:
            return self.compressor
        return self._made({"name": self.compressor, **self.parameters}, settings)

    def _made(self, given: str | Mapping[str, Any], settings: WildCatConfig) -> Compressor:
        """Make a method by its name, or by its name and changed parameters."""
        if not isinstance(given, Mapping):
            return resolve(given, settings)
        parameters = dict(given)
        name = str(parameters.pop("name", ""))
        kind = find(name)  # `resolve` refuses methods that read a text twice: a cache cannot use them by itself
        method = resolve(name, settings) if kind is None else kind.of(settings)
        known: list[str] = [field.name for field in fields(method)] if is_dataclass(method) else []
        for name, value in parameters.items():
            if name not in known:
                raise ValueError(
                    f"methods={self.method!r}: parameters={name!r}={value!r}: {type(method).__name__} has no such "
                    f"parameter; it has {', '.join(known) or 'none'}"
                )
        # A method among the parameters, such as the scorer of AdaKV, goes by its name, or has parameters in its turn.
        changed = {
            name: self._made(value, settings) if isinstance(getattr(method, name), Compressor) else value
            for name, value in parameters.items()
        }
        return replace(method, **changed)  # type: ignore[type-var]

    def _config(self) -> WildCatConfig:
        return WildCatConfig(
            **{"sink": PUBLISHED_SINK, **self.settings, "ratio": self.ratio, "max_tokens": self.max_tokens}
        )


def make_cells(
    methods: Sequence[str | Mapping[str, Any]],
    ratios: Sequence[float],
    max_tokens: Sequence[int],
    settings: Mapping[str, Any],
) -> list[Cell]:
    """Make the exact cache's cell, then every method's at every budget, in the order given.

    Args:
        methods: names of compressors; or mappings with a "name" of their own, the "compressor", fields of
            `WildCatConfig`, "parameters", a mapping of the compressor's own, and "ratios" instead of the budgets of
            all. "bits" may be a list: each number but None is a variant, such as NAME_4bit, of the family NAME.
        ratios: shares to keep.
        max_tokens: budgets in tokens.
        settings: fields of `WildCatConfig` for all methods.

    Raises:
        ValueError: an unknown method, two of one name, a wrong budget or none, or a wrong field.
    """
    _check_once("ratios", ratios)
    _check_once("max_tokens", max_tokens)
    budgets: list[dict[str, Any]] = [{"ratio": ratio} for ratio in ratios]
    budgets += [{"max_tokens": most} for most in max_tokens]
    known = _methods()
    cells, seen = [Cell(EXACT, None, family=EXACT)], {EXACT}
    for entry in methods:
        given = {"compressor": entry} if isinstance(entry, str) else dict(entry)
        if given.get("compressor") == EXACT:
            continue  # it is there already
        for cell in _variants(given, budgets, settings, known):
            if cell.method in seen:
                raise ValueError(f"methods: {cell.method!r} is there twice; give a variant a name of its own")
            cell.check()
            cells.append(cell)
        seen |= {cell.method for cell in cells}
    return cells


def code_of(cells: Sequence[Cell]) -> dict[str, str]:
    """List the fingerprints of the methods that have one, by their names in tables."""
    first = {cell.method: cell for cell in reversed(cells)}  # the budgets of a method share its code
    return {method: code for method in dict.fromkeys(cell.method for cell in cells) if (code := first[method].code())}


def _variants(
    given: dict[str, Any], budgets: list[dict[str, Any]], settings: Mapping[str, Any], known: list[str]
) -> list[Cell]:
    """Make the cells of one entry: each of its bits at each of its budgets."""
    name = str(given.pop("name", given.get("compressor")))
    compressor = str(given.pop("compressor", name))
    if compressor not in known:
        hint = did_you_mean(compressor, known)
        raise ValueError(f"methods={compressor!r}: no such method; {hint}there are exact, {', '.join(known)}")
    parameters: Any = given.pop("parameters", {})
    if not isinstance(parameters, Mapping):
        raise ValueError(f"methods={name!r}: parameters={parameters!r} must be a mapping, such as {{ridge: 0.0}}")
    if given.keys() & {"ratio", "max_tokens"}:
        raise ValueError(
            f"methods={name!r}: its budgets are those of all methods; leave ratio and max_tokens out, or give it "
            "ratios, a list"
        )
    own = _own_budgets(name, given.pop("ratios", None))
    budgets = budgets if own is None else own
    if not budgets:
        raise ValueError("ratios=[] and max_tokens=[]: give at least one budget, for example ratios: [0.25]")
    several = given.get("bits")
    if not isinstance(several, list):
        named = [(name, given)]
    elif several:
        _check_once(f"methods={name!r}: bits", several)
        named = [(name if bits is None else f"{name}_{bits}bit", {**given, "bits": bits}) for bits in several]
    else:
        raise ValueError(f"methods={name!r}: bits=[]: give at least one number, for example bits: [4]")
    return [
        Cell(method, compressor, settings={**settings, **fields}, parameters=parameters, family=name, **budget)
        for method, fields in named
        for budget in budgets
    ]


def _own_budgets(name: str, ratios: Any) -> list[dict[str, Any]] | None:
    """Read an entry's own ratios; None where it has none."""
    if ratios is None:
        return None
    if not isinstance(ratios, list) or not ratios:
        raise ValueError(f"methods={name!r}: ratios={ratios!r} must be a list of shares to keep, such as [1, 0.25]")
    _check_once(f"methods={name!r}: ratios", ratios)
    wrong = next((ratio for ratio in ratios if type(ratio) not in (int, float) or not 0 < ratio <= 1), None)
    if wrong is not None:
        raise ValueError(f"methods={name!r}: ratios={wrong!r} must be a share to keep, in (0, 1]")
    return [{"ratio": float(ratio)} for ratio in ratios]


def _check_once(name: str, values: Sequence[Any]) -> None:
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"{name}={twice!r} is there twice")


def _methods() -> list[str]:
    return [*(method.name for method in available()), *METHODS]
