from runner.control.backoff import Backoff


def test_doubles_up_to_the_maximum() -> None:
    backoff = Backoff(initial=1, maximum=5)
    assert [backoff.failed(0.0) for _ in range(5)] == [1, 2, 4, 5, 5]


def test_forgets_after_a_stable_while() -> None:
    backoff = Backoff(initial=1, stable=60)
    backoff.failed(0.0)
    backoff.failed(0.0)
    backoff.started(100.0)
    assert backoff.failed(161.0) == 1


def test_does_not_forget_when_it_was_up_for_a_moment() -> None:
    backoff = Backoff(initial=1, stable=60)
    backoff.failed(0.0)
    backoff.started(100.0)
    assert backoff.failed(130.0) == 2


def test_many_failures_do_not_overflow() -> None:
    backoff = Backoff(maximum=30)
    assert {backoff.failed(0.0) for _ in range(5000)} <= {0.25, 0.5, 1, 2, 4, 8, 16, 30}
