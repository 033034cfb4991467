"""Who comes too often waits: connections that are cut off again and again, sessions without end."""

from pathlib import Path

from server_backbone.door.admission import Admission
from server_backbone.door.members import Members
from splitfl.config.operation import LinkSection
from splitfl.protocol.messages import WIRE_VERSION, Hello, Why
from splitfl.session.limits import limits_of
from splitfl.session.terms import Terms
from splitfl.transport.keys import AllowList, authorize, keygen

TERMS = Terms(
    hidden_size=8,
    dtype="f32",
    max_seq_length=8,
    max_batch_size=1,
    max_in_flight=1,
    max_packed_examples=0,
    num_rounds=1,
    local_steps=1,
    micro_batches=1,
    needs_backward=True,
    num_trainable=0,
    layer_shapes=(),
    layer_dtypes=(),
    has_controls=False,
)


def test_three_cuts_within_ten_minutes(tmp_path: Path) -> None:
    keygen(tmp_path / "server")
    keys = {}
    for name in ("clinic-a", "clinic-b"):
        keys[name] = keygen(tmp_path / name).public
        authorize(tmp_path / "server", name, keys[name])
    admission = Admission(AllowList(tmp_path / "server"), limits_of(TERMS, LinkSection(), clients=2))
    for at_s in (0.0, 500.0, 1000.0, 1100.0):  # never three within ten minutes
        admission.cut_off("clinic-a", at_s)
        assert admission.too_soon(keys["clinic-a"], at_s) is None
    admission.cut_off("clinic-a", 1101.0)
    waits = admission.too_soon(keys["clinic-a"], 1111.0)
    assert waits is not None
    assert waits.code is Why.FULL  # which a client tries again after
    assert "it may come back in 50 s" in waits.reason
    assert admission.too_soon(keys["clinic-b"], 1111.0) is None
    assert admission.too_soon("", 1111.0) is None
    assert admission.too_soon(keys["clinic-a"], 1161.0) is None


def test_sixty_sessions_at_once_and_one_more_a_second() -> None:
    admission = Admission(None, limits_of(TERMS, LinkSection(), clients=2))

    def objection(client_id: str, now_s: float) -> str:
        hello = Hello(wire_version=WIRE_VERSION, software="test", client_id=client_id)
        refused = admission.objection(hello, "", Members(), now_s=now_s)
        return "" if refused is None else f"{refused.code.name}: {refused.reason}"

    assert [objection("mallory", 10.0) for _ in range(60)] == [""] * 60
    said = "FULL: mallory has begun 60 sessions in short order: one a second is taken, try again"
    assert objection("mallory", 10.9) == said
    assert objection("clinic", 10.9) == ""
    assert [objection("mallory", 11.0), objection("mallory", 11.0)] == ["", said]
