"""The datasets that are made on the spot, by their name in `data.path`."""

from prefix_rft.config import Config
from prefix_rft.data import testbed, tiers
from prefix_rft.data.columns import Row

_MAKERS = {"testbed": testbed, "tiers": tiers}  # each has a section of its name
# Texts besides the lessons that the tokenizer of the base learns from.
_VOCABULARY = {"testbed": (), "tiers": tiers.VOCABULARY}
GENERATED = frozenset(_MAKERS)


def generated_rows(config: Config) -> tuple[list[Row], list[Row]]:
    """Training rows, and `data.num_eval` rows to hold out.

    Raises:
        ConfigError: there are too few different problems.
    """
    name = config.data.path
    return _MAKERS[name].make_rows(getattr(config, name), config.data.num_eval, config.data_seed)


def generated_lessons(config: Config) -> list[tuple[str, str]]:
    """What the base learns from, as (prompt, completion); no held-out problem is among it."""
    name, base = config.data.path, config.base
    _, held_out = generated_rows(config)
    return _MAKERS[name].make_lessons(
        getattr(config, name),
        base.num_batches * base.batch_size,
        config.data_seed,
        exclude=[row["prompt"] for row in held_out],
    )


def vocabulary_texts(config: Config) -> list[str]:
    """Texts that the tokenizer of the base learns from besides the lessons."""
    return list(_VOCABULARY[config.data.path])
