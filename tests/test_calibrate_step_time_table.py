"""Step-time tables: planted parameters come back, the form follows the data, and what cannot be read is one line."""

from pathlib import Path

import numpy as np
import pytest
from warned import texts

from calibrate.regression.selection import fit_relative, select, subsets
from calibrate.sources.static_batch import TERMS, batch_terms
from calibrate.sources.step_time_table import calibrate_table
from calibrate.sources.table_layout import read_table
from scenarios.cli.main import status
from sim.model.calibration import read_calibration
from sim.model.errors import BadInput, NotEnoughData
from sim.model.scenario import Hardware
from sim.steptime.linear import affine

DATA = Path(__file__).parent.parent / "data"
SPLITWISE = DATA / "splitwise_llama2_70b_a100_tp4_tp8_median.csv"
LMDEPLOY = DATA / "lmdeploy_v010a1_a100_static.csv"
ARGONNE = DATA / "argonne_llama2_70b_4xa100_40gb.csv"
TRUE = {"a0": 0.02, "a1": 2e-4, "a3": 5e-3, "b0": 0.04, "b1": 4e-4, "b2": 2e-7}


def rng():
    return np.random.default_rng(5)


def plain(path, true, *, noise=0.01, unit="seconds"):
    """A micro-benchmark of a machine with the parameters `true`, in the plain columns."""
    form, wobble = affine(**true), np.random.default_rng(1)
    lines = ["# a machine made up for a test", f"phase,sequences,tokens_per_sequence,{unit}"]
    for n in (1, 2, 4, 8, 16, 32):
        for tokens in (64, 256, 1024):
            prefill = form.prefill(n, n * tokens, n * tokens**2, tokens)
            decode, _ = form.decode(n, n * tokens, tokens)
            for phase, seconds in (("prefill", prefill), ("decode", decode)):
                shown = seconds * (1 + noise * wobble.standard_normal()) * (1000 if unit == "ms" else 1)
                lines.append(f"{phase},{n},{tokens},{shown:.9f}")
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("unit", ["seconds", "ms"])
def test_planted_parameters_lie_in_their_intervals_and_absent_terms_stay_out(tmp_path, unit):
    fitted = calibrate_table([plain(tmp_path / "t.csv", TRUE, unit=unit)], rng())
    assert set(fitted.parameters) == set(TRUE)
    inside = [p.low <= TRUE[name] <= p.high for name, p in fitted.parameters.items()]
    assert sum(inside) >= len(inside) - 1  # 95 % each
    assert {name: p.value for name, p in fitted.parameters.items()} == pytest.approx(TRUE, rel=0.15)
    assert fitted.residuals["decode"].p95_relative < 0.03
    assert fitted.range["batch_prefill_tokens"] == (64, 32 * 1024)


def test_a_cost_on_the_longest_context_is_found_where_there_is_one(tmp_path):
    fitted = calibrate_table([plain(tmp_path / "t.csv", TRUE | {"b2": 0.0, "b3": 5e-6})], rng())
    assert "b3" in fitted.parameters
    assert "b2" not in fitted.parameters
    assert "b3" in fitted.source.note  # the report names the form


def test_prefill_and_decode_may_come_from_two_files(tmp_path):
    prefill, decode = tmp_path / "prefill.csv", tmp_path / "decode.csv"
    prefill.write_text("prompt_tokens,ms\n128,60\n256,80\n512,120\n1024,200\n")
    decode.write_text("batch,context_tokens,ms\n1,300,41\n8,300,48\n16,300,56\n32,300,72\n")
    fitted = calibrate_table([prefill, decode], rng())
    assert fitted.parameters["a1"].value == pytest.approx(0.14 / 896, rel=1e-3)
    assert len(fitted.source.files) == 2
    with pytest.raises(NotEnoughData, match="decode times of at least two sizes are needed, found none"):
        calibrate_table([prefill], rng())


def test_whole_batches_are_fitted_through_the_sum_of_their_steps(tmp_path):
    true = {"a0": 0.01, "a1": 3e-4, "b0": 0.035, "b1": 6e-4}
    form = affine(**true)
    lengths = ((128, 64), (1024, 64), (128, 512), (512, 8), (2048, 8), (2048, 256), (64, 8))
    lines = ["phase,sequences,tokens_per_sequence,output_tokens,seconds"]
    for n in (1, 4, 16, 32):
        for prompt, out in lengths:
            steps = [form.decode(n, n * (prompt + j), prompt + j)[0] for j in range(1, out)]
            whole = form.prefill(n, n * prompt, n * prompt**2, prompt) + sum(steps)
            lines.append(f"batch,{n},{prompt},{out},{whole:.9f}")
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines))
    fitted = calibrate_table([path], rng())
    for name in ("a1", "b0", "b1"):
        assert fitted.parameters[name].value == pytest.approx(true[name], rel=1e-4)


