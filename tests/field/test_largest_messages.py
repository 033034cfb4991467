"""The largest of everything, with keys, over 20 Mbit/s: each arrives on the connection that it was begun on."""

import re
from collections.abc import Callable
from pathlib import Path

from field.machines import Network
from field.parties import Parties, settings

from splitfl.config.operation import LinkSection

_EMBEDDING_BYTES = 49_152 * 576 * 4


def test_files_and_an_upload_of_the_whole_embedding(new_network: Callable[[], Network], models: Path) -> None:
    assert _EMBEDDING_BYTES % LinkSection().frame_bytes == 0  # so all its frames are as large as a frame may be
    parties = Parties.of(new_network(), models, "clinic-a", rate="20mbit")
    operator, (clinic,) = parties.operator, parties.clinics

    server = operator.start(
        *settings("train.embeddings=true", "federation.num_rounds=1", "federation.local_steps=1"),
    )
    before = operator.machine.connections("PassiveOpens")
    client = clinic.start(*settings("policy.allow_embeddings=true"))
    client.ends_well(420.0)
    server.ends_well(120.0)

    assert operator.machine.connections("PassiveOpens") - before == 2  # for data, and for heartbeats
    assert operator.troubles() == []
    (done,) = operator.events("client_done")
    assert done["bytes_sent"] > _EMBEDDING_BYTES
    assert done["bytes_received"] > _EMBEDDING_BYTES + 142e6
    assert done["bytes_of_files"] > 142e6
    # one every few seconds in about a minute of files, and three quarters of one each of upload and merge
    for what in (
        r"received ([\d.]+) MB of 14\d\.\d",
        r"sent ([\d.]+) MB of 11\d\.\d",
        r"received ([\d.]+) MB of 11\d\.\d",
    ):
        said = [float(size) for size in re.findall(f"{what} MB", client.said)]
        assert len(said) > 5, f"the screen says {what} {len(said)} times: {client.said}"
        assert said == sorted(said)
