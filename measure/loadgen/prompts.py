"""Prompts with an exact number of tokens, no two of which begin alike.

Every prompt is drawn from a generator seeded with the run's seed and the request's number: its first tokens are unique,
so that a prefix cache has no hits, and the same run sends the same prompts. A `Recipe`, found before the first request,
says how many words make how many tokens:

- TGI truncates a text to `truncate` tokens: at least as many words as tokens are sent;
- with a tokenizer, only words of exactly one token are used, and its special tokens are subtracted;
- `/v1/completions` accepts token ids, so the length is exact;
- a chat template adds tokens: two probes measure how many, and how many tokens a word has.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from measure.apis.api import Prompt
from sim.model.errors import BadInput

WORDS = (Path(__file__).parent / "words.txt").read_text().split()  # common words, one token each in most tokenizers
IDS = (300, 2000)  # token ids in every vocabulary, above bytes and control tokens


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """How to make a prompt: from `words` of `tokens_per_word` tokens plus `overhead` tokens, or from token `ids`."""

    words: list[str] = []
    tokens_per_word: float = 1.0
    overhead: int = 0
    ids: bool = False
    exact: bool = True

    def prompt(self, tokens: int, rng: np.random.Generator) -> Prompt:
        """A prompt of `tokens` tokens as the server counts them (at least that many, where the server truncates)."""
        if self.ids:
            drawn: list[int] = rng.integers(*IDS, tokens).tolist()
            return drawn
        count = max(1, round((tokens - self.overhead) / self.tokens_per_word))
        words = self.words
        return " ".join([words[i] for i in rng.integers(0, len(words), count).tolist()])


def generator(seed: int, request: int) -> np.random.Generator:
    """The random generator of one request's prompt."""
    return np.random.default_rng([seed, request])


def tokenizer_file(model: str | None) -> Path | None:
    """The `tokenizer.json` of a model that is a local folder, or a tokenizer file itself; else None."""
    if model is None:
        return None
    path = Path(model).expanduser()
    for file in (path, path / "tokenizer.json"):
        if file.is_file() and file.suffix == ".json":
            return file
    return None


def by_tokenizer(file: Path) -> Recipe:
    """The recipe for a tokenizer: words that are one token each beside any other word."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises a bare Exception for whatever is wrong with the file
        raise BadInput(f"expected a tokenizer file ({e})", path=file) from e

    def count(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    candidates = [*WORDS, *(w for w in tokenizer.get_vocab() if w.isalnum())][:4000]
    overhead = count("") if count("") else 0
    words = [w for w in dict.fromkeys(candidates) if count(f"{w} {w} {w}") == overhead + 3]
    if len(words) < 100:
        raise BadInput(f"only {len(words)} of its words are one token each; expected at least 100", path=file)
    return Recipe(words=words, overhead=overhead)


def by_counts(counts: dict[int, int]) -> Recipe:
    """The recipe from two probes: {words sent: prompt tokens counted by the server}."""
    (few, least), (many, most) = sorted(counts.items())
    slope = max((most - least) / (many - few), 1e-3)
    return Recipe(
        words=WORDS,
        tokens_per_word=slope,
        overhead=round(least - slope * few),
        exact=slope == 1.0,
    )
