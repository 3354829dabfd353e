"""Whether a status file is that of a program that is well."""

from fleetfed.shared.health import EVERY, OLD, ailment

NOW = 1_700_000_000_000


def test_a_fresh_file_without_an_obstacle_is_well() -> None:
    assert ailment({"updated": NOW - 1000, "obstacle": ""}, now=NOW) == ""


def test_the_obstacle_is_the_reason() -> None:
    assert ailment({"updated": NOW, "obstacle": "not connected upstream"}, now=NOW) == "not connected upstream"


def test_an_old_file_means_that_nothing_runs() -> None:
    found = ailment({"updated": NOW - 61_000, "obstacle": ""}, now=NOW)
    assert found == "the status is 61 s old, more than 60 s: the program does not run, or hangs"


def test_a_clock_that_was_put_back_makes_nobody_ill() -> None:
    assert ailment({"updated": NOW + 3_600_000, "obstacle": ""}, now=NOW) == ""


def test_a_file_of_an_older_program_says_nothing() -> None:
    assert "older program" in ailment({"id": "g-north"}, now=NOW)


def test_writing_twice_may_fail_before_anybody_is_given_up() -> None:
    assert OLD >= 3 * EVERY
