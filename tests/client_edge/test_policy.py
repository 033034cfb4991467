"""The client has the last word: what its policy does not allow is not taken part in, whatever the server says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from client_edge.consent.policy import SPENT_FILE, Allowance, check_known
from splitfl.config.own import PolicySection
from splitfl.config.rules import objections_to
from splitfl.config.trees import RunConfig, ServerConfig
from splitfl.errors import NotAllowed
from splitfl.models.checkpoint import TensorFile, save_tensors

DIGEST = "ab" * 32


def run_with(**sections: Any) -> RunConfig:
    return RunConfig.from_tree(
        {"model": {"model_name_or_path": "tiny"} | sections.pop("model", {}), **sections}, source=""
    )


def test_the_shipped_settings_pass_the_shipped_policy() -> None:
    assert objections_to(PolicySection(), run_with()) == []
    assert objections_to(PolicySection(), run_with(model={"bottom_layers": 1, "top_layers": 2})) == []


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"model": {"bottom_layers": 0}}, "model.bottom_layers = 0 (policy.min_bottom_layers = 1)"),
        ({"model": {"top_layers": 0}}, "model.top_layers = 0 (policy.min_top_layers = 1)"),
        ({"train": {"embeddings": True}}, "policy.allow_embeddings = false"),
        ({"evaluation": {"measures": ["exact_match"]}}, "policy.allow_answers = false"),
        ({"evaluation": {"measures": ["rouge_l"]}}, "policy.allow_answers = false"),
        ({"federation": {"num_rounds": 10**9}}, "policy.max_rounds = 1,000"),
        ({"federation": {"local_steps": 10**9}}, "policy.max_steps = 100,000"),
        ({"link": {"heartbeat_timeout": 1e9}}, "policy.max_silence = 300"),
        ({"federation": {"per_device_train_batch_size": 1 << 40}}, "policy.max_step_rows = 4,096"),
        ({"federation": {"gradient_accumulation_steps": 1 << 40}}, "policy.max_step_rows = 4,096"),
        ({"federation": {"per_device_eval_batch_size": 1 << 40}}, "policy.max_step_rows = 4,096"),
        ({"optimizer": {"learning_rate": 1e9}}, "policy.max_learning_rate = 10"),
    ],
)
def test_what_a_server_may_not_set(sections: dict[str, Any], says: str) -> None:
    assert says in "; ".join(objections_to(PolicySection(), run_with(**sections)))


def test_what_is_allowed_is_allowed() -> None:
    policy = PolicySection(min_bottom_layers=0, allow_embeddings=True, allow_answers=True)
    run = run_with(
        model={"bottom_layers": 0}, train={"embeddings": True}, evaluation={"measures": ["rouge_l", "accuracy"]}
    )
    assert objections_to(policy, run) == []


def test_a_policy_is_a_clients_and_no_servers() -> None:
    with pytest.raises(Exception, match="policy"):
        ServerConfig.from_tree({"model": {"model_name_or_path": "x"}, "policy": {}}, source="test")


class TestAllowance:
    """Bounds hold over all starts of a client, and the last thing allowed is still allowed."""

    @pytest.mark.parametrize("bound", ["max_steps", "max_rounds", "max_bytes_sent", "max_hours"])
    def test_a_bound_is_reached(self, tmp_path: Path, bound: str) -> None:
        now = [0.0]
        allowance = Allowance(PolicySection(**{bound: 3}), tmp_path, clock=lambda: now[0])

        def spend(amount: int) -> None:
            now[0] = amount * 3600.0
            allowance.step() if bound == "max_steps" else allowance.round(amount)
            allowance.sent(amount)

        for amount in (1, 2, 3):
            spend(amount)
        with pytest.raises(NotAllowed, match=f"policy.{bound} is reached"):
            spend(4)

    def test_another_start_begins_where_the_last_ended(self, tmp_path: Path) -> None:
        for _ in range(2):
            allowance = Allowance(PolicySection(max_steps=4, max_bytes_sent=100), tmp_path)
            allowance.step()
            allowance.step()
            allowance.sent_at_last(50)
        assert (tmp_path / SPENT_FILE).stat().st_mode & 0o777 == 0o600
        again = Allowance(PolicySection(max_steps=4, max_bytes_sent=100), tmp_path)
        with pytest.raises(NotAllowed, match="max_steps"):
            again.step()
        with pytest.raises(NotAllowed, match="max_bytes_sent"):
            again.sent(1)

    @pytest.mark.parametrize("content", ["", "[]", '{"steps": "many"}', '{"steps": -5}'])
    def test_counts_that_cannot_be_read_count_as_none(self, tmp_path: Path, content: str) -> None:
        (tmp_path / SPENT_FILE).write_text(content)
        allowance = Allowance(PolicySection(max_steps=1), tmp_path)
        allowance.step()
        allowance.write()
        assert json.loads((tmp_path / SPENT_FILE).read_text())["steps"] == 1


class TestKnownWeights:
    """What the server sends first is what the client knows, or is not taken."""

    def adapters(self, folder: Path, value: float) -> TensorFile:
        save_tensors(
            folder / "a.safetensors",
            {"x.lora_A.default.weight": torch.ones(2, 2), "x.lora_B.default.weight": torch.full((2, 2), value)},
        )
        return TensorFile(folder / "a.safetensors")

    def test_nothing_is_pinned(self, tmp_path: Path) -> None:
        check_known(PolicySection(), DIGEST, lambda: "", self.adapters(tmp_path, 1.0))

    @pytest.mark.parametrize("pinned", [DIGEST, "own"])
    def test_the_known_ones(self, tmp_path: Path, pinned: str) -> None:
        policy = PolicySection(known_weights=pinned)
        check_known(policy, DIGEST, lambda: DIGEST, self.adapters(tmp_path, 0.0))
        check_known(policy, DIGEST, lambda: DIGEST, None)

    @pytest.mark.parametrize("pinned", ["cd" * 32, "own"])
    def test_others(self, tmp_path: Path, pinned: str) -> None:
        with pytest.raises(NotAllowed, match="known_weights wants cdcdcd"):
            check_known(PolicySection(known_weights=pinned), DIGEST, lambda: "cd" * 32, None)

    def test_adapters_that_do_something_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(NotAllowed, match=r"lora_B\.default\.weight is not zero"):
            check_known(PolicySection(known_weights=DIGEST), DIGEST, lambda: "", self.adapters(tmp_path, 1e-9))
