"""A client needs memory for its own layers and activations, however large the backbone is.

Real processes on generated checkpoints: all zeros in a sparse file, so that size costs no disk. Memory is counted as
peak RSS (VmHWM) above what the imports took.
"""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import free_port, tiny_config, tiny_tokenizer, write_text

from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.models.source import empty_model, read_config
from splitfl.models.trainable import is_adapter

MIB = 1 << 20
VOCABULARY = 32_000
WIDTH = 1024
BLOCK_BYTES = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * 2816 + 2 * WIDTH)

# The imports are made first, so that what is measured afterwards is what the run itself takes.
CLIENT = """
import json, sys
from pathlib import Path
import peft, transformers.models.llama.modeling_llama
from transformers import AutoTokenizer
import client_edge.part.run
from splitfl.config.trees import ClientConfig
from splitfl.telemetry.memory import peak_rss_bytes, rss_bytes
before = rss_bytes()
client_edge.part.run.take_part(ClientConfig.load(Path(sys.argv[1])), accept=True)
sys.stdout.write(json.dumps([before, peak_rss_bytes()]) + "\\n")
"""


# Steps of one micro-batch and an evaluation, of a client without blocks of its own, around a small backbone in the same
# process; a second micro-batch needs room for its head's gradient beside the first's (docs/experiments.md). Loss is
# taken on an eighth of the tokens, which saves time and none of the plain loss's memory.
LARGE_VOCABULARY = """
import json, sys
import torch, transformers.models.llama.modeling_llama
from transformers import AutoConfig
from client_edge.text.batches import Batch
from client_edge.layers.edge import Edge
from splitfl.config.trees import RunConfig
from splitfl.models.cut import Cut
from splitfl.models.source import empty_model
from splitfl.models.trainable import choose_trainable
from splitfl.telemetry.memory import peak_rss_bytes, rss_bytes
trains, cpu = sys.argv[1] == "trained", torch.device("cpu")
torch.set_num_threads(1)
config = AutoConfig.for_model(
    "llama", vocab_size=151_936, hidden_size=896, intermediate_size=64, num_hidden_layers=1, num_attention_heads=14,
    tie_word_embeddings=True,
)
settings = {"bottom_layers": 0, "top_layers": 0}
train = {"embeddings": trains, "norm_head": trains, "backbone": "full"}
run = RunConfig.from_tree({"model": settings, "train": train}, source="test")
cut = Cut.of(empty_model(config, run.model), **settings)
choose_trainable(cut, run)
cut.fill("server", lambda _, values: values.normal_(std=0.02), cpu)
backbone = cut.backbone()
ids_BS = torch.randint(0, 151_936, (8, 512))
labels_BS = ids_BS.clone()
labels_BS[:, :448] = -100
batch = Batch(input_ids_BS=ids_BS, labels_BS=labels_BS, lengths_B=(512,) * 8, num_label_tokens=8 * 64)
with torch.no_grad():
    backbone(torch.zeros(8, 512, 896), None)
before = rss_bytes()
assert peak_rss_bytes() - before < 300 << 20
cut.fill("client", lambda _, values: values.normal_(std=0.02), cpu)
edge = Edge(cut, run, "clinic", cpu)
for step in (1, 2) if trains else (1,):  # from the second on the moments are there while gradients are made
    visit = edge.bottom_forward(batch, step=step, number=0)
    with torch.no_grad():
        hidden_BSD = backbone(visit.hidden_BSD.detach(), None)
    _, gradient_BSD = edge.top_loss_and_backward(visit, hidden_BSD, step=step, num_label_tokens=8 * 64)
    edge.bottom_backward(visit, gradient_BSD if trains else None)
    edge.finish_gradients(step)
    edge.optimizer.norms()
    edge.step(step, 0.5)
edge.evaluate_top(batch, edge.evaluate_bottom(batch))
parameters = sum(tensor.nbytes for _, tensor in cut.tensors_of("client").values())
training = 3 * sum(tensor.nbytes for tensor in cut.trainable("client").values())
hidden_states = 4 * hidden_BSD.nbytes  # what goes out and what comes back, and the gradients of both
sys.stdout.write(json.dumps([peak_rss_bytes() - before, parameters + training + hidden_states]))
"""


