"""What the data leave open is settled by what is known of servers, and stays as wide as that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from streams import TRUTH, lengths, observe
from warned import texts

from calibrate.regression.design import Rows
from calibrate.regression.priors import FIXED_PART, prior_for
from calibrate.sources.streamed import calibrate_runs
from sim.model.calibration import Calibration
from sim.run import read_run
from sim.steptime.linear import StepTime, step_time
from sim.steptime.noise_parameters import Noise

DATA = Path(__file__).parent.parent / "data"
NOISE = Noise(prefill=[0.97, 1.0, 1.03], decode=[0.95, 1.0, 1.05], drift=0.01, drift_seconds=8.0)


def prefill(sequences: int, prompt: int) -> Callable[[StepTime], float]:
    """How long a form's prefill of so many such prompts takes, s."""
    return lambda form: form.prefill(sequences, sequences * prompt, sequences * prompt**2, prompt)


def central(calibration: Calibration, seconds: Callable[[StepTime], float]) -> float:
    return seconds(step_time(calibration.model, calibration.values))


def drawn(calibration: Calibration, seconds: Callable[[StepTime], float]) -> list[float]:
    """What every draw says."""
    draws = ({name: column[i] for name, column in calibration.draws.items()} for i in range(calibration.n_draws))
    return [seconds(step_time(calibration.model, draw)) for draw in draws]


def test_one_prompt_length_leaves_the_rest_to_belief_and_says_so():
    run = observe([1, 2, 4, 8, 16, 32], lengths(50, 200), noise=NOISE, seconds=10.0).run
    calibration = calibrate_runs([run])
    assert any("every prompt had about 50 tokens" in d for d in texts(calibration.warnings))
    low, high = np.quantile(drawn(calibration, prefill(1, 1500)), [0.025, 0.975])
    true = prefill(1, 1500)(step_time("affine", TRUTH))
    assert low < true < high
    assert (high - low) / true > 0.15  # thirty times the prompt: no narrow answer is honest


def test_a_prefills_fixed_part_is_about_a_decode_step_on_published_machines():
    """Of single prompts up to 2,048 tokens: the time that a parabola or a line leaves for none, of a decode step."""
    splitwise = pd.read_csv(DATA / "splitwise_llama2_70b_a100_tp4_tp8_median.csv", comment="#")
    lmdeploy = pd.read_csv(DATA / "lmdeploy_v010a1_a100_static.csv", comment="#")
    shares = []
    for _, alone in splitwise.query("batch_size == 1 and prompt_size <= 2048").groupby("tensor_parallel"):
        times = alone.groupby("prompt_size")[["prompt_ms_med", "token_ms_med"]].median()
        fixed = np.polyfit(times.index, times["prompt_ms_med"], 2, w=1 / times["prompt_ms_med"])[-1]
        shares.append(fixed / times["token_ms_med"].iloc[0])
    for _, alone in lmdeploy.query("batch == 1 and prompt > 1").groupby("model"):
        times = alone.groupby("prompt")[["ftl_avg_s", "tok_p50_s"]].median()
        shares.append(np.polyfit(times.index, times["ftl_avg_s"], 1)[-1] / times["tok_p50_s"].iloc[0])
    middle, spread = FIXED_PART
    assert len(shares) == 6
    assert min(shares) > 0.9 and max(shares) < 1.9  # 0.6 where router-http was recorded
    assert max(abs(share - middle) for share in (*shares, 0.6)) < 2.5 * spread


def test_lone_prompts_tell_what_prompts_prefilled_together_take():
    """The prior took a third of a single prefill as its constant: four together came out a fifth too quick."""
    run = read_run(DATA / "tgi-0.9.4-router-http" / "long")
    few, known = (central(calibrate_runs([run], rungs=[rungs]), prefill(4, 1500)) for rungs in ({0, 1}, None))
    assert few == pytest.approx(known, rel=0.05)


def test_a_long_prompt_is_not_nearly_free_where_only_short_ones_were_seen():
    """All that a prompt of 20 tokens costs could have been the prompt's: fifteen times the tokens came out as dear."""
    calibration = calibrate_runs([read_run(DATA / "tgi-0.9.4-cpu" / "short-again")])
    low, high = np.quantile(drawn(calibration, prefill(1, 300)), [0.1, 0.9])
    assert low > 0.08  # it took 0.17 to 0.18 s
    assert high > 0.16


def test_what_joining_and_dropping_cost_a_large_batch_is_not_read_from_two_users():
    run = observe([1, 2], lengths(50, 200), noise=NOISE, seconds=20.0).run
    columns = calibrate_runs([run]).draws
    per_sequence = np.array(columns["b1"]) + 150 * np.array(columns["b2"])
    for what in ("c1", "f1"):
        assert np.quantile(columns[what], 0.9) < 4 * per_sequence.mean()


def test_batches_beyond_those_seen_keep_to_the_tiles_of_the_largest():
    """A step of 16 rows is hardly longer than one of 12 on the recorded server; the trend alone went on."""
    of_24 = [
        central(
            calibrate_runs([read_run(DATA / "tgi-0.9.4-cpu" / name)]), lambda form: form.decode(24, 24 * 110, 110)[0]
        )
        for name in ("short", "short-between")
    ]
    assert of_24[0] == pytest.approx(of_24[1], rel=0.1)


def test_a_plane_through_steps_that_leaves_no_constant_still_has_a_prior():
    n = np.array([1.0, 2.0, 4.0, 8.0])
    columns = {"decode_sequences": n, "sequences": n, "decode_longest": 100.0 + n, "idle": n < 0}
    columns |= dict.fromkeys(("prefill_tokens", "prefill_longest"), 0 * n)
    zero = np.zeros(4, dtype=np.int64)
    steps = 0.01 * n**1.2  # more than in proportion: the best plane goes through the origin
    rows = Rows(pd.DataFrame(columns), pd.DataFrame(), steps, n < 0, zero, zero, zero, [])
    prior = prior_for(("s0", "s1", "s2"), rows, padded=False)
    assert np.isfinite(prior.rows).all() and prior.rows[0, 2] <= 1e6  # 1 us or more a position
