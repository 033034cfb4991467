"""Writes what Flower's strategies make of some arrays: `python tests/federation/flower_reference.py FILE.json`.

Run it where `flwr` is installed (the committed file is flwr 1.42.0's); it imports nothing of splitfl.
"""

import json
import random
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.supercore.task_identity import TaskIdentity

NUM_ROUNDS = 3
SHAPES = {"matrix": (3, 4), "vector": (5,)}
CLIENTS = ("a", "b", "c", "d", "e", "f", "g")
STRATEGIES = {
    "FedAvg": {},
    "FedAvgM": {"server_learning_rate": 0.7, "server_momentum": 0.9},
    "FedAdagrad": {"eta": 0.05, "tau": 1e-2},
    "FedAdam": {"eta": 0.05, "beta_1": 0.8, "beta_2": 0.9, "tau": 1e-2},
    "FedYogi": {"eta": 0.05, "beta_1": 0.8, "beta_2": 0.9, "tau": 1e-2},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.3},
    "Krum": {"num_malicious_nodes": 2},
    "MultiKrum": {"num_malicious_nodes": 2, "num_nodes_to_select": 3},
}


def drawn(draw: random.Random) -> dict[str, np.ndarray]:
    """Draw one model."""
    return {
        name: np.array([draw.gauss(0, 1) for _ in range(int(np.prod(shape)))], dtype=np.float32).reshape(shape)
        for name, shape in SHAPES.items()
    }


def record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    """Wrap arrays as Flower does."""
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def reply(arrays: dict[str, np.ndarray], num_examples: int) -> Message:
    """Make a client's answer to a round."""
    content = RecordDict({"arrays": record(arrays), "metrics": MetricRecord({"num-examples": num_examples})})
    return Message(content, dst_node_id=0, message_type="train")


def as_lists(arrays: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Flatten for JSON."""
    return {name: array.reshape(-1).tolist() for name, array in arrays.items()}


def merges(name: str, options: dict[str, float], first: dict, rounds: list) -> list[dict[str, list[float]]]:
    """Return what a strategy makes of each round's updates; a round begins where the last merge ended."""
    rule = getattr(flower, name)(**options)
    held, results = first, []
    for number, updates in enumerate(rounds, start=1):
        rule.current_arrays = record(held) if name == "FedAvgM" else held
        replies = [reply(arrays, weight) for arrays, weight in updates]
        merged, _ = rule.aggregate_train(number, replies)
        held = {key: array.numpy() for key, array in merged.items()}
        results.append(as_lists(held))
    return results


def main() -> None:
    """Draw the arrays and write them with every strategy's merges."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # a message wants to know whose it is
    draw = random.Random(1)
    first = drawn(draw)
    rounds = [[(drawn(draw), draw.randint(1, 50)) for _ in CLIENTS] for _ in range(NUM_ROUNDS)]
    reference = {
        "flwr": version("flwr"),
        "shapes": SHAPES,
        "first": as_lists(first),
        "rounds": [[{"layers": as_lists(arrays), "weight": weight} for arrays, weight in each] for each in rounds],
        "merges": {
            name: {"options": options, "layers": merges(name, options, first, rounds)}
            for name, options in STRATEGIES.items()
        },
    }
    Path(sys.argv[1]).write_text(json.dumps(reference) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
