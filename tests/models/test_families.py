"""Every causal LM of the installed transformers: cut bit for bit, or refused with the reason.

Which is which is written in docs/models.md.

The axes are covered pairwise, not in full: each family meets each value of each axis, and over all families each value
of an axis meets each of every other.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from conftest import VOCABULARY
from huggingface_hub.errors import StrictDataclassError
from tiny_families import empty_model, families, small_config, small_model
from torch import Tensor
from transformers import PreTrainedModel

import splitfl
from splitfl.errors import ModelError
from splitfl.models.cut import Cut, mask_of

PAGE = Path(splitfl.__file__).parent.parent / "docs" / "models.md"
LENGTH = 9  # more than twice the window of sliding layers
NOT_BUILT = (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, AssertionError)
AXES: dict[str, tuple[Any, ...]] = {
    "blocks": ((0, 0), (1, 1), (2, 1)),
    "padding": ("none", "left", "right"),
    "attention": ("eager", "sdpa"),
    "is_tied": (True, False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to cut and feed a model."""

    blocks: tuple[int, int]
    padding: str
    attention: str
    is_tied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a family."""

    kind: Literal["bitwise", "close", "refused", "not built"]
    text: str = ""
    """Features of the family, its largest difference, or the reason."""


def cases_of(number: int) -> list[Case]:
    """Return the cases of the family with this number: each of its values once, shifted from family to family."""
    return [
        Case(
            blocks=AXES["blocks"][row],
            padding=AXES["padding"][(row + number) % 3],
            attention=AXES["attention"][(row + number // 3) % 2],
            is_tied=AXES["is_tied"][(row + number // 6) % 2],
        )
        for row in range(3)
    ]


def inputs_of(padding: str) -> tuple[Tensor, Tensor | None, Tensor]:
    torch.manual_seed(1)
    ids_BS = torch.randint(3, VOCABULARY, (3, LENGTH))
    lengths = (LENGTH,) * 3 if padding == "none" else (LENGTH, 4, 7)
    mask_BS = mask_of(lengths, LENGTH, "left" if padding == "left" else "right", torch.device("cpu"))
    return ids_BS, mask_BS, ids_BS if mask_BS is None else ids_BS.masked_fill(mask_BS == 0, -100)


def largest_difference(family: str, case: Case, **overrides: Any) -> float:
    """Return how far loss and gradients of the split model, whole and in segments, are from the unsplit one's."""
    model = small_model(family, attn_implementation=case.attention, tie_word_embeddings=case.is_tied, **overrides)
    ids_BS, mask_BS, labels_BS = inputs_of(case.padding)
    inputs = {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS, "use_cache": False}
    wanted = learned(model, model(**inputs).loss)
    client, _ = splitfl.split(model, bottom_layers=case.blocks[0], top_layers=case.blocks[1])
    as_model = learned(model, client(**inputs).loss)
    cut = Cut.of(model, bottom_layers=case.blocks[0], top_layers=case.blocks[1])
    bottom, backbone, top = cut.bottom().eval(), cut.backbone().eval(), cut.top().eval()
    hidden_BSD = backbone(bottom(ids_BS, mask_BS), mask_BS)
    as_segments = learned(model, top.loss(hidden_BSD, mask_BS, labels_BS, None))
    assert any(gradient is not None and gradient.any() for gradient in wanted)
    return max(difference(wanted, as_model), difference(wanted, as_segments))


