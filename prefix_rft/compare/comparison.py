"""A comparison: cells, each a configuration with seeds, from a TOML file, checked as a whole."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prefix_rft.checks import ConfigError, require
from prefix_rft.config import Config, by_key, config_from_dict, load_config

SHIPPED = Path(__file__).parents[1] / "comparisons"
_KEYS = ("config", "seeds", "reference", "common", "cells")
_NAME = re.compile(r"[\w.-]*\w")
# A run gets these from its cell, its seed and its folder.
_GIVEN = ("name", "output_dir", "seed")
# Cells that differ in one of these do not start from one base, or are not measured alike...
_SHARED = ("base.", "data.", "eval.", "model.path", "model.chat_template", "testbed.", "tiers.")
# ... except in these.
_FREE = ("base.cache_dir", "data.demonstration_fraction", "data.strict", "data.seed", "eval.every")
# Neither base nor held-out problems follow from these where both are given.
_OF_TRAINING = ("base.", "data.path", "data.split", "data.columns", "testbed.", "tiers.")
GENERATED = ("testbed", "tiers")  # values of data.path for problems that are made from a seed


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A configuration that is run with each of its seeds."""

    name: str
    seeds: tuple[int, ...]
    start: str | None  # the cell from whose model it begins; None: from the base
    config: Config  # of any seed


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A cell with one seed."""

    cell: str
    seed: int
    start: "Run | None"
    config: Config

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Cells over one base, in the order of the file."""

    name: str
    cells: dict[str, Cell]
    reference: str  # the cell that the others are compared with
    folder: Path
    text: str  # of the file

    def runs(self) -> list[Run]:
        """In the order in which they are started: by seed, then the cells as in the file."""
        seeds = sorted({seed for cell in self.cells.values() for seed in cell.seeds})
        made: dict[tuple[str, int], Run] = {}
        for seed in seeds:
            for cell in self.cells.values():
                if seed in cell.seeds:
                    self._add(made, cell, seed)
        return list(made.values())

    def _add(self, made: dict[tuple[str, int], Run], cell: Cell, seed: int) -> Run:
        """The run, put behind the one that it starts from."""
        if (cell.name, seed) not in made:
            start = None if cell.start is None else self._add(made, self.cells[cell.start], seed)
            name = f"{cell.name}-{seed}"
            config = replace(cell.config, name=name, output_dir=str(self.folder / name), seed=seed)
            if start is not None:
                config = replace(config, model=replace(config.model, path=str(start.folder)))
            made[cell.name, seed] = Run(cell=cell.name, seed=seed, start=start, config=config)
        return made[cell.name, seed]

    def with_starts(self, names: tuple[str, ...]) -> set[str]:
        """These cells and all that they start from.

        Raises:
            ConfigError: there is no such cell.
        """
        found: set[str] = set()
        for name in names:
            _require_cell(name, self.cells, "--only")
            while name is not None and name not in found:
                found.add(name)
                name = self.cells[name].start
        return found


def load_comparison(name_or_path: str, output_dir: Path | None = None) -> Comparison:
    """Read a TOML file, or a comparison shipped with the package by its bare name.

    Args:
        output_dir: the folder of the runs; None: runs/compare/<name>.
    Raises:
        ConfigError: whatever is wrong with the file or with the configuration of a cell; the
            message starts with the file.
    """
    file = Path(name_or_path)
    if not file.is_file():
        names = sorted(entry.stem for entry in SHIPPED.glob("*.toml"))
        if name_or_path not in names:
            raise ConfigError(
                f"comparison: expected a TOML file or one of {', '.join(names)}, got {name_or_path}"
            )
        file = SHIPPED / f"{name_or_path}.toml"
    try:
        values = _read(file)
        require(_NAME.fullmatch(file.stem) is not None, "file name", _ALLOWED, file.stem)
        folder = Path("runs/compare") / file.stem if output_dir is None else output_dir
        return _comparison(values, file, folder)
    except ConfigError as error:
        raise ConfigError(f"{name_or_path}: {error}") from None


