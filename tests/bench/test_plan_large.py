"""The figure for a large plan is one that a busy machine can hold, so that a quadratic step shows at once."""

from tests.bench.plan_large import edits, measure


def test_a_plan_of_a_thousand_models_takes_less_than_100_ms() -> None:
    found = measure(1000, enough=100)
    assert set(found) == {name for name, _, _ in edits(10)}
    assert found["all files changed"]["actions"] == 1000
    assert {name: row for name, row in found.items() if min(row["all_ms"]) > 100} == {}
