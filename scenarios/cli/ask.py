"""The commands that ask about scenarios: list them, write one, simulate, plan."""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click
import msgspec

from scenarios.cli.main import FAILED, command
from scenarios.cli.options import (
    csv_option,
    force_option,
    json_option,
    one_of,
    say,
    simulation_options,
    warn,
    warnings_option,
    working,
)
from scenarios.cli.output import FORECAST, check_new, check_output, check_run, write
from scenarios.load.changes import Variation, called, variants
from scenarios.load.changes import variations as variations_of
from scenarios.load.scenario import SHIPPED, files_of, load, shipped
from sim.model.errors import BadInput
from sim.model.text import shortened_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scenarios.forecast.forecast import Forecast
    from sim.model.calibration import Calibration
    from sim.model.scenario import Scenario

scenario_argument = click.argument("scenarios", metavar="SCENARIO...", nargs=-1, required=True)


@command("servecast scenarios")
@json_option
def scenarios(as_json: bool) -> None:
    """List the scenarios that come with it."""
    found = [(name, load(name).description) for name in shipped()]
    if as_json:
        say(msgspec.json.encode([{"name": name, "description": text} for name, text in found]).decode())
    else:
        from scenarios.answer.tables import console
        from sim.terminal.columns import show_listed

        show_listed(found, console())


@command("servecast new chat && servecast simulate chat.yaml")
@click.argument("name")
def new(name: str) -> None:
    """Write a commented scenario to start from."""
    stem = Path(name).stem
    if not stem.strip() or shortened_name(stem) != stem:
        raise BadInput("expected a name, such as chat", path=f"new {name!r}")
    path = Path(name if name.endswith(".yaml") else f"{name}.yaml")
    check_new(path)
    template = (SHIPPED / "template.txt").read_text(encoding="utf-8")
    write(path, template.replace("NAME", path.stem).encode())
    say(str(path))


@command("servecast schema > servecast.schema.json")
def schema() -> None:
    """Print the JSON schema of scenarios, for editors."""
    from sim.engines.catalog import json_schema
    from sim.model.scenario import Scenario

    made = msgspec.json.schema(Scenario, schema_hook=json_schema)
    del made["$defs"]["Scenario"]["properties"]["written"]  # ours to say
    made["$defs"]["Scenario"]["properties"]["extends"] = {
        "type": "string",
        "description": "the file this one is laid over",
    }
    say(msgspec.json.format(msgspec.json.encode(made)).decode())