_ALLOWED = "letters, digits, '_', '-' and '.'"


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        if twice := re.match(r"Cannot declare \('cells', '(.+?)'\) twice", str(error)):
            name, where = twice[1], str(error)[twice.end() :].strip()
            raise ConfigError(f"cells: two cells of the name {name!r} {where}") from None
        raise ConfigError(f"no valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"no valid TOML: {error}") from None


def _comparison(values: dict[str, Any], file: Path, folder: Path) -> Comparison:
    for key in values:
        require(key in _KEYS, "key", f"one of {', '.join(_KEYS)}", key)
    config_name, common = values.get("config"), values.get("common", {})
    require(
        isinstance(config_name, str), "config", "the name or path of a configuration", config_name
    )
    require(isinstance(common, dict), "common", "a table of keys of a configuration", common)
    tables = values.get("cells")
    require(isinstance(tables, dict) and len(tables) > 0, "cells", "at least one cell", tables)
    seeds = _seeds("seeds", values.get("seeds"))
    beside = file.parent / config_name
    shared = load_config(beside if beside.is_file() else config_name)
    shared = _overridden(shared, "common", common)
    cells = {name: _cell(name, table, shared, seeds) for name, table in tables.items()}
    _check_folders(cells)
    for cell in cells.values():
        _check_start(cell, cells)
    _check_base(cells)
    reference = values.get("reference", next(iter(cells)))
    _require_cell(reference, cells, "reference")
    return Comparison(
        name=file.stem,
        cells=cells,
        reference=reference,
        folder=folder,
        text=file.read_text(encoding="utf-8"),
    )


def _seeds(key: str, seeds: Any) -> tuple[int, ...]:
    is_list = isinstance(seeds, list) and len(seeds) > 0
    are_seeds = is_list and all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    require(are_seeds, key, "a list of at least one whole number in [0, 2**32)", seeds)
    require(len(set(seeds)) == len(seeds), key, "each seed once", seeds)
    return tuple(seeds)


def _cell(name: str, table: Any, shared: Config, seeds: tuple[int, ...]) -> Cell:
    key = f"cells.{name}"
    require(_NAME.fullmatch(name) is not None, f"cells.{name!r}", _ALLOWED, name)
    require(isinstance(table, dict), key, "a table of keys of a configuration", table)
    overrides = dict(table)
    start = overrides.pop("start", None)
    own_seeds = overrides.pop("seeds", None)
    require(start is None or isinstance(start, str), f"{key}.start", "the name of a cell", start)
    config = _overridden(shared, key, overrides)
    require(
        start is None or "path" not in overrides.get("model", {}),
        f"{key}.model.path",
        f"none beside start = {start!r}",
        config.model.path,
    )
    return Cell(
        name=name,
        seeds=seeds if own_seeds is None else _seeds(f"{key}.seeds", own_seeds),
        start=start,
        config=config,
    )


def _overridden(config: Config, key: str, overrides: dict[str, Any]) -> Config:
    for name in _GIVEN:
        require(
            name not in overrides,
            f"{key}.{name}",
            "no such key: it follows from cell, seed and folder",
            overrides.get(name),
        )
    try:
        return config_from_dict(_merged(_without_none(asdict(config)), overrides))
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def _merged(values: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `over`, table by table."""
    merged = dict(values)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        merged[key] = _merged(values[key], value) if both else value
    return merged


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value is not None
    }


def _check_folders(cells: Mapping[str, Cell]) -> None:
    """Names that differ in case only are one folder on many file systems."""
    known: dict[str, str] = {}
    for name in cells:
        other = known.setdefault(name.casefold(), name)
        if other != name:
            raise ConfigError(f"cells: {other!r} and {name!r} would share one folder")


def _check_start(cell: Cell, cells: Mapping[str, Cell]) -> None:
    key, path = f"cells.{cell.name}.start", [cell.name]
    while (start := cells[path[-1]].start) is not None:
        _require_cell(start, cells, key if len(path) == 1 else f"cells.{path[-1]}.start")
        path.append(start)
        require(start not in path[:-1], key, "no circle", " -> ".join(path))
    if cell.start is not None:
        missing = sorted(set(cell.seeds) - set(cells[cell.start].seeds))
        require(
            not missing,
            f"cells.{cell.name}.seeds",
            f"seeds that cells.{cell.start} has too, since it starts from it",
            missing,
        )


def _require_cell(name: Any, cells: Mapping[str, Cell], key: str) -> None:
    require(isinstance(name, str) and name in cells, key, f"one of {', '.join(cells)}", name)


def _check_base(cells: Mapping[str, Cell]) -> None:
    """All cells begin from one base, directly or by a chain, and are measured on one set."""
    first = next(iter(cells.values()))
    expected = _what_is_shared(first.config)
    for cell in cells.values():
        values = _what_is_shared(cell.config)
        for key in dict.fromkeys((*expected, *values)):
            got = values.get(key)
            require(
                got == expected.get(key),
                f"cells.{cell.name}.{key}",
                f"{expected.get(key)!r} as in cells.{first.name}, since all cells share base and "
                "held-out problems",
                got,
            )
    config = first.config
    follows_from_seed = config.model.path is None or config.data.path in GENERATED
    num_seeds = len({seed for cell in cells.values() for seed in cell.seeds})
    require(
        num_seeds == 1 or config.data.seed is not None or not follows_from_seed,
        "data.seed",
        "a seed in the configuration or in [common], so that runs of all seeds share base and "
        "problems",
        None,
    )


def _what_is_shared(config: Config) -> dict[str, object]:
    values = {
        key: value
        for key, value in by_key(config).items()
        if key.startswith(_SHARED) and key not in _FREE
    }
    if config.model.path is not None and config.data.eval_path is not None:
        values = {key: v for key, v in values.items() if not key.startswith(_OF_TRAINING)}
    else:
        values["data.seed"] = config.data.seed
    if config.eval.max_response_length is None:
        values["eval.max_response_length"] = config.rollout.max_response_length
    return values
