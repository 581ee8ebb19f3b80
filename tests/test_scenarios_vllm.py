"""Scenarios of vLLM: flags with their defaults by device, what is refused, the KV cache that fits, and forecasts."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scenarios.cli.main import status as servecast
from scenarios.forecast.simulate import simulate
from scenarios.load.parameters import calibration_of
from scenarios.load.scenario import load
from sim.cluster.ladder import climb
from sim.engines.catalog import NAMES, flags_of
from sim.engines.kv_memory import kv_cache
from sim.engines.vllm_v1 import Flags
from sim.model.calibration import Calibration
from sim.model.errors import BadInput
from sim.model.machine import Machine
from sim.model.scenario import Hardware, Load, Scenario
from sim.model.server import Bounds
from sim.model.workload import Workload
from sim.results.gaps import gaps
from sim.results.metrics import rung_metrics
from sim.steptime.linear import Linear

SHIPPED = "llama2-70b-vllm"
STEP_TIME = Linear("mixed", {"s0": 0.02, "s1": 1e-4, "s4": 1e-4, "s5": 1e-7})


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibration_of(SHIPPED, load(SHIPPED))


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (Hardware(gpu="B200"), (16384, 1024, 16, True)),
        (Hardware(gpu="H100-80GB"), (8192, 1024, 16, True)),
        (Hardware(gpu="A100-80GB"), (2048, 256, 16, True)),
        (Hardware(gpu="L4"), (2048, 256, 16, True)),
        (Hardware(gpu="CPU", tensor_parallel=2), (4096, 256, 128, False)),
        (Hardware(), (2048, 256, 16, True)),
    ],
)
def test_defaults_are_those_of_the_device(machine: Hardware, expected: tuple[int, int, int, bool]) -> None:
    flags = Flags().on(machine, ())
    assert (flags.max_num_batched_tokens, flags.max_num_seqs, flags.block_size, flags.async_scheduling) == expected


def test_defaults_depend_on_version_and_on_other_flags() -> None:
    assert Flags(version="0.11.2").on(Hardware(gpu="H100"), ()).gpu_memory_utilization == 0.9
    assert not Flags(version="0.11.2").on(Hardware(gpu="H100"), ()).async_scheduling
    assert Flags(performance_mode="throughput").on(Hardware(gpu="H100"), ()).max_num_batched_tokens == 16384
    whole = Flags(enable_chunked_prefill=False).on(Hardware(model="Llama-2-70B", gpu="A100-80GB"), ())
    assert whole.max_num_batched_tokens == whole.max_model_len == 4096
    few = Flags(max_num_seqs=2, max_model_len=100).on(Hardware(gpu="H100"), ("max_num_seqs", "max_model_len"))
    assert few.max_num_batched_tokens == 200
    written = Flags(max_num_batched_tokens=512).on(Hardware(gpu="H100"), ("max_num_batched_tokens",))
    assert (written.max_num_batched_tokens, written.max_num_seqs) == (512, 512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("max_num_batch_tokens=5", "server.max_num_batch_tokens: unknown key; did you mean max_num_batched_tokens?"),
        ("max_batch_prefill_tokens=5", "server.max_batch_prefill_tokens: unknown key"),
        ("speculative_config=x", "server.speculative_config: expected none: speculative decoding is not simulated"),
        ("data_parallel_size=2", "server.data_parallel_size: expected none: data parallelism is not simulated"),
        ("enable_lora=true", "server.enable_lora: expected none: LoRA is not simulated"),
        ("max_num_seqs=4096", "server.max_num_batched_tokens: expected at least max_num_seqs (4096), found 2048"),
        ("max_num_seqs=0", "server.max_num_seqs: expected 1 or more, found 0"),
        ("kv_cache_tokens=4000", "server.kv_cache_tokens: expected room for max_model_len (4096) tokens, found room"),
        ("scheduling_policy=lifo", "server.scheduling_policy: expected one of fcfs, priority, found 'lifo'"),
        ("engine=vllm", "server.engine: unknown engine; did you mean vllm-v1?"),
    ],
)
def test_a_flag_that_cannot_be_is_refused_by_name(change: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        load(SHIPPED, f"server.{change}")
    assert message in str(caught.value)


def test_flags_of_another_engine_do_not_outlive_it(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: a\nextends: llama2-70b\nserver: {engine: vllm-v1, max_num_seqs: 8}\n")
    assert load(file).server == Flags(max_num_seqs=8).on(load(file).machine, ("max_num_seqs",))
    assert load(file).flags["max_num_seqs"].source == "scenario"
    assert load(file).flags["max_model_len"].source == "default"


def test_an_engine_that_is_not_simulated_is_refused_with_the_nearest_name() -> None:
    assert NAMES == ("tgi-0.9.4", "vllm-v1")
    with pytest.raises(BadInput, match=r"unknown engine; did you mean vllm-v1\?"):
        flags_of("vllm-v0")


def test_the_kv_cache_is_what_weights_and_activations_leave() -> None:
    """Llama-3-8B on one board of 80 GB: 0.92 · 80 · 0.98 GiB, less 16.06 GB of weights, 0.25 GB of activations, 0.13 GB
    of logits and 0.5 to 4 GiB of others; 32 layers · 2 · 8 heads · 128 · 2 bytes = 131,072 bytes a token."""
    found = kv_cache("meta-llama/Meta-Llama-3-8B-Instruct", "H100-80GB", 1, 0.92, 2048, 256)
    assert found is not None
    rows = 2048 * (2 * 14336 + 4 * 4096) * 2 + 4 * 256 * 128256
    left = 0.92 * 80 * 0.98 * 2**30 - 16.06e9 - rows
    assert found.high == pytest.approx((left - 2**29) / 131072, abs=1)
    assert found.low == pytest.approx((left - 2**32) / 131072, abs=1)
    assert kv_cache("Llama-2-70B", "A100-80GB", 1, 0.92, 2048, 256) is None  # the weights alone do not fit
    assert kv_cache("unheard-of", "A100-80GB", 1, 0.92, 2048, 256) is None


def test_the_kv_cache_is_the_scenarios_else_the_calibrations_else_what_fits() -> None:
    machine = Hardware(model="Llama-3-8B", gpu="A100-80GB")

    def middle(low: int, high: int) -> int:
        return (low + high) // 2

    said = 9000.0
    assert Flags(num_gpu_blocks=400).settled(said, middle, machine).kv_tokens == 399 * 16
    assert Flags(kv_cache_tokens=8000).settled(said, middle, machine).blocks == 500
    assert Flags(kv_cache_tokens=Bounds(low=6000, high=7000)).settled(said, middle, machine).blocks == 6500 // 16
    assert Flags().settled(said, middle, machine).kv_cache_tokens == 9000
    found = Flags().settled(None, lambda low, high: low, machine).kv_cache_tokens
    assert found == getattr(kv_cache("Llama-3-8B", "A100-80GB", 1, 0.92, 2048, 256), "low")  # noqa: B009 - may be None
    with pytest.raises(BadInput, match="expected a number of tokens here or in the calibration"):
        Flags().settled(None, middle, Hardware())
    with pytest.raises(BadInput, match="vLLM would not start"):
        Flags(max_model_len=131072).settled(None, middle, Hardware(model="Llama-3.1-8B", gpu="L4"))


@pytest.mark.parametrize(
    ("sets", "binds", "words"),
    [
        (("server.max_num_batched_tokens=512",), "step tokens", "max_num_batched_tokens"),
        (("server.max_num_seqs=16", "server.max_num_batched_tokens=16384"), "batch size", "max_num_seqs"),
        (("server.kv_cache_tokens=20000", "server.max_num_batched_tokens=16384"), "KV cache", "blocks of the KV cache"),
    ],
)
def test_a_forecast_says_which_limit_binds(
    sets: tuple[str, ...], binds: str, words: str, calibration: Calibration
) -> None:
    scenario = load(SHIPPED, "load.users=[2,100]", "load.seconds=20", "load.spawn_rate=100", *sets)
    forecast = simulate(scenario, calibration, replicates=2)
    assert forecast.bottleneck[-1].binds == binds
    assert words in forecast.bottleneck[-1].words
    (alone, *_, crowded) = forecast.rows("e2e_p95")
    assert alone.value is not None and crowded.value is not None and crowded.value > 3 * alone.value
    assert all(row.low is not None and row.high is not None for row in forecast.rows("e2e_mean"))


def test_a_lone_user_of_the_8b_waits_as_long_as_was_published() -> None:
    """Batches of one at five lengths; the fit to all batch sizes misses them by at most 3 %."""
    published = Path("scenarios/shipped/data/argonne_llama3_8b_a100.csv").read_text().splitlines()
    lines = [line for line in published if not line.startswith("#")]
    alone = [row for row in csv.DictReader(lines) if row["phase"] == "batch" and row["sequences"] == "1"]
    assert [row["tokens_per_sequence"] for row in alone] == ["128", "256", "512", "1024", "2048"]
    calibration = calibration_of("llama3-8b-vllm", load("llama3-8b-vllm"))
    for row in alone:
        seconds = float(row["seconds"])
        prompt, output = row["tokens_per_sequence"], row["output_tokens"]
        sets = (f"workload.prompt_tokens={prompt}", f"workload.output_tokens={output}", f"load.seconds={10 * seconds}")
        one = load("llama3-8b-vllm", *sets, "load.users=[1]")
        (mean,) = simulate(one, calibration, replicates=2).rows("e2e_mean")
        assert mean.value == pytest.approx(seconds, rel=0.03)


def test_the_kv_cache_of_an_a100_is_between_the_batches_that_did_and_did_not_fit() -> None:
    """32 · 4096 tokens ran in one pass, 64 · 4096 in waves, at vLLM's gpu_memory_utilization of 2024, 0.9."""
    calibration = calibration_of("llama3-8b-vllm", load("llama3-8b-vllm"))
    assert any("The cache holds 131072 to 262144 tokens" in str(warning) for warning in calibration.warnings)
    small, large = (kv_cache("Llama-3-8B", gpu, 1, 0.9, 2048, 256) for gpu in ("A100-40GB", "A100-80GB"))
    assert small is not None and large is not None
    assert 131072 <= small.low < small.high <= 262144 < large.low


