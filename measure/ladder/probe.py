"""Finds how to make prompts of an exact length for a server, and verifies it, before the first request."""

from __future__ import annotations

from typing import Any

from measure.apis.api import Prompt
from measure.deadline import Deadline
from measure.loadgen.prompts import WORDS, Recipe, by_counts, by_tokenizer, generator, tokenizer_file
from measure.server.detection import PROBE_SECONDS, Server
from measure.server.endpoint import Endpoint, Unreachable, decoded, rows, table
from measure.server.exposition import parse
from sim.model.errors import UserError
from sim.model.scenario import Scenario
from sim.model.warning import Notice, notice
from sim.model.workload import RequestLengths, Sampler

FEW, MANY = 64, 192  # words of the two probes; their difference gives the tokens of a word, the rest is the template's
PROBE, SAMPLE = 2**41, 2**41 + 1  # request numbers outside any run
INPUT_LENGTH = "tgi_request_input_length"


class Refused(UserError):
    """The server refuses a request like those that the ladder would send."""


def find_recipe(
    endpoint: Endpoint,
    server: Server,
    scenario: Scenario,
    lengths: RequestLengths | None,
    model: str | None,
    seed: int,
    deadline: Deadline | None = None,
) -> tuple[Recipe, list[Notice]]:
    """The recipe for this server, and warnings about it."""
    deadline = deadline or Deadline(PROBE_SECONDS, f"{endpoint.url} to count the tokens of a prompt")
    tokens = _length(scenario, lengths, seed)
    tokenizer = tokenizer_file(model)
    recipe = Recipe(words=WORDS) if tokenizer is None else by_tokenizer(tokenizer)
    if server.api == "tgi":
        return recipe, _verify_tgi(endpoint, recipe, tokens, seed, deadline, truncate=tokenizer is None)
    if server.api == "completions":
        recipe = Recipe(ids=True)
    elif tokenizer is None:
        words = Recipe(words=WORDS)
        counts = {n: _counted(endpoint, server, _prompt(words, n, seed), deadline) for n in (FEW, MANY)}
        known = {n: count for n, count in counts.items() if count is not None}
        recipe = by_counts(known) if len(known) == len(counts) else words
    else:
        # the tokenizer gives the tokens of words, only a probe those of the template
        found = _counted(endpoint, server, _prompt(recipe, FEW, seed), deadline)
        if found is not None:
            recipe = Recipe(words=recipe.words, overhead=recipe.overhead + found - FEW)
    found = _counted(endpoint, server, _prompt(recipe, tokens, seed), deadline)
    if found is None:
        unit = "token ids" if recipe.ids else "words"
        return recipe, [
            notice(
                "prompt-length-unconfirmed",
                f"the server does not count prompt tokens (usage): {unit} are counted as tokens instead",
            )
        ]
    if found == tokens:
        return recipe, []
    return recipe, [notice("prompt-length-off", f"a prompt of {tokens} tokens has {found} by the server's count")]


def sample_prompt(recipe: Recipe, scenario: Scenario, lengths: RequestLengths | None, seed: int) -> tuple[Prompt, int]:
    """A prompt of the scenario's size, and its intended length in tokens."""
    tokens = _length(scenario, lengths, seed)
    return recipe.prompt(tokens, generator(seed, SAMPLE)), tokens


def _length(scenario: Scenario, lengths: RequestLengths | None, seed: int) -> int:
    return next(Sampler(scenario.workload, seed, lengths).requests(0)).prompt_tokens


def _prompt(recipe: Recipe, tokens: int, seed: int) -> Prompt:
    return recipe.prompt(tokens, generator(seed, PROBE))


def _counted(endpoint: Endpoint, server: Server, prompt: Prompt, deadline: Deadline) -> int | None:
    """The tokens of a prompt by the server's count; None if it does not count."""
    body: dict[str, Any] = {"max_tokens": 1, "temperature": 0}
    if server.model is not None:
        body["model"] = server.model
    if server.api == "completions":
        path = "/v1/completions"
        body["prompt"] = prompt
    else:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": prompt}]
    answer = endpoint.post(path, body, deadline)
    if answer.status != 200:
        raise Refused(f"the server refuses a request of the scenario's size: {endpoint.explain(path, answer)}")
    count = table(decoded(answer.body).get("usage")).get("prompt_tokens")
    return count if isinstance(count, int) and 0 < count < 2**53 else None


def _verify_tgi(
    endpoint: Endpoint, recipe: Recipe, tokens: int, seed: int, deadline: Deadline, truncate: bool
) -> list[Notice]:
    before = _input_lengths(endpoint, deadline)
    parameters: dict[str, Any] = {"max_new_tokens": 1, "details": True, "decoder_input_details": True}
    if truncate:
        parameters["truncate"] = tokens
    body: dict[str, Any] = {"inputs": _prompt(recipe, tokens, seed), "parameters": parameters}
    answer = endpoint.post("/generate", body, deadline)
    if answer.status != 200:
        raise Refused(f"the server refuses a prompt of {tokens} tokens: {endpoint.explain('/generate', answer)}")
    prefill = rows(table(decoded(answer.body).get("details")).get("prefill"))
    after = _input_lengths(endpoint, deadline)
    total, count = (b - a for a, b in zip(before, after, strict=True))
    warnings = []
    if not prefill and count != 1:
        warnings.append(
            notice("prompt-length-unconfirmed", f"the server does not confirm that prompts have {tokens} tokens")
        )
    if prefill and len(prefill) != tokens:
        warnings.append(
            notice("prompt-length-off", f"a prompt of {tokens} tokens has {len(prefill)} in its decoder_input_details")
        )
    if count == 1 and total != tokens:
        warnings.append(
            notice("prompt-length-off", f"a prompt of {tokens} tokens has {total:g} in the server's {INPUT_LENGTH}")
        )
    if count > 1:
        warnings.append(
            notice(
                "other-traffic",
                "the server answered requests of other clients during the probe: its load is not ours alone",
            )
        )
    return warnings


def _input_lengths(endpoint: Endpoint, deadline: Deadline) -> tuple[float, float]:
    try:
        answer = endpoint.get("/metrics", deadline)
    except Unreachable:
        return 0.0, 0.0
    samples = parse(answer.body.decode("utf-8", "replace")) if answer.status == 200 else {}
    return samples.get(f"{INPUT_LENGTH}_sum", 0.0), samples.get(f"{INPUT_LENGTH}_count", 0.0)