def test_argonne_says_where_its_batches_ran_in_waves():
    for framework, below, above in (("Deepspeed-MII", 32768, 65536), ("TensorRT-LLM", 16384, 32768)):
        fitted = calibrate_table([ARGONNE], rng(), where={"framework": framework})
        said = [warning for warning in texts(fitted.warnings) if "waves" in warning]
        assert len(said) == 1
        assert f"holds {below} to {above} tokens" in said[0]
        assert fitted.residuals["batch"].p95_relative < 0.05
        assert 0.030 < fitted.parameters["b0"].value < 0.042  # s, a step at batch 1 on these boards
        # as many tokens out as in: a1 and b1 only as a sum, which is sure where neither part is
        a1, b1 = (np.array(fitted.draws[name]) for name in ("a1", "b1"))
        assert (a1 + b1).std() / (a1 + b1).mean() < 0.15
        assert a1.std() / a1.mean() > 0.4
        assert any("splits their sum at random" in warning for warning in texts(fitted.warnings))


def test_splitwise_and_lmdeploy_agree_on_a_prefill_of_1500_tokens():
    for path, where in ((SPLITWISE, {"tensor_parallel": "4"}), (LMDEPLOY, {"model": "llama2-70b"})):
        fitted = calibrate_table([path], rng(), where=where)
        seconds = affine(**fitted.values).prefill(1, 1500, 1500**2, 1500)
        assert 0.26 < seconds < 0.34
        assert fitted.machine.gpus == 4


def test_one_machine_of_several_is_chosen_by_where_by_machine_or_with_a_warning():
    chosen = calibrate_table([LMDEPLOY], rng(), machine=Hardware(model="meta-llama/Llama-2-7B", gpus=1))
    assert chosen.machine.model == "llama2-7b"  # not one of the larger
    guessed = calibrate_table([LMDEPLOY], rng())
    assert guessed.machine.model == "llama2-70b"
    assert any("holds 4 machines" in text for text in texts(guessed.warnings))
    with pytest.raises(BadInput, match="model: expected one of internlm-20b, llama2-13b, llama2-70b, llama2-7b"):
        calibrate_table([LMDEPLOY], rng(), where={"model": "llama"})
    with pytest.raises(BadInput, match="colour: expected one of the columns that tell machines apart"):
        calibrate_table([LMDEPLOY], rng(), where={"colour": "red"})


def test_the_same_seed_gives_the_same_draws():
    one, two = (calibrate_table([SPLITWISE], rng(), draws=20) for _ in range(2))
    assert one == two
    assert one.n_draws == 20
    assert one != calibrate_table([SPLITWISE], np.random.default_rng(6), draws=20)


def test_no_coefficient_is_negative_and_errors_count_relatively():
    design = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 100.0]])
    falling = np.array([3.0, 2.0, 1.0])
    assert (fit_relative(design, falling) >= 0).all()
    # two timings of one thing, 1 s and 3 s: (c-1)² + (c/3-1)² is least at 1.2, not at their mean
    assert fit_relative(np.ones((2, 1)), np.array([1.0, 3.0]))[0] == pytest.approx(1.2)


def test_the_largest_batch_is_left_out_too():
    """A term that only the largest batch pays for is not taken for granted by the smaller ones."""
    n = np.repeat([1.0, 2.0, 4.0, 8.0], 3)
    design = np.stack([np.ones_like(n), n], axis=1)
    folds = np.unique(n, return_inverse=True)[1]
    flat = select(("b0", "b1"), design, np.full(len(n), 2.0), folds, subsets(("b0", "b1")))
    assert flat.chosen.terms == ("b0",)
    rising = select(("b0", "b1"), design, 2.0 + n, folds, subsets(("b0", "b1")))
    assert rising.chosen.terms == ("b0", "b1")
    without = next(score for score in rising.tried if score.terms == ("b0",))
    assert without.error > 0.3  # the fold of 8 sequences, missed from below, is among those counted


