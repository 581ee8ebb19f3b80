"""Prompts have the length meant, begin like no other, and are verified before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servers import Scripted, quick_calibration, say, standin
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from warned import texts

from measure.ladder.probe import Refused, find_recipe
from measure.loadgen.prompts import IDS, WORDS, Recipe, by_counts, by_tokenizer, generator, tokenizer_file
from measure.server.detection import Server, detect
from measure.server.endpoint import Endpoint, Unreachable
from measure.server.exposition import parse
from measure.server.limits import Unfit, check_limits
from sim.engines.catalog import of_info
from sim.engines.tgi_0_9_4 import Flags
from sim.model.errors import BadInput, CannotFit
from sim.model.scenario import Load, Scenario
from sim.model.workload import Exponential, Lengths, Lognormal, RequestLengths, Workload


def scenario(prompt: Any = 50, **more: Any) -> Scenario:
    workload = Workload(prompt_tokens=prompt, output_tokens=5)
    return Scenario(**({"server": Flags(), "name": "p", "workload": workload} | more))


def save_tokenizer(path: Path, words: list[str]) -> Path:
    """A tokenizer of whole words that adds one token at the beginning; what it does not know it spells out."""
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


def test_no_two_prompts_begin_alike_and_the_same_request_asks_the_same() -> None:
    recipe = Recipe(words=WORDS)
    prompts = [recipe.prompt(40, generator(0, i)) for i in range(2000)]
    assert len({" ".join(str(p).split()[:6]) for p in prompts}) == 2000
    assert recipe.prompt(40, generator(0, 7)) == prompts[7]
    assert recipe.prompt(40, generator(1, 7)) != prompts[7]
    # TGI cuts from the left: what it keeps of a longer text is each prompt's own, too
    assert all(len(str(p).split()) == 40 for p in prompts)


def test_ids_are_as_many_as_meant() -> None:
    ids = Recipe(ids=True).prompt(33, generator(0, 0))
    assert len(ids) == 33 and all(IDS[0] <= int(i) < IDS[1] for i in ids)


def test_a_tokenizer_makes_the_length_exact(tmp_path: Path) -> None:
    file = save_tokenizer(tmp_path / "model", WORDS[:150])
    recipe = by_tokenizer(file)
    assert recipe.overhead == 1 and recipe.exact
    tokenizer = Tokenizer.from_file(str(file))
    for tokens in (2, 17, 300):
        assert len(tokenizer.encode(recipe.prompt(tokens, generator(0, tokens))).ids) == tokens
    assert tokenizer_file(str(tmp_path / "model")) == tokenizer_file(str(file)) == file
    assert tokenizer_file("meta-llama/Llama-2-70b-hf") is None


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="expected a tokenizer file"):
        by_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(("per_word", "template"), [(1, 0), (1, 12), (3, 5), (9, 0)])
def test_two_counts_tell_a_words_tokens_from_a_templates(per_word: int, template: int) -> None:
    recipe = by_counts({n: per_word * n + template for n in (64, 192)})
    assert (recipe.tokens_per_word, recipe.overhead) == (per_word, template)
    assert recipe.exact == (per_word == 1)
    words = len(str(recipe.prompt(500, generator(0, 0))).split())
    assert abs(words * per_word + template - 500) <= per_word / 2


def test_a_tokenizers_prompt_is_verified_without_truncation(tmp_path: Path) -> None:
    file = save_tokenizer(tmp_path / "model", WORDS[:150])
    with standin("--calibration", str(quick_calibration(tmp_path))) as process:
        endpoint = Endpoint(process.url)
        server = detect(endpoint)
        assert find_recipe(endpoint, server, scenario(), None, str(file), 0)[1] == []
        assert find_recipe(endpoint, server, scenario(), None, None, 0)[1] == []  # by truncation
        before = parse(endpoint.get("/metrics")[1].decode())
        assert before["tgi_request_input_length_sum"] == 100
        # another tokenizer than the server's is found out
        other = save_tokenizer(tmp_path / "other", WORDS[:150])
        raw = json.loads(other.read_text())
        raw["post_processor"] = None
        other.write_text(json.dumps(raw))
        warnings = find_recipe(endpoint, server, scenario(), None, str(other), 0)[1]
    assert any("has 51 in its decoder_input_details" in d.text for d in warnings)
    assert any("has 51 in the server's tgi_request_input_length" in d.text for d in warnings)


def answer(body: Any, status: int = 200) -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (status, len(raw), raw)


def chat_server(counts: list[int]) -> Scripted:
    return Scripted(*(say(answer({"choices": [{}], "usage": {"prompt_tokens": n}})) for n in counts))


def test_a_chat_template_is_measured_and_a_wrong_length_is_a_warning() -> None:
    chat = Server(api="chat")
    server = chat_server([64 + 9, 192 + 9, 50])
    recipe, warnings = find_recipe(Endpoint(server.url), chat, scenario(), None, None, 0)
    server.close()
    assert (recipe.overhead, warnings) == (9, [])
    words = json.loads(server.bodies[2])["messages"][0]["content"].split()
    assert len(words) == 50 - 9
    server = chat_server([64, 192, 47])
    assert "of 50 tokens has 47" in find_recipe(Endpoint(server.url), chat, scenario(), None, None, 0)[1][0].text
    server.close()


def test_a_server_that_refuses_the_probe_is_said_to() -> None:
    server = Scripted(say(answer({"error": {"message": "context too small", "code": 400}}, 400)))
    with pytest.raises(Refused, match="HTTP 400: context too small"):
        find_recipe(Endpoint(server.url), Server(api="completions"), scenario(), None, None, 0)
    server.close()


def test_what_answers_is_found_out_by_asking() -> None:
    nothing = say(answer(b"", 404))
    good = say(answer({"choices": [{"text": "x"}]}))
    # /info, /v1/models, /v1/completions, /v1/chat/completions
    models = say(answer({"data": [{"id": "llama"}]}))
    for scripts, api in (
        ((nothing, models, good), "completions"),
        ((nothing, models, nothing, good), "chat"),
    ):
        server = Scripted(*scripts)
        found = detect(Endpoint(server.url))
        assert (found.api, found.model) == (api, "llama")
        assert json.loads(server.bodies[-1])["model"] == "llama"
        server.close()
    for scripts, message in (
        ((nothing,), "no TGI"),
        ((nothing, say(answer(b"", 401))), "HTTP 401: set SERVECAST_API_KEY"),
        ((say(answer({"model_id": "m"})), say(answer(b"", 503))), "unhealthy: /health answers HTTP 503"),
    ):
        server = Scripted(*scripts)
        with pytest.raises(Unreachable, match=message):
            detect(Endpoint(server.url))
        server.close()


@pytest.mark.parametrize("url", ["", "ftp://host", "http://", "http://host:port", "http://user:secret@host"])
def test_a_url_that_cannot_be_is_refused_without_repeating_a_secret(url: str) -> None:
    with pytest.raises(Unreachable) as refused:
        Endpoint(url)
    assert "secret@" not in str(refused.value)


def test_a_base_url_may_come_in_several_forms() -> None:
    for url in ("http://h:1", "h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        assert Endpoint(url).url == "http://h:1"
    assert Endpoint("https://h/llm/v1").url == "https://h/llm"


def test_a_scenario_is_held_against_info() -> None:
    info = {"version": "0.9.4", "max_input_length": 1024, "max_total_tokens": 2048, "max_concurrent_requests": 128}
    tgi = Server(api="tgi", info=info, engine=of_info(info | {"model_id": "m"}))
    assert texts(check_limits(tgi, scenario())) == []
    assert texts(check_limits(tgi, scenario(1024))) == []  # as much as it takes
    wider = Scenario(name="x", server=Flags(max_total_tokens=5000), workload=scenario().workload)
    assert "the server's max_total_tokens is 2048, the scenario's 5000; the server's value is used" in texts(
        check_limits(tgi, wider)
    )
    assert texts(check_limits(Server(api="completions"), scenario(5000))) == []  # nothing is known of its limits
    for prompt, flag in ((1025, "--max-input-length 1025"), (Lengths(uniform=(2000, 2001)), "--max-input-length 2000")):
        with pytest.raises(Unfit, match=flag):
            texts(check_limits(tgi, scenario(prompt)))
    with pytest.raises(Unfit, match="--max-total-tokens 2100"):
        texts(
            texts(
                texts(
                    texts(
                        check_limits(
                            tgi,
                            Scenario(
                                server=Flags(),
                                name="x",
                                workload=Workload(prompt_tokens=1000, output_tokens=10, max_new_tokens=1100),
                            ),
                        )
                    )
                )
            )
        )
    # what the server would take and never schedule is not sent to it
    small = Server(api="tgi", info=info | {"max_batch_total_tokens": 512})
    assert texts(check_limits(small, scenario(496))) == []  # 496 + 16
    for prompt in (497, Lengths(uniform=(10, 2000))):
        with pytest.raises(CannotFit, match=r"max_batch_total_tokens 512: TGI 0\.9\.4 would wait for ever"):
            texts(check_limits(small, scenario(prompt)))
    narrow = scenario(900, server=Flags(max_batch_prefill_tokens=800))
    with pytest.raises(CannotFit, match="max_batch_prefill_tokens 800"):
        texts(check_limits(Server(api="tgi", info=info | {"max_batch_total_tokens": 16000}), narrow))
    for prompt in (Lengths(uniform=(10, 2000)), Lengths(lognormal=Lognormal(mean=100, cv=1))):
        assert any("prompts may exceed" in d for d in texts(check_limits(tgi, scenario(prompt))))
    assert texts(check_limits(tgi, scenario(Lengths(exponential=Exponential(mean=50, high=900))))) == []
    lengths = RequestLengths(np.array([10, 2000]), np.array([5, 5]), np.array([5, 5]))
    assert any("may exceed" in d for d in texts(check_limits(tgi, scenario(), lengths)))
    assert any("200 users" in d for d in texts(check_limits(tgi, scenario(load=Load(users=[200])))))
    told = info | {"max_waiting_tokens": 10, "max_batch_total_tokens": 90, "model_id": "m"}
    asked = scenario(server=Flags(max_batch_total_tokens=100, max_waiting_tokens=21))
    newer = told | {"version": "2.0.4"}  # whose flags are not the scenario's to judge
    assert texts(check_limits(Server(api="tgi", info=newer, engine=of_info(newer)), asked)) == []
    said = texts(check_limits(Server(api="tgi", info=told, engine=of_info(told)), asked))
    assert [d for d in said if "max_waiting_tokens is 10, the scenario's 21" in d]
    assert [d for d in said if "max_batch_total_tokens is 90, the scenario's 100" in d]
