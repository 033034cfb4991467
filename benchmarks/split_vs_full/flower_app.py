"""The Flower app of the arms "LoRA FL" and "full FL": imported by Flower's own processes, and by nothing else.

Client state (AdamW's moments) is kept in a file of the client's own, as splitfl's clients keep theirs. Sent back and
forth with Flower's context it would cost much more.
"""

import json
import time
import traceback
from pathlib import Path

import peft  # noqa: F401  # imports are over when a message is handled, so that they can be told apart
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import save_file

from benchmarks.split_vs_full.learning import Learner, batches_of, load, trained, whole_model
from benchmarks.split_vs_full.meter import Mark
from benchmarks.split_vs_full.plan import Job, round_file

client_app = ClientApp()
server_app = ServerApp()

JOB_KEY = "job"
CLIENT_KEY = "client"


def _job(context: Context) -> Job:
    return Job.read(Path(str(context.run_config[JOB_KEY])))


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Take everyone's tensors, learn for a round, and send back what they have become."""
    job, client_id = _job(context), str(context.node_config[CLIENT_KEY])
    folder = job.out_dir / client_id
    folder.mkdir(exist_ok=True)
    with Mark(folder / "marks.jsonl"):
        torch.set_num_threads(job.num_threads)
        round_number = int(message.content["config"]["server-round"])
        learner = Learner(whole_model(job.model_dir, job.learned, job.seed), job.budget)
        load(learner.model, message.content["arrays"].to_torch_state_dict())
        state_file = folder / "state.pt"
        if state_file.exists():
            learner.load_state(torch.load(state_file, weights_only=True))
        batches = batches_of(client_id, job.clients[client_id], job)
        first = (round_number - 1) * job.budget.local_steps + 1
        for step in range(first, first + job.budget.local_steps):
            learner.step(batches.at(step))
        if round_number < job.budget.num_rounds:
            torch.save(learner.state(), state_file)
        arrays = ArrayRecord({name: parameter.detach() for name, parameter in trained(learner.model).items()})
    told = MetricRecord({"num-examples": len(batches.dataset), "num-label-tokens": learner.num_label_tokens})
    return Message(content=RecordDict({"arrays": arrays, "metrics": told}), reply_to=message)


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg over all clients; writes the tensors of every round, then done.json or failed.json."""
    job = _job(context)
    try:
        _run(grid, job)
    except Exception:  # whatever it is, the benchmark wants to know
        (job.out_dir / "failed.json").write_text(json.dumps(traceback.format_exc()), encoding="utf-8")
        raise


def _run(grid: Grid, job: Job) -> None:
    torch.set_num_threads(job.num_threads)
    first = {
        name: tensor.detach() for name, tensor in trained(whole_model(job.model_dir, job.learned, job.seed)).items()
    }
    num_clients, begun_s = len(job.clients), time.time()
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=num_clients,
        min_available_nodes=num_clients,
        # a sum, so that the tokens of all arms can be compared
        train_metrics_aggr_fn=lambda records, _: MetricRecord(
            {"num-label-tokens": sum(int(record["metrics"]["num-label-tokens"]) for record in records)}
        ),
    )

    def keep(server_round: int, arrays: ArrayRecord) -> None:
        if server_round:
            path = round_file(job.out_dir, server_round)
            half_done = path.with_suffix(".partial")
            save_file({name: tensor.contiguous() for name, tensor in arrays.to_torch_state_dict().items()}, half_done)
            half_done.replace(path)

    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(first),
        num_rounds=job.budget.num_rounds,
        train_config=ConfigRecord(),
        evaluate_fn=keep,
    )
    tokens = sum(int(metrics["num-label-tokens"]) for metrics in result.train_metrics_clientapp.values())
    told = {"num_label_tokens": tokens, "seconds": time.time() - begun_s}
    half_done = job.out_dir / "done.partial"
    half_done.write_text(json.dumps(told), encoding="utf-8")
    half_done.replace(job.out_dir / "done.json")
