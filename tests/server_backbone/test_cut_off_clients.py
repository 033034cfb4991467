"""A client whose connections are cut off again and again has to wait a minute, and no longer."""

from pathlib import Path

from server_backbone.door.admission import Admission
from splitfl.config.operation import LinkSection
from splitfl.protocol.messages import Why
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