@command("servecast simulate llama2-70b-1500-100 --users 1,8,32 --slo e2e_p95=15")
@scenario_argument
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write DIR/NAME/forecast.json and DIR/NAME/run/.")
@click.option("--steps", is_flag=True, help="With -o: the steps of the run, too (steps.jsonl).")
@click.option(
    "--vary",
    "varied",
    metavar="KEY=A,B,...",
    multiple=True,
    help="What-ifs side by side, on the same seeds; repeatable.",
)
@force_option
@simulation_options
@json_option
@csv_option
@warnings_option
def simulate(
    scenarios: tuple[str, ...],
    output: Path | None,
    steps: bool,
    varied: tuple[str, ...],
    force: bool,
    sets: tuple[str, ...],
    taken_as: str | None,
    seed: int,
    replicates: int,
    jobs: int | None,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Forecast a scenario at every load, with bands.

    --vary server.max_batch_prefill_tokens=4096,8192 forecasts the scenario with each value, and shows them side by
    side; given again, every combination. All are simulated with the same random numbers: what differs is no noise.
    """
    from scenarios.answer.csv import curves_as_csv
    from scenarios.answer.tables import console, show
    from scenarios.forecast.variants import show_variants

    one_of(as_json, as_csv)
    if steps and output is None:
        raise BadInput("expected -o DIR with it, where the run is written", path="--steps")
    variations = variations_of(varied, sets)
    questions = _questions(scenarios, sets, variations)
    if output is not None:
        _check_outputs(questions, output, force)
    made = forecasts(questions, seed, replicates, jobs, taken_as)
    found = [forecast for forecast, _ in made]
    if as_json:
        say(msgspec.json.format(msgspec.json.encode(found[0] if len(found) == 1 else found), indent=1).decode())
    elif as_csv:
        say(curves_as_csv(found))
    else:
        out = console()
        several = len(found) // len(scenarios) if varied else 1
        for i in range(0, len(found), several):
            out.print() if i else None
            if varied:
                values = [question.values for question in questions[i : i + several]]
                show_variants(found[i : i + several], [v.key for v in variations], values, out)
            else:
                show(found[i], out)
    warn(_warnings(found))
    if output is not None:  # last: what was computed is not lost with a full disk
        sys.stdout.flush()
        for forecast, calibration in made:
            _write(output / forecast.name, forecast, calibration, seed, steps=steps)


@command("servecast plan llama2-70b-1500-100 --set slo.ttft_p95=3")
@scenario_argument
@simulation_options
@json_option
@csv_option
@warnings_option
def plan(
    scenarios: tuple[str, ...],
    sets: tuple[str, ...],
    taken_as: str | None,
    seed: int,
    replicates: int,
    jobs: int | None,
    as_json: bool,
    as_csv: bool,
) -> int:
    """Say what each load costs, and which SLO it keeps.

    For every load the cost and the probability, over all that is not known for sure, that each SLO is met.
    Exit status 1 when no load of the ladder keeps every SLO with a probability of 90 %.
    """
    from scenarios.answer.csv import plan_as_csv
    from scenarios.answer.tables import console, flags, show_cost, show_promises, warned
    from scenarios.forecast import slo

    one_of(as_json, as_csv)
    for name in scenarios:
        if not load(name, *sets).slo:
            raise BadInput(
                "missing; a plan needs something to keep, such as --set slo.e2e_p95=15", path=name, key="slo"
            )
    found = [forecast for forecast, _ in forecasts(_questions(scenarios, sets), seed, replicates, jobs, taken_as)]
    if as_json:
        rows = [
            {
                "format": 1,
                "name": f.name,
                "unit": f.unit,
                "slo": f.slo,
                "cost": f.cost,
                "price": f.scenario.price,
                "largest_load": f.crossing.kept_at if f.crossing else None,
                "engine": f.engine,
                "taken_as": f.taken_as,
                "flags": f.flags,
                "warnings": f.warnings,
            }
            | slo.plain(f)
            for f in found
        ]
        say(msgspec.json.format(msgspec.json.encode(rows), indent=1).decode())
    elif as_csv:
        say(plan_as_csv(found))
    else:
        out = console()
        for i, forecast in enumerate(found):
            out.print() if i else None
            out.print(forecast.name, style="bold")
            warned(forecast.assumptions, out)
            show_promises(forecast, out)
            if forecast.cost:
                out.print()
                show_cost(forecast, out)
            out.print(slo.said(forecast))
            out.print(flags(forecast))
    warn(_warnings(found))
    return 0 if all(f.crossing is not None and f.crossing.kept_at is not None for f in found) else FAILED


class Question(NamedTuple):
    """A scenario as it is asked: the file or name it was loaded from, the changes, and the values of keys varied."""

    source: str
    sets: tuple[str, ...]
    scenario: Scenario
    values: tuple[str, ...] = ()


def _questions(names: tuple[str, ...], sets: tuple[str, ...], variations: Sequence[Variation] = ()) -> list[Question]:
    """Every scenario, with every combination of what is varied; every complaint comes before anything runs."""
    if not variations:
        return [Question(name, sets, load(name, *sets)) for name in names]
    found = []
    for name in names:
        for number, variant in enumerate(variants(variations, sets), 1):
            scenario = load(name, *variant.sets)
            title = called(scenario.name, variations, variant, number)
            scenario = msgspec.structs.replace(scenario, name=title)
            found.append(Question(name, variant.sets, scenario, variant.values))
    return found


def forecasts(
    asked: Sequence[Question], seed: int, replicates: int, jobs: int | None, taken_as: str | None = None
) -> list[tuple[Forecast, Calibration]]:
    """Forecast scenarios one after another, each with its calibration; what one is fitted to is fitted once."""
    from scenarios.forecast.simulate import simulate as simulate_scenario
    from scenarios.load.parameters import calibration_of
    from sim.model.calibration import check_suits, read_calibration

    for question in asked:  # every complaint before anything runs
        its = question.scenario
        if its.calibration is not None:
            check_suits(read_calibration(its.calibration), its.server.declared, taken_as, its.calibration)
    made = []
    known: dict[bytes, Calibration] = {}
    with working(jobs) as (executor, commentary):
        for name, sets, scenario, _ in asked:
            calibration = calibration_of(
                name, scenario, sets=sets, seed=seed, executor=executor, progress=commentary, known=known
            )

            def tell(done: float, total: int, what: str = f"simulating {scenario.name}") -> None:
                commentary(what, done, total)

            forecast = simulate_scenario(
                scenario,
                calibration,
                seed=seed,
                replicates=replicates,
                executor=executor,
                progress=tell,
                changes=sets,
                taken_as=taken_as,
            )
            made.append((forecast, calibration))
    return made


def _check_outputs(asked: Sequence[Question], output: Path, force: bool) -> None:
    folders = [output / question.scenario.name for question in asked]
    if len(set(folders)) < len(folders):
        raise BadInput("expected scenarios of different names, which are the folders' in -o")
    inputs = [file for question in asked for file in files_of(question.source, *question.sets)]
    inputs += [Path(q.scenario.calibration) for q in asked if q.scenario.calibration is not None]
    for folder in folders:
        check_run(folder / "run", inputs=inputs)
        check_output(folder / "forecast.json", FORECAST, inputs=inputs, force=force)


def _write(folder: Path, forecast: Forecast, calibration: Calibration, seed: int, *, steps: bool) -> None:
    """Write a forecast and its run, both or neither."""
    from scenarios.forecast.forecast import write_forecast
    from scenarios.forecast.simulate import central_run
    from sim.model.flags import SCENARIO
    from sim.run import write_run

    written = [name for name, flag in forecast.flags.items() if flag.source == SCENARIO]
    scenario = msgspec.structs.replace(forecast.scenario, written=written)
    run = write_run(central_run(scenario, calibration, seed), folder / "run", steps=steps)
    try:
        write_forecast(folder / "forecast.json", forecast)
    except BaseException:
        shutil.rmtree(run)
        with suppress(OSError):
            folder.rmdir()
        raise


def _warnings(found: list[Forecast]) -> list[str]:
    if len(found) == 1:
        return found[0].warnings
    shared = [text for text in found[0].warnings if all(text in forecast.warnings for forecast in found)]
    return shared + [f"{f.name}: {text}" for f in found for text in f.warnings if text not in shared]