def learned(model: PreTrainedModel, loss: Tensor) -> list[Tensor | None]:
    """Return the loss and the gradient of every parameter."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)]


def difference(first: list[Tensor | None], second: list[Tensor | None]) -> float:
    """Return the largest absolute difference, infinity where only one has a gradient or either is not a number."""
    largest = 0.0
    for one, other in zip(first, second, strict=True):
        if one is None and other is None:
            continue
        if one is None or other is None or one.isnan().any() or other.isnan().any():
            return float("inf")
        largest = max(largest, float((one - other).abs().max()))
    return largest


@cache
def outcome_of(family: str) -> Outcome:
    """Try a family: empty first, since a refusal needs no memory."""
    try:
        model = empty_model(family)
    except (*NOT_BUILT, StrictDataclassError) as error:  # whatever transformers says of a config that does not fit
        return Outcome(kind="not built", text=str(error).strip().splitlines()[-1].strip())
    try:
        Cut.of(model, bottom_layers=1, top_layers=1)
    except ModelError as error:
        return Outcome(kind="refused", text=str(error))
    largest = max(largest_difference(family, case) for case in cases_of(families().index(family)))
    if largest:
        return Outcome(kind="close", text=f"{largest:.0e}")
    return Outcome(kind="bitwise", text=", ".join(features(family)))


def features(family: str) -> Iterable[str]:
    """Say what the tiny model of a family has that others do not."""
    config = small_config(family, {})
    if config.get_text_config() is config and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        yield "sliding-window layers"
    if any("expert" in name for name, _ in empty_model(family).named_parameters()):
        yield "experts"


def page() -> str:
    """Return docs/models.md."""
    outcomes = {family: outcome_of(family) for family in sorted(families())}
    counts = {
        kind: sum(o.kind == kind for o in outcomes.values()) for kind in ("bitwise", "close", "refused", "not built")
    }
    counted = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return HEAD.format(tried=len(outcomes), counted=counted) + "".join(
        f"| {family} | {outcome.kind} | {outcome.text} |\n" for family, outcome in outcomes.items()
    )


HEAD = """# Models

<!-- written by `make docs` (tests/models/test_families.py): do not edit -->

Every causal LM that the installed transformers has is built tiny and random, cut, and compared with itself unsplit,
in float32 on CPU: loss and the gradients of all parameters, through `splitfl.split` and through the segments that the
training loop runs. Each family meets 0/0, 1/1 and 2/1 client blocks and no, left and right padding; eager and sdpa
attention, tied and untied embeddings are met pairwise; rows are longer than the window of sliding layers.

**{tried} families: {counted}.**

"bitwise": no bit differs. "close": the largest absolute difference. "refused": the sentence that a user sees. "not
built": what transformers says when it should build a tiny one; such a family has not been tried, and the checks that
refuse others apply to it too.

| family | outcome | |
|---|---|---|
"""


@pytest.mark.parametrize("family", sorted(families()))
def test_a_family_is_cut_bit_for_bit_or_refused(family: str) -> None:
    outcome = outcome_of(family)
    assert outcome.kind != "close", outcome.text


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("falcon", {"alibi": True}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
        ("bloom", {"apply_residual_connection_post_layernorm": True}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
        ("granite", {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    ],
)
def test_what_a_config_may_change(family: str, overrides: dict[str, Any]) -> None:
    assert [largest_difference(family, case, **overrides) for case in cases_of(1)] == [0.0] * 3


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("mixtral", {"output_router_logits": True}, "the router's auxiliary loss"),
        ("gemma3n_text", {}, "use the keys and values of earlier ones"),
        ("gemma4_text", {"num_kv_shared_layers": 0}, "fed from the token ids"),
        ("mamba", {}, "keep a state other than keys and values"),
        ("bart", {}, "attend to an encoder"),
        ("nanochat", {}, "what follows its blocks is also used before them"),
    ],
)
def test_what_is_refused_is_named(family: str, overrides: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=f"^{family} cannot be cut: .*{reason}"):
        splitfl.split(small_model(family, **overrides))


def test_every_two_values_of_different_axes_meet() -> None:
    cut = [number for number, family in enumerate(families()) if outcome_of(family).kind == "bitwise"]
    cases = [case for number in cut for case in cases_of(number)]
    for one, other in combinations(AXES, 2):
        met = {(getattr(case, one), getattr(case, other)) for case in cases}
        assert met == set(product(AXES[one], AXES[other]))


def test_the_page_is_current(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-models"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/models.md is stale: run make docs"
