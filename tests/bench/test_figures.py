from array import array

import pytest

from runner.bench.figures import level_of, median_level, spread
from runner.bench.job import Outcome, Report


def outcome(began: float, ended: float, *, error: str = "", tokens: int | None = 3, chunks: int = 3) -> Outcome:
    return Outcome(
        index=0,
        began=began,
        ended=ended,
        ttft=0.5,
        chunks=chunks,
        completion_tokens=tokens,
        prompt_tokens=10,
        error=error,
    )


def report(*outcomes: Outcome, gaps: list[float] | None = None, stopped: bool = False) -> Report:
    return Report(outcomes=list(outcomes), gaps=array("d", gaps or []).tobytes(), cpu_seconds=0.5, stopped=stopped)


def test_percentiles_are_values_that_were_measured() -> None:
    values = spread([float(v) for v in range(1, 101)])
    assert values is not None
    assert (values.p50, values.p90, values.p99, values.max, values.mean) == (50, 90, 99, 100, 50.5)


def test_the_percentiles_of_one_value_are_that_value() -> None:
    values = spread([4.0])
    assert values is not None
    assert {values.p50, values.p90, values.p99, values.max} == {4.0}


def test_there_is_no_spread_of_nothing() -> None:
    assert spread([]) is None


def test_a_level_is_what_its_workers_measured_together() -> None:
    level = level_of(2, [report(outcome(10, 12), gaps=[0.1, 0.2]), report(outcome(11, 14), gaps=[0.3])])
    assert (level.seconds, level.tokens, level.tokens_per_second, level.counted_by) == (4, 6, 1.5, "usage")
    assert level.inter_token is not None
    assert (level.inter_token.count, level.inter_token.max) == (3, 0.3)
    assert level.tpot is not None
    assert level.tpot.p50 == pytest.approx(0.75)
    assert level.prompt_tokens == 10


def test_tokens_of_failed_requests_count_and_their_times_do_not() -> None:
    level = level_of(1, [report(outcome(0, 2), outcome(2, 4, error="reset", tokens=None, chunks=2))])
    assert (level.requests, level.failed, level.tokens, level.counted_by) == (2, 1, 5, "both")
    assert level.failures["reset"].count == 1
    assert level.request is not None
    assert level.request.count == 1


def test_interrupted_requests_are_not_failures() -> None:
    level = level_of(1, [report(outcome(0, 1, error="interrupted", tokens=None), stopped=True)])
    assert (level.requests, level.failed, level.interrupted) == (0, 0, True)


def test_no_report_at_all_is_an_interrupted_level() -> None:
    level = level_of(1, [])
    assert (level.requests, level.tokens_per_second, level.counted_by, level.interrupted) == (0, 0, "none", True)


def test_the_median_of_runs() -> None:
    runs = [level_of(1, [report(outcome(0, seconds))]) for seconds in (1.0, 3.0, 2.0)]
    assert median_level(runs).seconds == 2.0