HEAD = "phase,sequences,tokens_per_sequence,seconds\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"t.csv: empty; expected a header phase,"),
        ("# only a comment\n", r"t.csv: empty"),
        (HEAD, r"t.csv:1: expected rows below the header, found none"),
        ("sequences,tokens\n1,2\n", r"t.csv:1: expected the columns phase, sequences, .* found sequences, tokens"),
        ("phase,sequences,tokens_per_sequense,seconds\n", r"tokens_per_sequense: did you mean tokens_per_sequence\?"),
        ("phase,sequences,sequences,tokens_per_sequence,ms\n", r"t.csv:1: sequences: the column is there twice"),
        (HEAD + "prefill,1,128,0.1\nprefil,1,256,0.2\n", r"t.csv:3: phase: expected one of prefill, .*'prefil'"),
        (HEAD + "# note\n\nprefill,1,128,abc\n", r"t.csv:4: seconds: expected a positive number, found 'abc'"),
        (HEAD + "prefill,1,128,nan\n", r"t.csv:2: seconds: expected a positive number, found 'nan'"),
        (HEAD + "prefill,1,128,inf\n", r"seconds: expected a positive number"),
        (HEAD + "prefill,1,128,0\n", r"seconds: expected a positive number, found '0'"),
        (HEAD + "prefill,-1,128,0.1\n", r"t.csv:2: sequences: expected a positive number, found '-1'"),
        (HEAD + "prefill,1.5,128,0.1\n", r"sequences: expected a whole number, found '1.5'"),
        (HEAD + "prefill,1,128\n", r"t.csv:2: expected 4 cells, found 3"),
        (HEAD + "prefill,1,,0.1\n", r"tokens_per_sequence: expected a positive number, found ''"),
        (HEAD + "batch,1,128,0.1\n", r"t.csv:2: phase: a row of phase batch needs the column output_tokens"),
    ],
)
def test_what_cannot_be_meant_is_one_line_with_file_line_and_column(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        read_table(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_one_that_is_not_text(tmp_path):
    with pytest.raises(BadInput, match=r"no\.csv: cannot be read \(No such file"):
        read_table(tmp_path / "no.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BadInput, match=r"b\.csv: cannot be read \(not text\)"):
        read_table(tmp_path / "b.csv")


def test_the_command_line_fits_the_rows_it_is_told_to(tmp_path, capsys):
    out = tmp_path / "c.json"
    assert status(["calibrate", str(ARGONNE), "--where", "framework=vLLM", "-o", str(out)]) == 0
    assert read_calibration(out).residuals["batch"].rows == 8
    assert status(["calibrate", str(ARGONNE), "--where", "framework", "-o", str(out)]) == 2
    assert "--where framework: expected COLUMN=VALUE" in capsys.readouterr().err
    assert status(["calibrate", str(tmp_path), "--where", "model=x"]) == 2
    assert "--where: expected only with tables" in capsys.readouterr().err


def test_times_in_another_unit_than_the_layout_has_are_warned_about(tmp_path, capsys):
    """Splitwise's columns are ms; the same in seconds make steps that last microseconds."""
    header = "prompt_size,batch_size,prompt_time,token_time,e2e_time"
    for scale, warned_about in ((1.0, True), (1000.0, False), (1e6, True)):
        rows = []
        for n in (1, 2, 4, 8):
            for tokens in (128, 512, 1024):
                prefill, step = 0.012 + 8e-5 * n * tokens, 0.02 + 2e-4 * n + 4e-7 * n * tokens
                rows.append(f"{tokens},{n},{scale * prefill},{scale * step},{scale * (prefill + 63 * step)}")
        (tmp_path / "t.csv").write_text("\n".join([header, *rows]))
        assert status(["calibrate", str(tmp_path / "t.csv"), "-o", str(tmp_path / "c.json"), "--warnings"]) == 0
        assert ("is the table in another unit?" in capsys.readouterr().err) == warned_about, scale


def test_terms_of_a_batch_are_those_of_its_steps():
    true = {name: 0.1 + i for i, name in enumerate(TERMS)}
    form = affine(**true)
    for n, prompt, out in ((1, 7, 1), (1, 7, 2), (3, 20, 9)):
        steps = [form.decode(n, n * (prompt + j), prompt + j)[0] for j in range(1, out)]
        whole = form.prefill(n, n * prompt, n * prompt**2, prompt) + sum(steps)
        terms = batch_terms(n, prompt, out)
        assert sum(true[name] * float(x) for name, x in terms.items()) == pytest.approx(whole, rel=1e-12)
        assert float(terms["a2"]) == n * prompt * (prompt + 1) / 2
