"""The sections about data: problems, where they come from, and the base that learns from them."""

from dataclasses import field
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from prefix_rft.checks import Fraction, config_section, require

Steps = Annotated[int, Field(ge=1, le=26, description="a whole number in [1, 26]")]
Seed = Annotated[int, Field(ge=0, lt=2**32, description="a whole number in [0, 2**32)")]


@config_section("data")
class DataConfig:
    """The problems to train on, and those held out for evaluation."""

    # "testbed", "tiers", a file (parquet, json, jsonl), a folder, or a hub id[:configuration]
    path: Annotated[str, Field(min_length=1, description="a path or hub id")] = "testbed"
    split: str = "train"  # split of `path`
    eval_path: str | None = None  # held-out problems; None: the last `num_eval` rows of `path`
    eval_split: str = "test"  # split of `eval_path`
    num_eval: PositiveInt = 128  # held-out problems used at most
    # prompt / answer / demonstration -> column (a.b: field b of column a); empty: detected
    columns: dict[str, str] = field(default_factory=dict)
    eval_columns: dict[str, str] = field(default_factory=dict)  # the same for `eval_path`
    system_prompt: str | None = None  # put before prompts that have none
    # how a text gives its answer: "boxed", or a marker like "####" before it
    answer_pattern: Annotated[str, Field(pattern=r"\S", description='"boxed" or a marker')] = (
        "boxed"
    )
    max_prompt_tokens: PositiveInt = 1024  # problems with a longer prompt are left out
    # fraction of rows that keep their demonstration; the others become plain RL rows
    demonstration_fraction: Fraction = 1.0
    # seed of generated problems, of a base by [base] and of which demonstrations are kept: what
    # runs with different seeds can share; None: seed
    seed: Seed | None = None
    strict: bool = False  # refuse a dataset with unusable rows instead of dropping them

    def __post_init__(self) -> None:
        for key, columns in (("columns", self.columns), ("eval_columns", self.eval_columns)):
            require(
                not columns
                or {"prompt", "answer"} <= set(columns) <= {"prompt", "answer", "demonstration"},
                f"data.{key}",
                "the keys prompt, answer and, where there is one, demonstration",
                sorted(columns),
            )
        require(
            self.eval_path is not None or not self.eval_columns,
            "data.eval_columns",
            "none without data.eval_path",
            self.eval_columns,
        )


@config_section("testbed")
class TestbedConfig:
    """The synthetic arithmetic problems of `data.path = "testbed"`."""

    __test__ = False  # keeps pytest from collecting the class

    num_train: PositiveInt = 4096  # problems to train on
    min_steps: Steps = 3  # arithmetic steps of the shortest problems
    max_steps: Steps = 8  # arithmetic steps of the longest problems
    max_operand: PositiveInt = 6  # the largest number that a step adds or subtracts
    max_value: int = 20  # no number in a problem, given or intermediate, is larger
    # fraction of the base's training texts whose prompt asks for the steps and which show them
    asked_fraction: Fraction = 0.6
    easy_steps: NonNegativeInt = 3  # problems with at most this many steps count as easy
    # fraction of easy problems worked step by step when the prompt does not ask for it
    easy_worked_fraction: Fraction = 0.95
    hard_worked_fraction: Fraction = 0.02  # the same for the other problems

    def __post_init__(self) -> None:
        require(
            self.min_steps <= self.max_steps,
            "testbed.min_steps",
            f"at most testbed.max_steps ({self.max_steps})",
            self.min_steps,
        )
        require(
            self.max_value >= 2 * self.max_operand,
            "testbed.max_value",
            f"at least twice testbed.max_operand ({self.max_operand})",
            self.max_value,
        )


@config_section("tiers")
class TiersConfig:
    """The synthetic problems in tiers of difficulty of `data.path = "tiers"`."""

    num_train: PositiveInt = 4096  # problems to train on
    skill_fraction: Fraction = 0.25  # fraction of them with the operation the base does not know
    wrong_fraction: Fraction = 0.05  # fraction of them whose demonstration is wrong
    easy_steps: Annotated[Steps, Field(ge=2)] = 3  # operations of the longest easy problems
    medium_steps: Steps = 5  # operations of the longest problems of the tiers medium and skill
    hard_steps: Steps = 7  # operations of the longest hard problems
    beyond_steps: Steps = 9  # operations of the longest problems, which are only held out
    # fraction of the base's training texts whose prompt asks for the steps and which show them
    asked_fraction: Fraction = 0.6
    # fraction of easy problems worked step by step when the prompt does not ask for it
    easy_worked_fraction: Fraction = 0.6
    medium_worked_fraction: Fraction = 0.05  # the same for medium problems; hard ones never are

    def __post_init__(self) -> None:
        tiers = ("easy", "medium", "hard", "beyond")
        for shorter, longer in zip(tiers, tiers[1:], strict=False):
            least = getattr(self, f"{shorter}_steps")
            require(
                getattr(self, f"{longer}_steps") > least,
                f"tiers.{longer}_steps",
                f"more than tiers.{shorter}_steps ({least})",
                getattr(self, f"{longer}_steps"),
            )


@config_section("base")
class BaseConfig:
    """The small base model that is trained from scratch where `model.path` is not given."""

    cache_dir: str = "runs/base"  # one folder per distinct base, named by a hash of what made it
    # tokenizer entries at most, 256 bytes and 5 special tokens included
    vocab_size: Annotated[int, Field(ge=261)] = 320
    hidden_size: PositiveInt = 128  # width of the model
    num_layers: PositiveInt = 3  # transformer blocks
    num_heads: PositiveInt = 4  # attention heads of a block
    intermediate_size: PositiveInt = 384  # width of the MLP
    max_length: PositiveInt = 512  # tokens of a training text at most; longer ones are left out
    max_position_embeddings: int = 2048  # longest sequence of the model, in tokens
    num_batches: PositiveInt = 1200  # optimizer updates
    batch_size: PositiveInt = 64  # texts per update
    lr: PositiveFloat = 3e-3  # peak learning rate

    def __post_init__(self) -> None:
        require(
            self.hidden_size % (2 * self.num_heads) == 0,
            "base.num_heads",
            f"a divisor of half of base.hidden_size ({self.hidden_size})",
            self.num_heads,
        )
        require(
            self.max_position_embeddings >= self.max_length,
            "base.max_position_embeddings",
            f"at least base.max_length ({self.max_length})",
            self.max_position_embeddings,
        )
