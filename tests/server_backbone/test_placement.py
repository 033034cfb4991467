"""Accelerate's device map: on the CPU alone it changes no bit. Nothing here has run on a GPU."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Finished, tiny_config, write_text
from torch import Tensor

from server_backbone.compute.blocks_worker import COMMON, Contribution, MicroBatch
from server_backbone.compute.copies import weights_in
from server_backbone.compute.gradient_rules import rules_of_rounds
from server_backbone.compute.placement import device_map_of, devices_of
from server_backbone.compute.worker import worker_of
from splitfl.config.trees import RunConfig
from splitfl.errors import ModelError
from splitfl.models.checkpoint import TensorFile
from splitfl.models.cut import Cut
from splitfl.models.layout import Layout
from splitfl.models.source import empty_model
from splitfl.models.trainable import choose_trainable

LAYOUT = Layout(lengths_B=(5, 3))


def cut_of(family: str, run: RunConfig) -> Cut:
    """Cut an empty model and give its backbone random values."""
    cut = Cut.of(empty_model(tiny_config(family), run.model), bottom_layers=1, top_layers=1)
    choose_trainable(cut, run)
    draw = torch.Generator().manual_seed(0)
    cut.fill("server", lambda _, values: values.normal_(std=0.1, generator=draw), torch.device("cpu"))  # type: ignore[arg-type,return-value]
    return cut


def blocks_apart(cut: Cut) -> dict[str, int | str]:
    """Name each block of the backbone, and what else it has, as a place of its own: so that hooks are put on."""
    base = cut.backbone().base
    blocks = [f"{cut.anatomy.blocks_name}.{number}" for number in range(len(cut.layers_of("backbone")))]
    return dict.fromkeys(
        [*(name for name, _ in base.named_children() if name != cut.anatomy.blocks_name), *blocks], "cpu"
    )


def three_steps(cut: Cut, run: RunConfig, device_map: Mapping[str, int | str] | None) -> dict[str, Tensor]:
    worker = worker_of(cut, run, rules_of_rounds(run, cut), torch.device("cpu"), device_map)
    blocks = worker.blocks.backbone.base.get_submodule(cut.anatomy.blocks_name)
    assert all(hasattr(block, "_hf_hook") is (device_map is not None) for block in blocks)
    worker.blocks.check_packing(run.text.max_seq_length)
    draw = torch.Generator().manual_seed(1)
    outputs: dict[str, Tensor] = {}
    for step in (1, 2, 3):
        hidden_BSD, gradient_BSD = (torch.randn(2, 5, 32, generator=draw) for _ in range(2))
        batch = MicroBatch(hidden_BSD=hidden_BSD, layout=LAYOUT, request_id=step, step=step)
        outputs[f"out {step}"] = worker.forward("a", batch)
        outputs[f"gradient {step}"] = worker.backward("a", step, gradient_BSD).gradient_BSD  # type: ignore[assignment]
        num_norms = len(cut.trainable("client"))
        mine = Contribution(client_id="a", step=step, num_label_tokens=6, norms_P=[0.5] * num_norms)
        worker.apply(worker.reduce([mine]))
    return outputs | weights_in(worker.state(COMMON))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_hooks_between_blocks_change_no_bit(family: str, backbone: str) -> None:
    run = RunConfig.from_tree({"train": {"backbone": backbone}}, source="test")
    plain, spread = cut_of(family, run), cut_of(family, run)
    wanted = three_steps(plain, run, None)
    got = three_steps(spread, run, blocks_apart(spread))
    assert not hasattr(spread.blocks[0], "_hf_hook")
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_every_tensor_of_the_backbone_has_a_device() -> None:
    cut = cut_of("llama", RunConfig())
    devices = devices_of(cut, blocks_apart(cut) | {"layers.1": "meta"})
    of_block = [{devices[tensor].type for tensor in cut.blocks[layer].parameters()} for layer in (1, 2)]
    assert of_block == [{"cpu"}, {"meta"}]
    assert not any(tensor in devices for layer in (0, 3) for tensor in cut.blocks[layer].parameters())


@pytest.mark.parametrize("strategy", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_a_backbone_that_fits_nowhere_is_refused(strategy: Any) -> None:
    with pytest.raises(
        ModelError, match=rf"server.device_map = '{strategy}': .* does not hold the backbone \(left over"
    ):
        device_map_of(cut_of("llama", RunConfig()), strategy, {"cpu": 30_000})


def test_a_run_with_a_device_map_is_the_run_without(
    make_model: Callable[..., Path], federate: Callable[..., Finished], tmp_path: Path
) -> None:
    model, data = make_model(), write_text(tmp_path / "text.txt", num_lines=8, seed=1)
    trained = []
    for device_map in ("", "auto"):
        finished = federate(
            {
                "model": {"model_name_or_path": str(model)},
                "server": {"device_map": device_map, "export_model": False},
                "federation": {"num_rounds": 1, "local_steps": 2},
            },
            {"clinic": {"path": data}},
        )
        assert finished.errors == {}
        trained.append(TensorFile(finished.run_dir / "trained.safetensors"))
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
