"""A whole demonstration, its end of sequence included, as a row to learn from."""

from prefix_rft.data_types import Problem, Segment, TrainRow


def whole_demonstration(problem: Problem, eos_token_id: int) -> tuple[int, ...]:
    return (*problem.demonstration_ids, eos_token_id)


def demonstration_row(
    problem: Problem, eos_token_id: int, *, advantage: float = 0.0, weight: float = 1.0
) -> TrainRow:
    segment = Segment(
        token_ids=whole_demonstration(problem, eos_token_id),
        source="demonstration",
        advantage=advantage,
        weight=weight,
    )
    return TrainRow(prompt_ids=problem.prompt_ids, segments=(segment,), origin=problem)
