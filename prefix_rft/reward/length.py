"""The penalty for responses that come near the longest allowed length."""


def overlong_penalty(
    length: int, *, max_response_length: int, overlong_tokens: int, penalty: float
) -> float:
    """What a response of `length` tokens loses (DAPO, arXiv 2503.14476, Eq. 13).

    0 up to max_response_length - overlong_tokens, from there on in proportion, and all of `penalty`
    at max_response_length. Without `overlong_tokens` there is none.
    """
    excess = length - (max_response_length - overlong_tokens)
    return penalty * excess / overlong_tokens if overlong_tokens and excess > 0 else 0.0
