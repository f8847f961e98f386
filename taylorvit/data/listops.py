"""ListOps as Long Range Arena defines it (arXiv:2011.04006): expressions of digits, to be classified by their value 0..9.

`[MAX 2 9 [MIN 4 7 ] 0 ]` is 9. The operators are MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10), each with
2 to 10 arguments, nested to depth 10. Here are the language and its random samples, the files, and what a classifier scores
that does not look inside: the lines that any result should be held against.

In memory a sample is one byte a token, its number in TOKENS.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from taylorvit.data.byte_source import ByteSource
from taylorvit.data.source import Source
from taylorvit.randomness import derive_seed

TOKENS = [*map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]"]
MIN, MAX, MED, SM, END = range(10, 15)
OPERATORS = (MIN, MAX, MED, SM)
CLASSES = [str(value) for value in range(10)]
OPERATOR_RATE = 0.25  # a node is an operator with this probability, else a digit
BLOCK_ATTEMPTS = 20_000  # expressions that are begun under one seed, most of which are too short or too long

# To read a line at the speed of C, each operator becomes one letter: every token is then one byte, between spaces.
LETTERS = b"0123456789abcd]"  # by number of the token
TO_NUMBERS = bytes.maketrans(LETTERS, bytes(range(15)))
CLEAN = bytes.maketrans(b"()abcd", b"  ????")  # those letters mean nothing in a file
DEPTH_STEPS = np.array([0] * 10 + [1] * len(OPERATORS) + [-1])


@dataclass(frozen=True)
class Shape:
    """Which expressions are drawn.

    Attributes:
        min_length: a sample has more tokens than this,
        max_length: and fewer than this, as in Long Range Arena; an operator counts as two, with its closing bracket.
        max_depth: nodes at this depth are digits; the root's is 1.
        max_args: most arguments of an operator.
    """

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.min_length <= self.max_length - 2:
            given = f"min_length {self.min_length} and max_length {self.max_length}"
            raise ValueError(f"{given}: 0 <= min_length <= max_length - 2 is needed, as lengths lie strictly between them")
        if self.max_depth < 1 or self.max_args < 2:
            raise ValueError(f"max_depth must be 1 or more and max_args 2 or more, got {self.max_depth} and {self.max_args}")


def evaluate(operator: int, values: Sequence[int]) -> int:
    """Apply an operator to the values of its arguments."""
    if operator == MIN:
        return min(values)
    if operator == MAX:
        return max(values)
    if operator == SM:
        return sum(values) % 10
    assert operator == MED, operator
    middle, ordered = len(values) // 2, sorted(values)
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def value_of(tokens: bytes) -> int:
    """Compute the value of an expression that is well formed."""
    stack: list[list[int]] = [[]]  # for each open bracket the operator and its arguments so far
    for token in tokens:
        if token in OPERATORS:
            stack.append([token])
        elif token == END:
            operator, *values = stack.pop()
            stack[-1].append(evaluate(operator, values))
        else:
            stack[-1].append(token)
    return stack[0][0]


def generate_block(seed: int, block: int, shape: Shape) -> list[tuple[bytes, int]]:
    """Draw the samples of one block, tokens and value, a function of the arguments alone; a block may hold a sample twice.

    Of Python's generator only `random()` is used, which gives the same numbers in every version.
    """
    draws = random.Random(derive_seed("listops", seed, block))
    samples = []
    for _ in range(BLOCK_ATTEMPTS):
        tokens = bytearray()
        value = _grow(tokens, 1, shape, draws)
        if value is not None and len(tokens) > shape.min_length:
            samples.append((bytes(tokens), value))
    return samples


def _grow(tokens: bytearray, depth: int, shape: Shape, draws: random.Random) -> int | None:
    """Append a random expression and return its value, or None as soon as it has become too long."""
    if depth == shape.max_depth or draws.random() > OPERATOR_RATE:
        digit = int(10 * draws.random())
        tokens.append(digit)
        return digit if len(tokens) < shape.max_length else None
    operator = OPERATORS[int(len(OPERATORS) * draws.random())]
    tokens.append(operator)
    values = []
    for _ in range(2 + int((shape.max_args - 1) * draws.random())):
        value = _grow(tokens, depth + 1, shape, draws)
        if value is None:
            return None
        values.append(value)
    tokens.append(END)
    return evaluate(operator, values) if len(tokens) < shape.max_length else None


def to_text(tokens: bytes) -> str:
    """Write an expression as it stands in the files, without Long Range Arena's round brackets."""
    return " ".join(TOKENS[token] for token in tokens)


def parse(text: bytes) -> bytes:
    """Read an expression; round brackets are dropped, as they say nothing that the square ones do not.

    Raises:
        ValueError: a word that is no token, or brackets that do not make one expression; the message says which.
    """
    spaced = text.translate(CLEAN)
    for operator in OPERATORS:
        spaced = spaced.replace(TOKENS[operator].encode(), LETTERS[operator : operator + 1])
    joined = b" ".join(spaced.split())
    letters, spaces = joined[::2], joined[1::2]
    if spaces.strip(b" ") or letters.strip(LETTERS):
        raise ValueError(_unknown_word(text))
    tokens = letters.translate(TO_NUMBERS)
    _check_brackets(tokens)
    return tokens