def generated_checkpoint(directory: Path, num_blocks: int) -> int:
    """Write a Llama of zeros; returns the bytes of its backbone with one block at each end on the client."""
    config = tiny_config(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2816,
        num_hidden_layers=num_blocks,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    header, offset = {}, 0
    for name, parameter in empty_model(config, RunConfig().model).named_parameters():
        end = offset + 4 * parameter.numel()
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + offset)
    return (num_blocks - 2) * BLOCK_BYTES


def client_peak(folder: Path, num_blocks: int) -> tuple[int, int, int]:
    """Run one client through a short run; returns (peak above imports, its own tensors, the backbone), in bytes."""
    model = folder / "model"
    backbone = generated_checkpoint(model, num_blocks)
    data = write_text(folder / "text.txt", num_lines=8, seed=1, lengths=(30, 30))
    port = free_port()
    (folder / "server.toml").write_text(
        f"""
        [server]
        address = "tcp://127.0.0.1:{port}"
        runs_dir = "{folder}/runs"
        run_id = "run"
        cache_dir = "{folder}/cache"
        export_model = false
        [model]
        model_name_or_path = "{model}"
        [federation]
        num_rounds = 1
        local_steps = 1
        per_device_train_batch_size = 2
        gradient_accumulation_steps = 1
        [train]
        backbone = "none"
        [lora]
        target_modules = ["q_proj"]
        """
    )
    (folder / "client.toml").write_text(
        f"""
        [client]
        client_id = "clinic"
        server_address = "tcp://127.0.0.1:{port}"
        output_dir = "{folder}/clients"
        cache_dir = "{folder}/client-cache"
        num_threads = 1
        [data]
        path = "{data}"
        eval_fraction = 0.0
        """
    )
    server = subprocess.Popen(
        [sys.executable, "-m", "server_backbone", "--config", str(folder / "server.toml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        command = [sys.executable, "-c", CLIENT, str(folder / "client.toml")]
        client = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        assert client.returncode == 0, client.stderr
        _, errors = server.communicate(timeout=30)
        assert server.returncode == 0, errors
    finally:
        server.kill()
        server.wait()
    before, peak = json.loads(client.stdout.splitlines()[-1])
    cut = Cut.of(
        empty_model(read_config(model), RunConfig().model),
        bottom_layers=1,
        top_layers=1,
    )
    own = sum(4 * tensor.numel() for name, (_, tensor) in cut.tensors_of("client").items() if not is_adapter(name))
    return peak - before, own, backbone


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_client_holds_its_own_layers_and_nothing_of_the_backbone(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    peak_small, own, backbone_small = client_peak(small, 8)
    peak_large, _, backbone_large = client_peak(large, 44)
    assert backbone_small >= 0.24 * 1024 * MIB
    assert backbone_large >= 1.9 * 1024 * MIB
    # activations: logits of 2 x 31 positions, their log-probabilities and gradients, float32, are the largest of them
    activations = 4 * 2 * 31 * VOCABULARY * 4
    assert peak_small <= 1.25 * (own + activations), (peak_small / MIB, own / MIB, activations / MIB)
    assert peak_large - peak_small <= 32 * MIB, (peak_large / MIB, peak_small / MIB)


@pytest.mark.slow
@pytest.mark.parametrize("embeddings", ["frozen", "trained"])
def test_no_logits_of_a_batch_however_large_the_vocabulary(embeddings: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LARGE_VOCABULARY, embeddings], capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr
    peak, held = json.loads(done.stdout)
    assert peak < 1.3 * held, (peak / MIB, held / MIB)