def test_an_unknown_version_and_a_silent_cut_are_said(calibration: Calibration) -> None:
    sets = ("server.version=0.99.0", "workload.output_tokens=3000", "load.users=[1]", "load.seconds=200")
    forecast = simulate(load(SHIPPED, *sets), calibration, replicates=2)
    assert any("vLLM 0.99.0" in text and "rules of 0.32.0" in text for text in map(str, forecast.warnings))
    assert any("cuts answers to 2596 tokens" in text for text in map(str, forecast.warnings))


def test_published_figures_are_not_fitted_for_vllm(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    figure = "{users: 1, metric: e2e_mean, value: 3, rounding: 0.1, source: nobody}"
    work = "workload: {prompt_tokens: 100, output_tokens: 10}\nload: {users: [1]}\n"
    file.write_text(f"name: a\nserver: {{engine: vllm-v1}}\n{work}published: [{figure}]\n")
    with pytest.raises(BadInput, match=r"expected a server of tgi-0\.9\.4, found vllm-v1"):
        calibration_of(file, load(file))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_gaps_and_tokens_from_steps_are_those_of_the_requests(asynchronous: bool) -> None:
    """Over a whole run without preemption: one gap a token but the first of each request, and together they last from
    first tokens to last ones."""
    flags = Flags(num_gpu_blocks=5000, max_num_batched_tokens=256, async_scheduling=asynchronous)
    work = Workload(prompt_tokens=700, output_tokens=40)
    load_ = Load(rate=[1.5], arrivals="poisson", seconds=60.0, settle=0.0)
    run = climb(Scenario(name="v", server=flags, workload=work, load=load_), Machine(STEP_TIME, flags), (3, 0))
    ended = run.requests[run.requests["status"] == "ok"]
    last = float(ended["last_token"].max())
    shown = gaps(run, 0.0, last - 1e-9)
    tokens = run.requests["output_tokens"].sum()
    assert 0 <= tokens - shown.tokens <= run.scenario.server.max_num_seqs
    quiet = ended["ended"].iloc[: len(ended) // 2]
    edge = float(quiet.max())
    shown = gaps(run, 0.0, edge)
    first, end = (run.requests[name].to_numpy() for name in ("first_token", "last_token"))
    whole = end < edge
    total = float((shown.count * shown.weight).sum())
    assert total >= 39 * whole.sum()
    each = (end - first)[whole] / 39
    assert shown.mean() == pytest.approx(float(np.mean(each)), rel=0.05)


def test_chunks_of_a_prompt_that_is_computed_alone_are_steps_of_their_own() -> None:
    """A step takes 1 s and 0.1 ms a position attended; 450 tokens are four chunks of 100 and one of 50, of which the
    k-th of 100 tokens attends to 100 (100 (k - 1) + 50.5) positions and the last to 50 (400 + 25.5)."""
    flags = Flags(max_model_len=2000, max_num_batched_tokens=100, max_num_seqs=8, kv_cache_tokens=100_000)
    work = Workload(prompt_tokens=450, output_tokens=3)
    asked = Scenario(name="v", server=flags, workload=work, load=Load(users=[1], seconds=20.0, settle=0.0))
    run = climb(asked, Machine(Linear("mixed", {"s0": 1.0, "s2": 1e-4}), flags), 0)
    assert run.steps is not None
    steps = run.steps.iloc[:6]
    assert steps["count"].tolist() == [1, 1, 1, 1, 1, 2]  # two tokens more
    assert steps["prefill_tokens"].tolist()[:5] == [100, 100, 100, 100, 50]
    assert steps["prefill_attention"].tolist() == [5050, 15050, 25050, 35050, 21275, 0]
    assert steps["begun"].tolist() == steps["kept"].tolist() == [0, 0, 0, 0, 1, 0]
    assert (steps["end"] - steps["start"]).tolist() == pytest.approx([1.505, 2.505, 3.505, 4.505, 3.1275, 2.0])
    one = replace(run.rungs[0], settled=0.0, end=17.1475)
    assert rung_metrics(run, one)["prefill_share"] == pytest.approx(15.1475 / 17.1475)
    shown = gaps(run, 0.0, 17.2)
    assert shown.tokens == 3 and shown.mean() == pytest.approx(1.0)


def test_a_new_scenario_of_each_engine_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for engine in NAMES:
        assert servecast(["new", engine, "--engine", engine]) == 0
        assert load(f"{engine}.yaml").server.engine == engine
    assert servecast(["new", "yours", "--engine", "vlm-v1"]) == 2