def _unknown_word(text: bytes) -> str:
    words = [word.decode("utf-8", "replace") for word in text.replace(b"(", b" ").replace(b")", b" ").split()]
    word = next(word for word in words if word not in TOKENS)
    return f"{word!r} is no token of ListOps (known: {' '.join(TOKENS)})"


def _depths(tokens: bytes) -> np.ndarray:
    """Return how many brackets are open after each token (N,)."""
    return DEPTH_STEPS[np.frombuffer(tokens, dtype=np.uint8)].cumsum()


def _check_brackets(tokens: bytes) -> None:
    """Raise ValueError unless the brackets make one expression, whose operators all have arguments."""
    if not tokens:
        raise ValueError("there is no expression")
    depths = _depths(tokens)
    closed = np.flatnonzero(depths <= 0)
    if not len(closed):
        raise ValueError(f"{depths[-1]} brackets are not closed")
    if closed[0] != len(tokens) - 1 or depths[-1] < 0:
        raise ValueError(f"the expression ends at token {closed[0] + 1} of {len(tokens)}")
    numbers = np.frombuffer(tokens, dtype=np.uint8)
    if ((numbers[:-1] >= MIN) & (numbers[:-1] < END) & (numbers[1:] == END)).any():
        raise ValueError("an operator has no arguments")


class ListOps(ByteSource):
    """One split from `root/basic_SPLIT.tsv`: a header with the columns Source and Target, then one sample a line.

    Long Range Arena's own files and those of tools/make_listops.py are of this kind.

    Raises:
        ValueError: no such file, or a line that is not a sample; the message names both.
    """

    vocab_size = len(TOKENS) + 1  # the padding

    def __init__(self, root: Path, split: str) -> None:
        self.path = root / f"basic_{split}.tsv"
        if not self.path.is_file():
            present = ", ".join(sorted(path.name for path in root.glob("basic_*.tsv"))) or "none"
            raise ValueError(f"data.root: no file {self.path} (found there: {present}); tools/make_listops.py writes them")
        super().__init__(_read_file(self.path), list(CLASSES))

    def name(self, index: int) -> str:
        """Name sample `index` by file and line."""
        return f"{self.path}:{index + 2}"


def _read_file(path: Path) -> Iterator[tuple[bytes, int]]:
    with path.open("rb") as file:
        header = file.readline().rstrip(b"\r\n").split(b"\t")
        if not {b"Source", b"Target"} <= set(header):
            given = b"\t".join(header)[:60].decode("utf-8", "replace")
            raise ValueError(f"{path}:1: expected tab-separated columns Source and Target, got {given!r}")
        columns = header.index(b"Source"), header.index(b"Target")
        number = 1
        for number, line in enumerate(file, start=2):
            try:
                yield _read_line(line, columns, len(header))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    if number == 1:
        raise ValueError(f"{path}: there are no samples in it")


def _read_line(line: bytes, columns: tuple[int, int], num_columns: int) -> tuple[bytes, int]:
    fields = line.rstrip(b"\r\n").split(b"\t")
    if len(fields) != num_columns:
        raise ValueError(f"expected {num_columns} tab-separated columns, got {len(fields)}")
    source, target = (fields[column] for column in columns)
    if target.decode("utf-8", "replace") not in CLASSES:
        raise ValueError(f"Target must be a digit 0 to 9, got {target.decode('utf-8', 'replace')!r}")
    return parse(source), int(target)


class ReferenceLines:
    """What one scores on ListOps without looking inside, learned from the training samples.

    `majority class` always says the commonest value; `root operator` the commonest of the samples with the same first token;
    `visible digits` applies the root operator to its arguments that are digits, and where it has none says what
    `root operator` says. A model that is not above the second has learned the first token at most.

    Args:
        train: the training samples.
    """

    NAMES = ("majority class", "root operator", "visible digits")

    def __init__(self, train: Source) -> None:
        by_root: dict[int, Counter[int]] = {}
        for tokens, label in _samples(train):
            by_root.setdefault(tokens[0], Counter())[label] += 1
        self.majority = _commonest(sum(by_root.values(), Counter()))
        self.by_root = {root: _commonest(counts) for root, counts in by_root.items()}

    def predict(self, tokens: bytes) -> tuple[int, int, int]:
        """Return the value that each of NAMES says."""
        root = self.by_root.get(tokens[0], self.majority)
        if tokens[0] not in OPERATORS:
            return self.majority, root, tokens[0]
        numbers = np.frombuffer(tokens, dtype=np.uint8)
        digits = numbers[(_depths(tokens) == 1) & (numbers < MIN)].tolist()
        return self.majority, root, evaluate(tokens[0], digits) if digits else root

    def accuracy(self, judged: Source) -> dict[str, float]:
        """Return the accuracy of each of NAMES on these samples, in per cent."""
        correct = np.zeros(len(self.NAMES), dtype=np.int64)
        for tokens, label in _samples(judged):
            correct += np.equal(self.predict(tokens), label)
        return dict(zip(self.NAMES, (100 * correct / len(judged)).tolist()))


def _samples(source: Source) -> Iterator[tuple[bytes, int]]:
    for index in range(len(source)):
        file, label = source.read(index)
        assert not isinstance(file, Image.Image)
        yield file.read(), label


def _commonest(counts: Counter[int]) -> int:
    """Return the label that is met most often, of several the smallest."""
    return min(counts, key=lambda label: (-counts[label], label))
