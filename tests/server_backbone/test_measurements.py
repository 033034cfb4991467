"""What clients have measured is said once, put together, and not kept for ever."""

from server_backbone.desks.training.measurements import Measurements

LOSS = {"eval_loss": 2.0}


def test_what_has_changed_is_said_once() -> None:
    measurements = Measurements()
    measurements.add("before", 0, "a", LOSS)
    measurements.add("before", 0, "b", LOSS)
    assert list(measurements.news()) == [("before", 0, {"a": LOSS, "b": LOSS})]
    assert list(measurements.news()) == []
    measurements.add("before", 0, "c", LOSS)
    assert [sorted(clients) for _, _, clients in measurements.news()] == [["a", "b", "c"]]


def test_of_thousands_of_rounds_the_newest_are_kept() -> None:
    measurements = Measurements()
    measurements.add("before", 0, "a", LOSS)
    said = []
    for number in range(1, 3001):
        measurements.add("round", number, "a", LOSS)
        said += [round_number for _, round_number, _ in measurements.news()]
        assert len(measurements) <= 10
    assert said == list(range(3001))


def test_a_late_word_of_an_old_round_does_not_stand_for_all() -> None:
    measurements = Measurements()
    for number in range(1, 12):
        measurements.add("round", number, "a", LOSS)
        list(measurements.news())
    measurements.add("round", 2, "b", LOSS)
    assert list(measurements.news()) == []
    measurements.add("round", 10, "b", LOSS)
    assert [(number, sorted(clients)) for _, number, clients in measurements.news()] == [(10, ["a", "b"])]
