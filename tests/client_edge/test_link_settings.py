"""A client's connections are as the run's settings want them, from the first message on."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished, write_text

from client_edge.connection.joining import fits_bounds
from splitfl.config.operation import LinkSection


def test_frames_larger_than_usual_pass_on_the_first_connection(
    make_model: Callable[..., Path],
    federate: Callable[..., Finished],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The settings say how large a frame may be, and they come through a connection that was made without them."""
    finished = federate(
        {
            "model": {
                "model_name_or_path": str(
                    make_model(hidden_size=512, intermediate_size=64, head_dim=16, num_attention_heads=4)
                )
            },
            "federation": {"num_rounds": 1, "local_steps": 2, "per_device_train_batch_size": 4},
            "text": {"max_seq_length": 64},
            "link": {"frame_bytes": 1 << 20, "heartbeat_timeout": 12.0},
        },
        {"a": {"path": write_text(tmp_path / "a.txt", num_lines=24, seed=1, lengths=(60, 62)), "eval_fraction": 0.0}},
        transport="tcp",
    )
    assert finished.errors == {}
    assert "server lost" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ({}, True),
        ({"frame_bytes": 1 << 16}, True),
        ({"frame_bytes": 1 << 19}, False),
        ({"heartbeat_timeout": 9.0}, False),
        ({"heartbeat_interval": 1.0}, False),
        ({"max_in_flight": 7, "max_rms": 1.0}, True),
    ],
)
def test_connections_are_made_anew_where_the_run_wants_others(wanted: dict[str, float], fits: bool) -> None:
    assert fits_bounds(LinkSection(), LinkSection.model_validate(wanted)) == fits
