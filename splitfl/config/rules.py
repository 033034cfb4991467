"""What holds between settings of several sections: each rule raises `ValueError` with the value and the remedy."""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from splitfl.config.identity import StrategyName
from splitfl.config.kind import BackboneKind, RunKind
from splitfl.config.optional_measures import OF_ANSWERS, OF_LABELS
from splitfl.config.own import PolicySection
from splitfl.config.run import RunSettings


def check(run: RunSettings) -> None:
    """Hold the run's settings to each other; raise `ValueError` for the first rule that is broken."""
    for rule in (_strategy_uses_its_options, *_OF_STRATEGY.get(run.federation.strategy, ()), *_OF_ALL):
        rule(run)


def _strategy_uses_its_options(run: RunSettings) -> None:
    strategy = run.federation.strategy
    for name in run.strategy.unused_by(strategy):
        users = ", ".join(sorted(run.strategy.USED_BY[name]))
        raise ValueError(
            f"strategy.{name} = {getattr(run.strategy, name)} is an option of {users}: leave it out, or choose"
            f" another federation.strategy than {strategy}"
        )


def _controls_are_what_they_mean(run: RunSettings) -> None:
    """Refuse settings with which SCAFFOLD's controls would not be mean gradients."""
    if run.kind is RunKind.OWN_LOOPS:
        return
    if run.optimizer.optim != "sgd":
        raise ValueError(
            f"optimizer.optim = {run.optimizer.optim} does not go with federation.strategy = SCAFFOLD, whose"
            ' controls are gradients worked out from the way that plain SGD went: set optimizer.optim to "sgd", or'
            " choose another strategy"
        )
    if run.optimizer.weight_decay:
        raise ValueError(
            f"optimizer.weight_decay = {run.optimizer.weight_decay} does not go with federation.strategy ="
            " SCAFFOLD, whose controls are gradients worked out from the way that a client went, decay and all:"
            " set it to 0"
        )
    if run.federation.weight_by != "uniform":
        raise ValueError(
            f"federation.weight_by = {run.federation.weight_by} does not go with federation.strategy = SCAFFOLD:"
            " its controls are plain means over the clients, which draw every merge to where all clients count"
            ' alike, so set weight_by to "uniform"'
        )
    if run.backbone_kind is BackboneKind.COPIES:
        raise ValueError(
            f"federation.server_mode = {run.federation.server_mode} does not go with federation.strategy ="
            " SCAFFOLD, which corrects the clients' layers alone, and copies of the backbone would drift"
            " uncorrected: choose shared, sequential or frozen"
        )


def _has_what_fed_buff_needs(run: RunSettings) -> None:
    if objections := list(_objections_to_fed_buff(run)):
        raise ValueError('federation.strategy = "FedBuff": ' + "; ".join(objections))


def _objections_to_fed_buff(run: RunSettings) -> Iterator[str]:
    federation, schedule = run.federation, run.optimizer.lr_scheduler_type
    if federation.server_mode not in ("sequential", "frozen"):
        why = {
            "shared": "has clients wait for each other, and FedBuff has none wait",
            "per_client": "merges the copies of clients that have begun together, and with FedBuff none do",
        }
        yield (
            f'federation.server_mode = "{federation.server_mode}" {why[federation.server_mode]}: set it to'
            ' "sequential" or "frozen"'
        )
    if not schedule.startswith("constant"):
        yield (
            f'optimizer.lr_scheduler_type = "{schedule}" needs a last step, and how many steps a client comes to is'
            ' not known beforehand: set it to "constant" or "constant_with_warmup"'
        )
    if run.storage.durability != "redo":
        yield (
            f'storage.durability = "{run.storage.durability}" takes all clients back to one merge, and they are at'
            ' different ones: set it to "redo"'
        )
    unused = {"fraction_train": 1.0, "min_train_clients": 1, "partial_work": "drop"}
    for name, usual in unused.items():
        if (value := getattr(federation, name)) != usual:
            yield f"federation.{name} = {value} is of rounds that all clients share: leave it out"
    if federation.compares_rounds:
        yield (
            "federation.early_stopping_patience and load_best_model_at_end compare rounds that all clients share:"
            " leave them out"
        )


def _measures_what_it_compares(run: RunSettings) -> None:
    metric = run.federation.metric_for_best_model
    if metric in OF_ANSWERS | OF_LABELS and metric not in run.evaluation.measures and run.federation.compares_rounds:
        raise ValueError(
            f"federation.metric_for_best_model = {metric}, which is not measured: add it to evaluation.measures"
        )


def _can_go_back_to_the_best(run: RunSettings) -> None:
    if run.federation.load_best_model_at_end and set(run.merge.parts) != {"bottom", "top"}:
        raise ValueError(
            f"federation.load_best_model_at_end with merge.parts = {list(run.merge.parts)}: a part that is not"
            " merged is kept by its client as it is now, and not as it was after the best round; merge both parts,"
            " or leave load_best_model_at_end out"
        )


def _answers_fit_the_cache(run: RunSettings) -> None:
    positions = run.text.max_seq_length + run.evaluation.max_new_tokens
    if run.evaluation.generates and positions > run.link.max_cache_tokens:
        raise ValueError(
            f"a prompt of text.max_seq_length = {run.text.max_seq_length} tokens and evaluation.max_new_tokens ="
            f" {run.evaluation.max_new_tokens} after it are more than link.max_cache_tokens ="
            f" {run.link.max_cache_tokens}: raise that, or shorten one of them"
        )


Rule: TypeAlias = Callable[[RunSettings], None]
_OF_STRATEGY: Mapping[StrategyName, tuple[Rule, ...]] = {
    "SCAFFOLD": (_controls_are_what_they_mean,),
    "FedBuff": (_has_what_fed_buff_needs,),
}
_OF_ALL: tuple[Rule, ...] = (_measures_what_it_compares, _can_go_back_to_the_best, _answers_fit_the_cache)


def objections_to(policy: PolicySection, run: RunSettings) -> list[str]:
    """Say what this policy does not allow in a run's settings, each with the setting that would allow it."""
    return list(_objections_to(policy, run))


def _objections_to(policy: PolicySection, run: RunSettings) -> Iterator[str]:
    federation = run.federation
    for name in ("bottom_layers", "top_layers"):
        if (found := getattr(run.model, name)) < (least := getattr(policy, f"min_{name}")):
            yield f"model.{name} = {found} (policy.min_{name} = {least})"
    if run.train.embeddings and not policy.allow_embeddings:
        yield "train.embeddings = true (policy.allow_embeddings = false)"
    if run.evaluation.generates and not policy.allow_answers:
        yield "evaluation.measures has prompts answered through the server (policy.allow_answers = false)"
    bounds = {
        "federation.num_rounds": (federation.num_rounds, "max_rounds"),
        "federation.num_rounds * local_steps": (run.total_steps, "max_steps"),
        "federation.per_device_train_batch_size * gradient_accumulation_steps": (
            federation.per_device_train_batch_size * federation.gradient_accumulation_steps,
            "max_step_rows",
        ),
        "federation.per_device_eval_batch_size": (federation.per_device_eval_batch_size, "max_step_rows"),
        "link.heartbeat_timeout": (run.link.heartbeat_timeout, "max_silence"),
        "optimizer.learning_rate": (run.optimizer.learning_rate, "max_learning_rate"),
    }
    for name, (value, bound) in bounds.items():
        if value > (most := getattr(policy, bound)):
            yield f"{name} = {value:,} (policy.{bound} = {most:,})"
