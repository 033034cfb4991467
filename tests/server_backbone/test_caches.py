"""The book of caches: who may begin one, how far it may grow, and when it is over."""

import pytest
from sample_messages import WIDTH, frames_of

from server_backbone.deciding.caches import CacheBook
from splitfl.config.operation import LinkSection
from splitfl.errors import RemoteProtocolError
from splitfl.protocol.messages import Decode

BOUNDS = LinkSection(max_caches=2, max_cache_tokens=20, cache_timeout=10.0)


def decode(cache_id: int, rows: int = 2, new: int = 1, beams: tuple[int, ...] = ()) -> Decode:
    return Decode(
        request_id=1,
        cache_id=cache_id,
        hidden_BSD=frames_of(rows, new, WIDTH),
        lengths_B=(new,) * rows,
        beams_B=beams,
        adapters_off=False,
    )


def test_a_cache_grows_up_to_the_bound_and_is_kept_when_it_would_not_fit() -> None:
    book = CacheBook(BOUNDS)
    assert book.admit("a", decode(1, new=9), 0.0) == ""
    assert book.admit("a", decode(1), 1.0) == ""
    assert "22 tokens" in book.admit("a", decode(1), 2.0)
    assert book.admit("b", decode(1, new=10), 2.0) == "", "another client has bounds of its own"
    assert "21 tokens" in book.admit("a", decode(2, rows=1), 2.0)
    book.ended("a", 1)
    assert book.admit("a", decode(2, rows=1), 2.0) == ""


def test_no_more_caches_than_may_be() -> None:
    book = CacheBook(BOUNDS)
    assert [book.admit("a", decode(number), 0.0) for number in (1, 2)] == ["", ""]
    assert "link.max_caches is 2" in book.admit("a", decode(3), 0.0)
    book.ended("a", 1)
    assert book.admit("a", decode(3), 0.0) == ""


def test_one_that_ended_does_not_begin_again() -> None:
    book = CacheBook(BOUNDS)
    book.admit("a", decode(1), 0.0)
    assert book.expired(10.0) == []
    assert book.expired(10.1) == [("a", 1)]
    assert book.expired(10.1) == []
    assert "begin the generation anew" in book.admit("a", decode(1), 11.0)
    book.forget("a")
    assert book.admit("a", decode(1), 11.0) == "", "a new connection counts from the beginning"


def test_rows_go_on_from_cached_ones() -> None:
    book = CacheBook(BOUNDS)
    book.admit("a", decode(1, rows=2), 0.0)
    assert book.admit("a", decode(1, rows=3, beams=(0, 0, 1)), 0.0) == ""
    for wrong in (decode(1, rows=2), decode(1, rows=3, beams=(0, 1)), decode(1, rows=3, beams=(0, 1, 3))):
        with pytest.raises(RemoteProtocolError, match=r"(cached rows|for a cache of 3)"):
            book.admit("a", wrong, 0.0)
    with pytest.raises(RemoteProtocolError, match="one of 0 cached rows"):
        book.admit("a", decode(2, rows=1, beams=(0,)), 0.0)
    assert book.admit("a", decode(1, rows=3), 0.0) == "", "what was wrong has changed nothing"
