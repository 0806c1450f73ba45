"""A sequence of problems, in memory or read from prepared rows one at a time, and its digest."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, Self, overload

import numpy as np

from prefix_rft.data_types import Problem

DIGEST_BYTES = 16


def problem_digest(problem: Problem) -> bytes:
    """Identifies what is learnt from a problem: its ids and its gold answer."""
    parts = problem.prompt_ids, problem.demonstration_ids
    digest = hashlib.sha256(np.array([len(ids) for ids in parts], dtype="<i8").tobytes())
    for ids in parts:
        digest.update(np.array(ids, dtype="<i4").tobytes())
    digest.update(problem.answer.encode())
    return digest.digest()[:DIGEST_BYTES]


def without_demonstration(problem: Problem) -> Problem:
    return dataclasses.replace(problem, demonstration=None, demonstration_ids=())


class Store(Protocol):
    """Where problems are kept, by their place in it."""

    has_demonstration: np.ndarray  # [N] bool

    def read(self, place: int) -> Problem: ...

    def skim(self, places: np.ndarray) -> Iterator[Problem]:
        """The problems at ascending places, with ids and columns that are only read when used."""

    def digests(self, places: np.ndarray, keeps: np.ndarray) -> Iterable[bytes]:
        """`problem_digest` of each, with its demonstration where `keeps` [n] says so."""


class InMemory:
    """A list of problems."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = problems
        shown = [bool(problem.demonstration_ids) for problem in problems]
        self.has_demonstration = np.array(shown, dtype=bool)

    def read(self, place: int) -> Problem:
        return self._problems[place]

    def skim(self, places: np.ndarray) -> Iterator[Problem]:
        return (self._problems[place] for place in places)

    def digests(self, places: np.ndarray, keeps: np.ndarray) -> Iterator[bytes]:
        for place, keep in zip(places, keeps, strict=True):
            problem = self._problems[place]
            yield problem_digest(problem if keep else without_demonstration(problem))


class Problems(Sequence[Problem]):
    """Some problems of a store, in an order of their own; slices and subsets share the store.

    A problem is made when it is asked for, so that memory does not grow with their number.
    """

    def __init__(self, store: Store, places: np.ndarray, keeps: np.ndarray | None = None) -> None:
        """`places`: [n] int64, of the problems in `store`; `keeps`: [n] bool, see `keep`."""
        self._store, self._places = store, places
        self._keeps = np.ones(len(places), dtype=bool) if keeps is None else keeps

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> "Problems":
        """`problems` themselves, or with a list of them in memory."""
        if isinstance(problems, Problems):
            return problems
        return cls(InMemory(problems), np.arange(len(problems)))

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Problem: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Problems(self._store, self._places[index], self._keeps[index])
        return self._kept(self._store.read(int(self._places[index])), self._keeps[index])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(map(Problem.__eq__, self, other))

    __hash__ = None

    def __repr__(self) -> str:
        return f"<{len(self)} problems, {self.num_demonstrations} with a demonstration>"

    @property
    def has_demonstration(self) -> np.ndarray:
        """[n] bool, the problem has a demonstration."""
        return self._store.has_demonstration[self._places] & self._keeps

    @property
    def num_demonstrations(self) -> int:
        return int(self.has_demonstration.sum())

    def take(self, indices: Sequence[int]) -> "Problems":
        """Those at `indices`, in that order."""
        picks = np.asarray(indices, dtype=np.int64)
        return Problems(self._store, self._places[picks], self._keeps[picks])

    def keep(self, keeps: np.ndarray) -> "Problems":
        """The same problems, without their demonstration where `keeps` [n] is False."""
        return Problems(self._store, self._places, self._keeps & keeps)

    def accepted(self, accepts: Callable[[Problem], bool]) -> "Problems":
        """Those that `accepts` takes; it is asked in the order of the store."""
        order = np.argsort(self._places, kind="stable")
        skimmed = self._store.skim(self._places[order])
        pairs = zip(order, skimmed, strict=True)
        taken = [i for i, problem in pairs if accepts(self._kept(problem, self._keeps[i]))]
        return self.take(sorted(taken))

    def fingerprint(self) -> str:
        """A short digest of the problems in their order."""
        digest = hashlib.sha256()
        for each in self._store.digests(self._places, self._keeps):
            digest.update(each)
        return digest.hexdigest()[:16]

    @staticmethod
    def _kept(problem: Problem, keep: bool) -> Problem:
        return problem if keep else without_demonstration(problem)
